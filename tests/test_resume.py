"""A run that is killed at any moment and started again ends as if nothing had happened, bit by bit.

As a script this file is one process that imports torch once and forks the runs; it computes nothing itself,
so forking is safe.
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

PARAMS = TrainParams(steps=60, batch_size=4, warmup=5, lr=0.01, checkpoint_every=3, validate_every=7,
                     ratio_every=4, cpu=True, progress=False)

class Codec(nn.Module):
    def encode(self, video): return video - video[:, :1]
    def encode_first(self, first): return first

class Denoiser(nn.Module):
    "One convolution, dropout (randomness inside the model), and a block of weights that makes files large."
    noise_aug = 0.
    def __init__(self, seed, dropout=0.1):
        super().__init__()
        torch.manual_seed(seed)
        self.net, self.rest = nn.Conv3d(3, 3, 3, padding=1), nn.Linear(64, 64)
        self.drop = nn.Dropout(dropout)
    def condition(self, prompt, first, first_latent, drop=None):
        return {'frame': first_latent[:, None] * (drop < 2).view(-1, 1, 1, 1, 1)}
    def forward(self, x, sigma, cond):
        def F_x(u, c):
            moved = self.net(self.drop(u + cond['frame']).transpose(1, 2)).transpose(1, 2)
            return moved + 1e-3*self.rest(u.new_ones(64)).mean()
        return denoise(F_x, x, sigma)

def objective(d, luck=True):
    pick = torch.randint(d.z.shape[1], (2,), generator=d.generator) if luck else [1, 3]
    error, gate = d.z_hat - d.z, (d.sigma < 2).float()
    recon, flow = error.pow(2).mean(), (gate[:, None] * error[:, pick].flatten(2).pow(2).mean(2)).mean()
    losses = Losses(recon, recon, log={'open': gate.mean(), 'flow': flow.detach()})
    return losses.add_flow(flow) if gate.any() else losses

def clips():
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (10, 4, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return ClipSet(frames, [f'clip {i}' for i in range(10)])

def go(run_dir, seed=0, params=PARAMS, luck=True):
    "A run; without `luck` nothing is random that depends on how the batch is cut: no dropout, no targets."
    def validate(ema, step):
        size = sum(p.norm() for p in ema.parameters()).item()
        return {'size': size, 'luck': torch.rand(1).item()*0}
    loss = partial(objective, luck=luck)
    train(params, run_dir, Denoiser(seed, 0.1*luck), Codec(), loss, clips(), validate)

# ---- the script

def fork(run_dir, seed=0, params=PARAMS, luck=True, death=None, **env):
    pid = os.fork()
    if pid: return pid
    code = 1
    try:
        torch.set_num_threads(1)
        os.environ.update(env)
        if death: deadly(*death)
        go(run_dir, seed, params, luck)
        code = 0
    except BaseException: traceback.print_exc()
    finally: os._exit(code)

def wait(pid): return os.waitpid(pid, 0)[1]

def lines(run_dir):
    log = run_dir/'log.jsonl'
    return log.read_bytes().count(b'\n') if log.exists() else 0

def ended(pid): return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

def killed(pid, run_dir, dice):
    "Let a run log a few lines, then kill it: in a step, between two, or while it saves. Was it still alive?"
    enough, end = lines(run_dir) + dice.randint(1, 12), time.time() + PATIENCE
    while lines(run_dir) < enough and time.time() < end and not ended(pid): time.sleep(0.002)
    time.sleep(dice.uniform(0, 0.03))
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(wait(pid))

def lives(run_dir, kills=6):
    """Spend up to `kills` lives, then let the run end.

    Each life has other initial weights, unless there is no checkpoint yet.
    """
    dice, ends = random.Random(), []
    for n in range(kills):
        pid = fork(run_dir, seed=n if checkpoints.latest_checkpoint(run_dir) else 0)
        ends.append([killed(pid, run_dir, dice), lines(run_dir)])
    return ends, wait(fork(run_dir, seed=99))

MOMENTS = {'in a file': ('save_file', 5), 'before the state': ('write_json', 2),
           'before the name': ('rename', 2), 'after the name': ('rename', -2),
           'before the oldest is deleted': ('rename', 4), 'in a line of the log': ('append_log', 8)}
OWNERS = dict(rename=Path, append_log=trainer, save_file=files)

def deadly(what, n):
    "Let the n-th call of a function that writes be the run's last: half done or not begun, or done if n < 0."
    owner, calls = OWNERS.get(what, checkpoints), iter(range(1, 10**6))
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
    whole = wait(fork(root/'whole'))
    ends, last = lives(root/'killed')
    short = dict(params=replace(PARAMS, steps=12, tensorboard=False))
    at = {moment: [wait(fork(root/moment, **short, death=death)), wait(fork(root/moment, seed=99, **short))]
          for moment, death in MOMENTS.items()}
    few = dict(params=replace(PARAMS, steps=12), luck=False)
    world = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', ACCELERATE_USE_CPU='true',
                 MASTER_PORT=str(random.randint(20000, 60000)))
    wait(fork(root/'short', **short))
    pids = [fork(root/'one', **few), *(fork(root/'two', RANK=r, LOCAL_RANK=r, **few, **world) for r in '01')]
    codes = dict(whole=whole, killed=last, ends=ends, at=at, two=[wait(pid) for pid in pids])
    (root/'codes.json').write_text(json.dumps(codes))

# ---- the tests

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp('resume')
    env = os.environ | {'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(Path(__file__).parents[1])}
    call = [sys.executable, __file__, str(root)]
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=PATIENCE)
    printed, codes = done.stderr[-3000:], root/'codes.json'
    assert codes.exists(), printed
    return root, json.loads(codes.read_text()), printed

def story(run_dir):
    "A run's log without what is measured by the clock."
    return [{k: v for k, v in line.items() if 'seconds' not in k} for line in checkpoints.read_log(run_dir)]

def same_weights(a, b):
    "Two checkpoints have the same bytes."
    for name in ('model', 'ema', 'optimizer'):
        one, other = ((folder/f'{name}.safetensors').read_bytes() for folder in (a, b))
        assert one == other, name

def test_killed_and_resumed_is_bit_exact(runs):
    root, codes, stderr = runs
    assert codes['whole'] == codes['killed'] == 0, stderr
    alive = sum(alive for alive, _ in codes['ends'])
    assert alive >= 3, f"the run ended before it was killed often: {codes['ends']}"
    a, b = (checkpoints.latest_checkpoint(root/name) for name in ('whole', 'killed'))
    assert a.name == b.name == 'step_0000060'
    same_weights(a, b)
    assert story(root/'whole') == story(root/'killed')
    state = [json.loads((c/'state.json').read_text()) for c in (a, b)]
    for s in state:
        for k in ('compute_seconds', 'validation_seconds'): s.pop(k)
    assert state[0] == state[1]

def test_nothing_is_left_behind(runs):
    root, _, _ = runs
    assert sorted(p.name for p in (root/'killed/checkpoints').iterdir()) == ['step_0000057', 'step_0000060']
    steps = [line['step'] for line in checkpoints.read_log(root/'killed', 'train')]
    assert steps == list(range(1, 61))

@pytest.mark.parametrize('moment', MOMENTS)
def test_killed_while_writing(runs, moment):
    "Killed within a checkpoint, between its parts, or in a line of the log: the same moments every time."
    root, codes, stderr = runs
    assert codes['at'][moment] == [signal.SIGKILL, 0], (codes['at'], stderr)
    same_weights(*(checkpoints.latest_checkpoint(root/name) for name in ('short', moment)))
    assert story(root/'short') == story(root/moment)
    assert not list((root/moment/'checkpoints').glob('.*'))

def test_two_processes_equal_one(runs):
    root, codes, stderr = runs
    assert codes['two'] == [0, 0, 0], stderr
    for a, b in zip(story(root/'one'), story(root/'two'), strict=True):
        assert set(a) == set(b)
        for k in {'step', 'sigma', 'open'} & {*a}: assert a[k] == b[k], k
        for k in {'loss', 'recon', 'flow', 'grad_norm', 'size'} & {*a}:
            assert a[k] == pytest.approx(b[k], rel=1e-4), (k, a, b)
    last = [checkpoints.latest_checkpoint(root/run) for run in ('one', 'two')]
    one, two = (checkpoints.load_checkpoint(folder)[0]['ema'] for folder in last)
    for k in one: torch.testing.assert_close(one[k], two[k], rtol=1e-4, atol=1e-5)

def test_full_disk_while_saving(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    short = replace(PARAMS, steps=6, tensorboard=False)
    go(tmp_path/'whole', params=short)
    go(tmp_path/'run', params=replace(short, steps=3))
    real = files.save_file
    def full(tensors, path):
        if 'ema' not in str(path): return real(tensors, path)
        Path(path).write_bytes(b'half of it')
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(files, 'save_file', full)
    with pytest.raises(OSError, match='checkpoint step_0000003 is whole; make room'):
        go(tmp_path/'run', params=short)
    assert [p.name for p in (tmp_path/'run/checkpoints').iterdir()] == ['step_0000003']
    monkeypatch.undo()
    go(tmp_path/'run', seed=7, params=short)
    def steps(name): return [line for line in story(tmp_path/name) if line['kind'] == 'train']
    assert steps('run') == steps('whole')

def test_folder_in_use_names_the_process(tmp_path):
    in_use = pytest.raises(RuntimeError, match=f'in use by process {os.getpid()}')
    with lock_run(tmp_path), in_use: go(tmp_path)

# ---- overwriting

FEW = replace(PARAMS, steps=3, tensorboard=False)
OTHER = replace(FEW, lr=1., seed=5)

class Killed(BaseException):
    "Raised in place of a kill; from then on nothing reaches the disk."

class deadly_disk:
    "Every change of the disk is counted; the n-th and all after it don't happen."
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
    def __exit__(self, kind, *_):
        self.patch.undo()
        return kind is Killed

LEFT = ('scale.json', 'samples/step_0000003/drawn.safetensors', 'cache/flow.safetensors', 'notebook.lock',
        'metrics.json')

@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A finished run with all that a run may leave, and the run that is to replace it."
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp('overwrite')
    new_run(root/'old', {'lr': FEW.lr})
    go(root/'old', params=FEW)
    go(root/'new', params=OTHER, seed=5)
    shutil.copytree(root/'old'/'checkpoints', root/'old'/'recon-0'/'checkpoints')
    for name in LEFT:
        (root/'old'/name).parent.mkdir(parents=True, exist_ok=True)
        (root/'old'/name).write_text('1')
    return root

def weights(run_dir): return (checkpoints.latest_checkpoint(run_dir)/'model.safetensors').read_bytes()

def contents(folder) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob('*') if p.name != 'lock'}

def test_overwriting_killed_at_each_step(finished, tmp_path, monkeypatch):
    """Wherever overwriting is cut short, the next start finishes it, or finds the old run untouched.

    Nothing of the old run gets into the new one.
    """
    n, alive = 0, False
    while not alive:
        n += 1
        run = tmp_path/f'{n}'
        shutil.copytree(finished/'old', run)
        with deadly_disk(monkeypatch, n):
            make_room(run, overwrite=True)
            alive = True
        begun = (run/'.going').exists() or not (run/'metrics.json').exists()
        if not begun: untouched(run, finished)
        if n % 3 == 0 or not begun: make_room(run, overwrite=True)
        if n % 3 == 1: make_room(run, overwrite=False)
        if n % 4 == 0: new_run(run, {'lr': OTHER.lr})
        if n % 3 == 2 and n % 4:
            go(run, params=OTHER, seed=5)
            assert weights(run) == weights(finished/'new') != weights(finished/'old')
        overwritten(run, finished)
        shutil.rmtree(run)
    assert n > 20, 'overwriting has so many steps'

def untouched(run, finished):
    "Overwriting was killed before it began: the old run is whole, and protected."
    assert contents(run) == contents(finished/'old')
    with pytest.raises(FileExistsError, match='holds a finished run'): make_room(run, overwrite=False)
    with pytest.raises(ValueError, match='train.lr: 0.01 → 1.0'): go(run, params=OTHER, seed=5)

def overwritten(run, finished):
    "Nothing of the old run is left, and no parameter of it."
    assert not contents(run) - contents(finished/'new') - {'notebook.lock', 'versions.json'}
    assert not (run/'metrics.json').exists()
    params = files.read_json(run/'params.json') if (run/'params.json').exists() else {}
    assert params.get('experiment', {'lr': OTHER.lr}) == {'lr': OTHER.lr}

def test_old_checkpoints_under_new_parameters_are_refused(finished, tmp_path):
    "What an interrupted overwriting of an earlier version left; the parameters deleted, or copied by hand."
    for name in ('deleted', 'copied'):
        shutil.copytree(finished/'old', tmp_path/name)
        (tmp_path/name/'params.json').unlink()
        if name == 'copied': shutil.copy(finished/'new'/'params.json', tmp_path/name)
        with pytest.raises(ValueError, match='train.lr: 0.01 → 1.0; train.seed: 0 → 5'):
            go(tmp_path/name, params=OTHER, seed=5)
        assert weights(tmp_path/name) == weights(finished/'old')
    go(tmp_path/'deleted', params=replace(FEW, steps=4, checkpoint_every=1, keep=1), seed=9)
    assert checkpoints.latest_checkpoint(tmp_path/'deleted').name == 'step_0000004'

# ---- damage and strays

TORN = {'inside a letter': b'{"kind": "validation", "note": "\xcf', 'zeros': b'\0'*100,
        'half a line and zeros': b'{"kind"\0\0\n', 'a line in a torn one': b'{"kind": "tr{"step": 9}\n',
        'nonsense': b'{"ki\n{"step": 9}\n'}

@pytest.mark.filterwarnings('ignore')     # that a line is left out
@pytest.mark.parametrize('end', TORN)
def test_continues_after_a_torn_log(finished, tmp_path, end):
    shutil.copytree(finished/'old', tmp_path/'run')
    with (tmp_path/'run'/'log.jsonl').open('ab') as f: f.write(TORN[end])
    go(tmp_path/'run', params=replace(FEW, steps=4))
    assert [l['step'] for l in checkpoints.read_log(tmp_path/'run', 'train')] == [1, 2, 3, 4]
    assert story(tmp_path/'run')[:4] == story(finished/'old')[:4]

def test_strays_hinder_no_run(finished, tmp_path):
    "What file managers, network disks and people leave among checkpoints is neither deleted nor read."
    folder = tmp_path/'run'/'checkpoints'
    folder.mkdir(parents=True)
    strays = ('.DS_Store', '.nfs00000001', '.gitkeep', 'step_0000100', 'step_0000002.copy', '._step_0000003')
    for name in strays: (folder/name).write_text('not ours')
    go(tmp_path/'run', params=replace(FEW, checkpoint_every=1, keep=1))
    assert {p.name for p in folder.iterdir()} == {*strays, 'step_0000003'}
    assert weights(tmp_path/'run') == weights(finished/'old')

def test_tensors_are_read_in_one_place():
    "`files.read_tensors` copies; a tensor that stays mapped to a file is lost with the file."
    package = Path(files.__file__).parents[1]
    readers = [p.relative_to(package) for p in package.rglob('*.py') if 'load_file(' in p.read_text()]
    assert readers == [Path('basics/files.py')]

if __name__ == '__main__': script(Path(sys.argv[1]))
