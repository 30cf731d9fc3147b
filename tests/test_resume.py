"""A run that is killed at any moment and started again ends as if nothing had happened, bit by bit.

As a script this file is the one process that imports torch once and forks the runs; it computes nothing itself, so forking is safe.
"""
import errno, json, os, random, shutil, signal, subprocess, sys, time, traceback
from dataclasses import replace
from functools import partial
from pathlib import Path
import pytest, torch
from conftest import PATIENCE
from torch import nn
from flowloss_nb.basics import files
from flowloss_nb.basics.clips import ClipSet
from flowloss_nb.basics.folders import lock_run
from flowloss_nb.diffusion.edm import denoise
from flowloss_nb.training.losses import Losses
from flowloss_nb.training.step import TrainParams
from flowloss_nb.training.trainer import train
from flowloss_nb.runs.runs import make_room, new_run
from flowloss_nb.training import checkpoints, trainer

PARAMS = TrainParams(steps=60, batch_size=4, warmup=5, lr=0.01, checkpoint_every=3, validate_every=7, ratio_every=4,
                     cpu=True, progress=False)

class Codec(nn.Module):
    def encode(self, video): return video - video[:, :1]
    def encode_first(self, first): return first

class Denoiser(nn.Module):
    "One convolution, a dropout layer (randomness inside the model), and a block of weights that makes files large."
    noise_aug = 0.
    def __init__(self, seed, dropout=0.1):
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.rest = nn.Conv3d(3, 3, 3, padding=1), nn.Linear(64, 64)
        self.drop = nn.Dropout(dropout)
    def condition(self, prompt, first, first_latent, drop=None): return {'frame': first_latent[:, None] * (drop < 2).view(-1, 1, 1, 1, 1)}
    def forward(self, x, sigma, cond):
        F_x = lambda u, c: self.net(self.drop(u + cond['frame']).transpose(1, 2)).transpose(1, 2) + 1e-3*self.rest(u.new_ones(64)).mean()
        return denoise(F_x, x, sigma)

def objective(d, luck=True):
    pick = torch.randint(d.z.shape[1], (2,), generator=d.generator) if luck else [1, 3]
    error, gate = d.z_hat - d.z, (d.sigma < 2).float()
    recon, flow = error.pow(2).mean(), (gate[:, None] * error[:, pick].flatten(2).pow(2).mean(2)).mean()
    losses = Losses(recon, recon, log={'open': gate.mean(), 'flow': flow.detach()})
    return losses.add_flow(flow) if gate.any() else losses

def clips():
    frames = torch.randint(256, (10, 4, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ClipSet(frames, [f'clip {i}' for i in range(10)])

def go(run_dir, seed=0, params=PARAMS, luck=True):
    "A run; without `luck` nothing is drawn that depends on how the batch is cut: no dropout, no target frames."
    validate = lambda ema, step: {'size': sum(p.norm() for p in ema.parameters()).item(), 'luck': torch.rand(1).item()*0}
    train(params, run_dir, Denoiser(seed, 0.1*luck), Codec(), partial(objective, luck=luck), clips(), validate=validate)

# ---- the script

def fork(run_dir, seed=0, params=PARAMS, luck=True, death=None, **env):
    pid = os.fork()
    if pid: return pid
    code = 1
    try: torch.set_num_threads(1); os.environ.update(env); death and deadly(*death); go(run_dir, seed, params, luck); code = 0
    except BaseException: traceback.print_exc()
    finally: os._exit(code)

def lines(run_dir): return (run_dir/'log.jsonl').read_bytes().count(b'\n') if (run_dir/'log.jsonl').exists() else 0

def killed(pid, run_dir, dice):
    "Let a run write a few lines, then kill it: in a step, between two, or while it saves. Tells whether it was still alive."
    enough, end = lines(run_dir) + dice.randint(1, 12), time.time() + PATIENCE
    while lines(run_dir) < enough and time.time() < end and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT): time.sleep(0.002)
    time.sleep(dice.uniform(0, 0.03)); os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

def lives(run_dir, kills=6):
    "Spend up to `kills` lives, then let the run end. Weights to begin with differ from life to life unless no checkpoint is there yet."
    dice, ends = random.Random(), []
    for n in range(kills):
        ends.append([killed(fork(run_dir, seed=n if checkpoints.latest_checkpoint(run_dir) else 0), run_dir, dice), lines(run_dir)])
    return ends, os.waitpid(fork(run_dir, seed=99), 0)[1]

MOMENTS = {'in a file': ('save_file', 5), 'before the state': ('write_json', 2), 'before the name': ('rename', 2), 'after the name': ('rename', -2),
           'before the oldest goes': ('rename', 4), 'in a line of the log': ('append_log', 8)}

def deadly(what, n):
    "Let the n-th call of a function that writes be the run's last: half done or not begun, or done if n is negative."
    owner, calls = dict(rename=Path, append_log=trainer, save_file=files).get(what, checkpoints), iter(range(1, 10**6))
    real = getattr(owner, what)
    def call(*a):
        if next(calls) != abs(n): return real(*a)
        if n < 0: real(*a)
        elif what == 'save_file': Path(a[1]).write_bytes(b'half of it')
        elif what == 'append_log': a[0].write_text(a[0].read_text() + '{"kind": "tr')
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, what, call)

def script(root):
    import torch._dynamo # the first optimiser imports it: once here, not in every life
    whole = os.waitpid(fork(root/'whole'), 0)[1]
    ends, last = lives(root/'killed')
    short = dict(params=replace(PARAMS, steps=12, tensorboard=False))
    wait = lambda pid: os.waitpid(pid, 0)[1]
    at = {moment: [wait(fork(root/moment, **short, death=death)), wait(fork(root/moment, seed=99, **short))] for moment, death in MOMENTS.items()}
    few = dict(params=replace(PARAMS, steps=12), luck=False)
    two = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(random.randint(20000, 60000)), ACCELERATE_USE_CPU='true')
    wait(fork(root/'short', **short))
    pids = [fork(root/'one', **few)] + [fork(root/'two', RANK=str(r), LOCAL_RANK=str(r), **few, **two) for r in range(2)]
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    (root/'told.json').write_text(json.dumps({'whole': whole, 'killed': last, 'ends': ends, 'at': at, 'two': codes}))

# ---- the tests

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp('resume')
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, __file__, str(root)], env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert (root/'told.json').exists(), done.stderr[-3000:]
    return root, json.loads((root/'told.json').read_text()), done.stderr[-3000:]

def story(run_dir): return [{k: v for k, v in line.items() if 'seconds' not in k} for line in checkpoints.read_log(run_dir)]

def test_killed_and_resumed_is_bit_exact(runs):
    root, told, stderr = runs
    assert told['whole'] == told['killed'] == 0, stderr
    assert sum(alive for alive, _ in told['ends']) >= 3, f"the run ended before it was killed often: {told['ends']}"
    a, b = (checkpoints.latest_checkpoint(root/name) for name in ('whole', 'killed'))
    assert a.name == b.name == 'step_0000060'
    for name in ('model', 'ema', 'optimizer'): assert (a/f'{name}.safetensors').read_bytes() == (b/f'{name}.safetensors').read_bytes(), name
    assert story(root/'whole') == story(root/'killed')
    state = [json.loads((c/'state.json').read_text()) for c in (a, b)]
    for s in state: s.pop('compute_seconds')
    assert state[0] == state[1]

def test_nothing_is_left_behind(runs):
    root, _, _ = runs
    assert sorted(p.name for p in (root/'killed/checkpoints').iterdir()) == ['step_0000057', 'step_0000060']
    steps = [line['step'] for line in checkpoints.read_log(root/'killed', 'train')]
    assert steps == list(range(1, 61))

@pytest.mark.parametrize('moment', MOMENTS)
def test_killed_while_writing(runs, moment):
    "Killed in the middle of a checkpoint, between its parts, or in a line of the log; the same moments every time."
    root, told, stderr = runs
    assert told['at'][moment] == [signal.SIGKILL, 0], (told['at'], stderr)
    a, b = (checkpoints.latest_checkpoint(root/name) for name in ('short', moment))
    for name in ('model', 'ema', 'optimizer'): assert (a/f'{name}.safetensors').read_bytes() == (b/f'{name}.safetensors').read_bytes(), name
    assert story(root/'short') == story(root/moment)
    assert not list((root/moment/'checkpoints').glob('.*'))

def test_two_processes_equal_one(runs):
    root, told, stderr = runs
    assert told['two'] == [0, 0, 0], stderr
    for a, b in zip(story(root/'one'), story(root/'two'), strict=True):
        assert set(a) == set(b) and a['step'] == b['step']
        if a['kind'] == 'train': assert a['sigma'] == b['sigma'] and a['open'] == b['open']
        for k in {'loss', 'recon', 'flow', 'grad_norm', 'size'} & {*a}: assert a[k] == pytest.approx(b[k], rel=1e-4), (k, a, b)
    one, two = (checkpoints.load_checkpoint(checkpoints.latest_checkpoint(root/run))[0]['ema'] for run in ('one', 'two'))
    for k in one: torch.testing.assert_close(one[k], two[k], rtol=1e-4, atol=1e-5)

def test_full_disk_while_saving(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    short = replace(PARAMS, steps=6, tensorboard=False)
    go(tmp_path/'whole', params=short)
    go(tmp_path/'run', params=replace(short, steps=3))
    real = files.save_file
    def full(tensors, path):
        if 'ema' in str(path): Path(path).write_bytes(b'half of it'); raise OSError(errno.ENOSPC, 'No space left on device')
        real(tensors, path)
    monkeypatch.setattr(files, 'save_file', full)
    with pytest.raises(OSError, match='checkpoint step_0000003 is whole; make room'): go(tmp_path/'run', params=short)
    assert [p.name for p in (tmp_path/'run/checkpoints').iterdir()] == ['step_0000003']
    monkeypatch.undo()
    go(tmp_path/'run', seed=7, params=short)
    train_lines = lambda name: [l for l in story(tmp_path/name) if l['kind'] == 'train']
    assert train_lines('run') == train_lines('whole')

def test_folder_in_use_names_the_process(tmp_path):
    with lock_run(tmp_path), pytest.raises(RuntimeError, match=f'in use by process {os.getpid()}'): go(tmp_path)

# ---- overwriting

FEW = replace(PARAMS, steps=3, tensorboard=False)
OTHER = replace(FEW, lr=1., seed=5)

class Killed(BaseException): "Raised in place of a kill; from then on nothing reaches the disk."

class deadly_disk:
    "Every step on the disk counts; the n-th and all after it don't happen."
    STEPS = ('rename', 'replace', 'mkdir', 'unlink', 'rmdir')
    def __init__(self, monkeypatch, n): self.patch, self.n, self.done = monkeypatch, n, 0
    def __enter__(self):
        for name in self.STEPS: self.patch.setattr(os, name, self.counted(getattr(os, name)))
        return self
    def counted(self, real):
        def call(*a, **k):
            self.done += 1
            if self.done >= self.n: raise Killed
            return real(*a, **k)
        return call
    def __exit__(self, kind, *_): self.patch.undo(); return kind is Killed

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A finished run with all that a run may leave, and what the run that shall take its place ends with."
    torch.set_num_threads(1); root = tmp_path_factory.mktemp('overwrite')
    new_run(root/'old', {'lr': FEW.lr}); go(root/'old', params=FEW); go(root/'new', params=OTHER, seed=5)
    shutil.copytree(root/'old'/'checkpoints', root/'old'/'recon-0'/'checkpoints')
    for name in ('scale.json', 'samples/step_0000003/drawn.safetensors', 'cache/flow.safetensors', 'notebook.lock', 'metrics.json'):
        (root/'old'/name).parent.mkdir(parents=True, exist_ok=True); (root/'old'/name).write_text('1')
    return root

def weights(run_dir): return (checkpoints.latest_checkpoint(run_dir)/'model.safetensors').read_bytes()

def test_overwriting_killed_at_each_step(finished, tmp_path, monkeypatch):
    "Whenever overwriting is cut short, the next start finishes it, or finds the old run untouched; nothing of the old run gets into the new one."
    n, alive = 0, False
    names = lambda at: {str(p.relative_to(at)) for p in at.rglob('*') if p.name != 'lock'}
    while not alive:
        n += 1; run = tmp_path/f'{n}'; shutil.copytree(finished/'old', run)
        with deadly_disk(monkeypatch, n): make_room(run, overwrite=True); alive = True
        begun = (run/'.going').exists() or not (run/'metrics.json').exists()
        if not begun:
            assert names(run) == names(finished/'old'), 'killed before it began: the old run is whole'
            with pytest.raises(FileExistsError, match='holds a finished run'): make_room(run, overwrite=False)
            with pytest.raises(ValueError, match='train.lr: 0.01 → 1.0'): go(run, params=OTHER, seed=5)
        if n % 3 == 0 or not begun: make_room(run, overwrite=True)
        if n % 3 == 1: make_room(run, overwrite=False)
        if n % 4 == 0: new_run(run, {'lr': OTHER.lr})
        if n % 3 == 2 and n % 4: go(run, params=OTHER, seed=5); assert weights(run) == weights(finished/'new') != weights(finished/'old')
        left = names(run) - names(finished/'new') - {'notebook.lock', 'versions.json'}
        assert not left and not (run/'metrics.json').exists(), (n, left)
        if (run/'params.json').exists(): assert 'experiment' not in (told := files.read_json(run/'params.json')) or told['experiment'] == {'lr': OTHER.lr}
        shutil.rmtree(run)
    assert n > 20, 'so many steps were there'

def test_old_checkpoints_under_new_parameters_are_refused(finished, tmp_path):
    "What an interrupted overwriting of an earlier version left; deleted or copied by hand."
    for name, spoil in {'deleted': lambda p: p.unlink(), 'lies': lambda p: p.write_text((finished/'new'/'params.json').read_text())}.items():
        shutil.copytree(finished/'old', tmp_path/name); spoil(tmp_path/name/'params.json')
        with pytest.raises(ValueError, match='train.lr: 0.01 → 1.0; train.seed: 0 → 5'): go(tmp_path/name, params=OTHER, seed=5)
        assert weights(tmp_path/name) == weights(finished/'old')
    go(tmp_path/'deleted', params=replace(FEW, steps=4, checkpoint_every=1, keep=1), seed=9)
    assert checkpoints.latest_checkpoint(tmp_path/'deleted').name == 'step_0000004'

# ---- what else lies there

TORN = {'inside a letter': b'{"kind": "validation", "note": "\xcf', 'zeros': b'\0'*100, 'half a line and zeros': b'{"kind"\0\0\n', 'a line in a torn one': b'{"kind": "tr{"step": 9}\n', 'nonsense': b'{"ki\n{"step": 9}\n'}

@pytest.mark.filterwarnings('ignore:.*is left out')
@pytest.mark.parametrize('end', TORN)
def test_goes_on_after_a_torn_log(finished, tmp_path, end):
    shutil.copytree(finished/'old', tmp_path/'run')
    with (tmp_path/'run'/'log.jsonl').open('ab') as f: f.write(TORN[end])
    go(tmp_path/'run', params=replace(FEW, steps=4))
    assert [l['step'] for l in checkpoints.read_log(tmp_path/'run', 'train')] == [1, 2, 3, 4]
    assert story(tmp_path/'run')[:4] == story(finished/'old')[:4]

def test_strays_hinder_no_run(finished, tmp_path):
    "What file managers, network disks and people leave among checkpoints is neither deleted nor read."
    folder = tmp_path/'run'/'checkpoints'; folder.mkdir(parents=True)
    strays = ('.DS_Store', '.nfs00000001', '.gitkeep', 'step_0000100', 'step_0000002.copy', '._step_0000003')
    for name in strays: (folder/name).write_text('not ours')
    go(tmp_path/'run', params=replace(FEW, checkpoint_every=1, keep=1))
    assert {p.name for p in folder.iterdir()} == {*strays, 'step_0000003'} and weights(tmp_path/'run') == weights(finished/'old')

def test_tensors_are_read_in_one_place():
    "`files.read_tensors` copies; a tensor that stays mapped to a file is lost with the file."
    found = [p.name for p in Path(files.__file__).parents[1].rglob('*.py') if 'load_file(' in p.read_text()]
    assert found == ['files.py']

if __name__ == '__main__': script(Path(sys.argv[1]))
