"""Preparing Bridge v2: interrupted at any moment, by many workers, from any layout, the same bytes.

As a script this file prepares once; or it imports everything once and forks runs that are killed at a certain
call of a function that writes.
"""
import json, os, random, shutil, signal, subprocess, sys, time
from ctypes.util import find_library
from functools import partial
from importlib.util import find_spec
from pathlib import Path
import numpy as np
import pytest
from conftest import PATIENCE, needs_system
from flowloss_nb.basics.clips import (
    check_batch, read_video, resample_frames, take, thisthat_frames, to_float)
from flowloss_nb.data.metaworld import load_clips
from flowloss_nb.data.trees import (
    Episode, stretch_clip, write_flat, write_lerobot, write_lerobot3, write_raw)
from flowloss_nb.data.strips import Recipe
from flowloss_nb.data.prepare import map_cluster, map_local, prepare, prepared_splits, PreparedClips
from flowloss_nb.runs.runs import run_notebook

SMALL, ALONE = Recipe((64, 96)), partial(map_local, workers=1)
HERE = Path(__file__).resolve().parent
ENV = os.environ | {
    'OMP_NUM_THREADS': '1', 'TF_CPP_MIN_LOG_LEVEL': '3', 'RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO': '0',
    'PYTHONPATH': os.pathsep.join([str(HERE.parent), str(HERE)])}

def quiet(tree, out, recipe=SMALL, run=ALONE, **more):
    return prepare(tree, out, recipe, run=run, progress=False, **more)

def apart(program, *args, timeout=PATIENCE):
    "Run a program in its own process; its output."
    done = subprocess.run([sys.executable, '-c', program, *map(str, args)], env=ENV, timeout=timeout,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout

def episodes(n, size=(60, 80)):
    clips = load_clips('train', 'fixed')
    return [stretch_clip(clips, i, 10 + 7*i % 50, size) for i in range(n)] # the first is too short

def contents(out):
    "All files but the lock: name -> bytes. A leftover temporary file would show here."
    files = (p for p in sorted(out.rglob('*')) if p.is_file() and p.name != 'lock')
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in files}

@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    "A raw tree with damage."
    root = tmp_path_factory.mktemp('bridge')
    folders = write_raw(episodes(24), root/'tree')
    (folders[3]/'lang.txt').unlink()
    (folders[4]/'images0/im_2.jpg').write_bytes(b'')
    (folders[5]/'images0/im_0.jpg').unlink()
    return root/'tree'

@pytest.fixture(scope='module')
def whole(tree):
    "The output of an uninterrupted run by one process."
    quiet(tree, tree.parent/'whole')
    return contents(tree.parent/'whole')

def start(tree, out, *words):
    return subprocess.Popen([sys.executable, __file__, str(tree), str(out), *words], env=ENV,
                            stderr=subprocess.PIPE, start_new_session=True)

def end(process, expected=0):
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == expected, err.decode()[-3000:]

# ---- the script

def die_at(what, n):
    "Kill the process at the n-th call of a function that writes: half-way, or after it if n is negative."
    from flowloss_nb.data import prepare as p
    owners = dict(replace=(os, 'replace'), clip=(Path, 'write_bytes'), journal=(Path, 'write_text'),
                  manifest=(p, 'write_manifest'), report=(p, 'write_json'))
    owner, name = owners[what]
    real, calls = getattr(owner, name), iter(range(1, 10**6))
    def call(*a, **k):
        if next(calls) != abs(n): return real(*a, **k)
        if n < 0: real(*a, **k)
        elif what in ('clip', 'journal'): real(a[0], a[1][:len(a[1])//2])
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, call)

def fork(tree, out, moment=None):
    "A run in a fork of this process; its exit status."
    if pid := os.fork(): return os.waitpid(pid, 0)[1]
    try:
        if moment: die_at(*moment)
        quiet(tree, out)
        os._exit(0)
    finally: os._exit(1)

# ---- killed

MOMENTS = [('clip', 1), ('clip', 7), ('replace', 2), ('replace', -4), ('journal', 3), ('replace', -9),
           ('manifest', 1), ('manifest', -1), ('report', 1), ('report', -1)]

def test_killed_while_writing(tree, whole, tmp_path):
    "Runs on one folder are killed half-way through a file or between two; the last one gives the same bytes."
    end(start(tree, tmp_path/'out', 'moments'))
    assert contents(tmp_path/'out') == whole

def test_killed_with_workers(tree, whole, tmp_path):
    "Two workers: when the parent is killed, at a random moment, the workers end too."
    dice, out, alive = random.Random(), tmp_path/'out', 0
    for _ in range(2):
        before = len(list(out.rglob('*.jpg')))
        run = start(tree, out)
        while run.poll() is None and len(list(out.rglob('*.jpg'))) < before + 3: time.sleep(.002)
        time.sleep(dice.uniform(0, .03))
        alive += run.poll() is None
        os.kill(run.pid, signal.SIGKILL)
        run.communicate()
        until = time.time() + PATIENCE
        while group_lives(run.pid) and time.time() < until: time.sleep(.05)
        assert not group_lives(run.pid), 'workers outlived their parent'
    assert alive, 'the run ended before it was killed'
    end(start(tree, out))
    assert contents(out) == whole | {'params.json': contents(out)['params.json']}
    assert json.loads(contents(out)['params.json']) == json.loads(whole['params.json'])

def group_lives(group):
    "Is a process of this group left, zombies not counted?"
    for stat in Path('/proc').glob('[0-9]*/stat'):
        try: state, _, pgrp = stat.read_text().rsplit(')', 1)[1].split()[:3]
        except (OSError, ValueError): continue
        if int(pgrp) == group and state != 'Z': return True
    return False

def test_full_disk_stops_and_is_resumed(tree, whole, tmp_path, monkeypatch):
    real, calls = Path.write_bytes, iter(range(10**6))
    def full(path, data):
        if next(calls) != 5: return real(path, data)
        real(path, data[:100])
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(OSError, match='No space left'): quiet(tree, tmp_path)
    assert not (tmp_path/'manifest.jsonl').exists()
    assert not list(tmp_path.rglob('*.tmp.*'))
    monkeypatch.undo()
    quiet(tree, tmp_path)
    assert contents(tmp_path) == whole

# ---- many processes, many machines

def test_workers_and_cluster_give_the_same_bytes(tree, whole, tmp_path):
    quiet(tree, tmp_path/'two', run=partial(map_local, workers=2))
    assert contents(tmp_path/'two') == whole

def where(job):
    "A job that returns the node it ran on."
    import ray
    time.sleep(.2)
    return ray.get_runtime_context().get_node_id()

def test_cluster_of_two_nodes(tree, whole, tmp_path, monkeypatch):
    "Ray: both nodes work; one is removed on the way, and the bytes are the same."
    needs_system(find_spec('ray'), 'Ray is not installed: pip install "flowloss_nb[cluster]"')
    import ray
    from ray.cluster_utils import Cluster
    for k in ('PYTHONPATH', 'OMP_NUM_THREADS', 'RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO'):
        monkeypatch.setenv(k, ENV[k])
    small = dict(object_store_memory=80 * 2**20, include_dashboard=False)
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, **small))
    try:
        second = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        assert len(set(map_cluster(where, iter(range(8))))) == 2
        def loses_a_node(fn, jobs):
            for i, lines in enumerate(map_cluster(fn, jobs, window=8)):
                if i == 3: cluster.remove_node(second, allow_graceful=False)
                yield lines
        quiet(tree, tmp_path/'out', run=loses_a_node)
        assert contents(tmp_path/'out') == whole
    finally:
        ray.shutdown()
        cluster.shutdown()

# ---- pictures of a camera's size, every layout

DRAWS = """import sys, numpy as np
from flowloss_nb.simulator.generator import film, FIXED, Studio
studio = Studio('drawer-close-v3', FIXED, (160, 240), 10)
made = [film(studio, 1080 + i, n) for i, n in enumerate((10, 24, 60))]
np.savez(sys.argv[1], *[e.frames for e in made], prompts=[e.prompt for e in made])
studio.close()
if 'tfds' in sys.argv:
    from flowloss_nb.data.rlds import import_tfds
    try: import_tfds()
    except RuntimeError as e: print(e)"""

@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    "Episodes of 10, 24 and 60 frames at 480×640, drawn in a process apart: OpenGL collides with TensorFlow."
    needs_system(all(map(find_library, ('EGL', 'OpenGL'))),
                 'no EGL: apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0')
    path = tmp_path_factory.mktemp('films')/'films.npz'
    return path, apart(DRAWS, path, 'tfds')

@pytest.fixture(scope='module')
def films(drawn):
    d = np.load(drawn[0])
    return [Episode(d[f'arr_{i}'], str(p)) for i, p in enumerate(d['prompts'])]

WRITES_RLDS = """import sys, numpy as np
from flowloss_nb.data.trees import Episode
from flowloss_nb.data.rlds import write_rlds
d = np.load(sys.argv[1])
write_rlds([Episode(d[f'arr_{i}'], str(p)) for i, p in enumerate(d['prompts'])], sys.argv[2], 3)"""

def test_camera_sized_pictures_in_all_layouts(drawn, films, tmp_path):
    "Clips of 480×640 from every layout; 10 frames are too few. TFDS is written in a process of its own."
    assert [e.frames.shape for e in films] == [(n, 480, 640, 3) for n in (10, 24, 60)]
    for name, write in dict(raw=write_raw, flat=write_flat, v2=write_lerobot, v3=write_lerobot3).items():
        write(films, tmp_path/name)
    apart(WRITES_RLDS, drawn[0], tmp_path/'tfds')
    for name in ('raw', 'flat', 'v2', 'v3', 'tfds/bridge_dataset/1.0.0'):
        # TFDS: workers are forked from a process without OpenGL
        out, run = tmp_path/'out'/name, partial(map_local, workers=2) if 'bridge' in name else ALONE
        report = quiet(tmp_path/name, out, Recipe(), run, shares=(1, 0, 0))
        assert (report['candidates'], report['kept']) == (3, 2), name
        assert report['dropped']['too few frames']['count'] == 1, name
        batch = check_batch(take(PreparedClips(out, 'train'), [0, 1]), frames=14, size=(256, 384))
        assert batch['prompt'] == [e.prompt for e in films[1:]]
        for video, e in zip(batch['video'], films[1:]):
            frames = to_float(e.frames[resample_frames(len(e.frames))])
            assert (video - torch_area(frames, (256, 384))).abs().mean() * 127.5 < 3, name

def test_thisthat_recipe(films, tmp_path):
    "This&That's rule, which drops the episode of 60 frames too."
    write_raw(films, tmp_path/'raw')
    recipe = Recipe(resample=thisthat_frames, longest=56)
    report = quiet(tmp_path/'raw', tmp_path/'out', recipe, shares=(1, 0, 0))
    assert (report['kept'], report['dropped']['too many frames']['count']) == (1, 1)

def torch_area(x, size):
    import torch
    return torch.nn.functional.interpolate(x, size, mode='area')

# ---- real samples

DATA = HERE.parents[1]/'shared'/'data'

def needs_data(name):
    "Real samples lie beside the repository on some machines, and are never part of it."
    if not (DATA/name).is_dir(): pytest.skip(f'no {DATA/name}: these real samples are not in the repository')
    return DATA/name

PREPARES = """import json, sys
from functools import partial
from flowloss_nb.data.prepare import map_local, prepare
from flowloss_nb.data.strips import Recipe
recipe, run = Recipe((64, 64), 10), partial(map_local, workers=1)
print(json.dumps([prepare(root, root + '_out', recipe, run=run, progress=False) for root in sys.argv[1:]]))"""

def test_octo_episodes(tmp_path):
    "25 of 25 with all flags off. A missing shard of val is reported; with a copy of train's none is left."
    needs_system(find_spec('tensorflow_datasets'), 'TFDS is not installed: pip install "flowloss_nb[rlds]"')
    source = needs_data('octo_tfds')/'bridge_dataset/1.0.0'
    for name in ('alone', 'copied'): shutil.copytree(source, tmp_path/name)
    shard = 'bridge_dataset-{}.tfrecord-00000-of-00001'
    shutil.copy(source/shard.format('train'), tmp_path/'copied'/shard.format('val'))
    printed = apart(PREPARES, tmp_path/'alone', tmp_path/'copied', timeout=200)
    alone, copied = json.loads(printed.splitlines()[-1])
    assert alone['splits'] == dict(train=25, validation=0, test=0)
    assert alone['own'] == 25 and not alone['bridge2']
    lost = f"{shard.format('val')}, of 25 records"
    assert alone['dropped'] == {'no shard': dict(count=25, examples=[lost]*10)}
    assert copied['splits'] == dict(train=0, validation=25, test=0)
    assert (copied['kept'], copied['candidates']) == (25, 50)
    assert copied['dropped']['also in validation']['count'] == 25
    message = 'has 0 train clips where 1 are needed(.|\\n)*25 dropped: also in validation'
    with pytest.raises(ValueError, match=message):
        prepared_splits(tmp_path/'copied_out', train=1, validation=1)

def test_lerobot_teaser(tmp_path):
    "17 of 17 real trajectories; and only reasons if the videos are LFS pointers."
    source = needs_data('bridge_teaser_lerobot_v3')
    report = quiet(source, tmp_path/'out')
    assert (report['candidates'], report['kept'], report['dropped'], report['repeated']) == (17, 17, {}, 0)
    shutil.copytree(source, tmp_path/'cloned')
    video, = (tmp_path/'cloned').rglob('*.mp4')
    video.chmod(0o644)
    video.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n')
    with pytest.raises(ValueError, match='17 dropped: Git LFS pointer: run git lfs pull'):
        quiet(tmp_path/'cloned', tmp_path/'none')

def test_real_videos_and_their_folder():
    "Six files of 240×320; a folder of videos is not a data set."
    videos = sorted(needs_data('bridge_mp4').glob('*.mp4'))
    assert [read_video(v).shape[1:] for v in videos] == [(240, 320, 3)]*6
    with pytest.raises(ValueError, match='no trajectories in'): prepare(videos[0].parent, '/nowhere', SMALL)

def test_train_bridge_reports_missing_clips(tree, tmp_path):
    "No validation clips: the run ends before a model is loaded."
    quiet(tree, tmp_path/'clips', shares=(1, 0, 0))
    with pytest.raises(RuntimeError, match='clips has 0 validation clips where 1 are needed') as e:
        run_notebook('experiments/train/train_bridge', tmp_path/'run', dict(data=str(tmp_path/'clips')))
    assert not (tmp_path/'run/tiny_svd').exists()
    assert 'no test clips: whatever needs them will stop' in str(e.value)

def test_tensorflow_after_opengl_is_refused(drawn):
    "An error message in place of a crash."
    assert 'fresh process' in drawn[1]

if __name__ == '__main__':
    tree, out = map(Path, sys.argv[1:3])
    if 'moments' in sys.argv:
        ends = [fork(tree, out, m) for m in [*MOMENTS, None]]
        assert ends == [signal.SIGKILL] * len(MOMENTS) + [0], ends
    else: quiet(tree, out, run=partial(map_local, workers=2))
