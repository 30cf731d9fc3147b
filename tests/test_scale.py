"Many processes, sharded weights and a requested end: the same training as one process alone."
import json, os, random, re, signal, subprocess, sys, time
from dataclasses import replace
from functools import partial
from pathlib import Path
import pytest, torch
from conftest import PATIENCE
from flowloss_nb.training import checkpoints
from test_resume import PARAMS, fork, go, story

ROOT = Path(__file__).parents[1]
HANGS = 900     # Seconds; processes that wait for each other forever would use up PATIENCE
FEW = replace(PARAMS, steps=20, tensorboard=False, ratio_every=2, validate_every=10, checkpoint_every=10)

PATHS = dict(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT/'tests')]))
PROGRAM = """import torch
torch.set_num_threads(1)
from test_scale import *
go(Path(sys.argv[1]), params=replace(FEW, **json.loads(sys.argv[2])), luck=False)"""

def two(folder, params, **env):
    """The run in two processes; what the first one printed.

    Each has its own interpreter: sharding starts threads, which do not survive a fork.
    """
    port = str(random.randint(20000, 60000))
    world = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    env = os.environ | PATHS | world | dict(ACCELERATE_USE_CPU='true') | env
    call = [sys.executable, '-c', PROGRAM, str(folder), json.dumps(params)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    both = [subprocess.Popen(call, env=env | dict(RANK=r, LOCAL_RANK=r), **pipes) for r in '01']
    try: (printed, first), (_, second) = [p.communicate(timeout=HANGS) for p in both]
    finally:
        for p in both: p.kill()
    assert [p.returncode for p in both] == [0, 0], first[-2000:] + second[-2000:]
    return printed

def weights(folder): return checkpoints.load_checkpoint(checkpoints.latest_checkpoint(folder))[0]

@pytest.fixture(scope='module')
def one(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('one')
    go(folder, params=FEW, luck=False)
    return folder

def test_sharded_equals_whole(one, tmp_path):
    """Two processes that hold half of every weight, gradient and moment each; their checkpoint is whole.

    A gate may be open on one of them and not on the other: no ratio is measured, which would wait forever.
    """
    assert two(tmp_path, dict(fsdp=True)).count('the gradient ratio flow / recon is not measured') == 1
    assert any('ratio' in line for line in story(one))
    assert not any('ratio' in line for line in story(tmp_path))
    a, b = weights(one), weights(tmp_path)
    assert {k: set(v) for k, v in a.items()} == {k: set(v) for k, v in b.items()}
    for part in ('model', 'ema'):
        for k in a[part]: torch.testing.assert_close(a[part][k], b[part][k], rtol=0, atol=1e-5)
    for x, y in zip(story(one), story(tmp_path), strict=True):
        for k in {'loss', 'recon', 'flow', 'grad_norm', 'size'} & {*x}:
            assert x[k] == pytest.approx(y[k], rel=1e-4), (k, x, y)

def test_sharded_continues_a_run_of_one(one, tmp_path):
    "Ten steps in one process, ten more in two with sharded weights: as twenty in one."
    go(tmp_path, params=replace(FEW, steps=10), luck=False)
    two(tmp_path, dict(fsdp=True))
    resumed = weights(tmp_path)['ema']
    for k, v in weights(one)['ema'].items(): torch.testing.assert_close(v, resumed[k], rtol=0, atol=1e-5)

SLOW = """import json, sys, time
import test_resume
from functools import partial
from test_resume import *
FEW = replace(PARAMS, steps=2, validate_every=1, checkpoint_every=2, ratio_every=0, tensorboard=False)
SET = dict(GRADIENT_ACCUMULATION_STEPS='4', MIXED_PRECISION='bf16', DYNAMO_BACKEND='INDUCTOR',
           GRADIENT_CLIPPING='0.01', DOWNCAST_BF16='true')
def validate(ema, step):
    time.sleep(4)
    return {}
def slow(run_dir, seed, params, luck):
    train(params, run_dir, Denoiser(seed, 0.), Codec(), partial(objective, luck=False), clips(), validate)
def pair(folder, **changes):
    two = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
               MASTER_PORT=str(random.randint(20000, 60000)))
    return [fork(folder, params=replace(FEW, **changes), RANK=r, LOCAL_RANK=r, **two) for r in '01']
def wait(*pids): return [os.waitid(os.P_PID, pid, os.WEXITED).si_status for pid in pids]
def alone(name, **values):
    return wait(fork(root/name, params=FEW, **{f'ACCELERATE_{k}': v for k, v in values.items()}))
root = Path(sys.argv[1])
codes = dict(plain=alone('plain'), set=alone('set', **SET), refused=alone('refused', USE_FSDP='true'))
test_resume.go = slow
codes |= dict(patient=wait(*pair(root/'patient')), hasty=wait(*pair(root/'hasty', patience=1/60)))
print(json.dumps(codes))"""

@pytest.fixture(scope='module')
def forks(tmp_path_factory):
    "Short runs in processes forked from one that has imported everything: exit codes by folder."
    root = tmp_path_factory.mktemp('forks')
    call = [sys.executable, '-c', SLOW, str(root)]
    done = subprocess.run(call, env=os.environ | PATHS, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, json.loads(done.stdout.splitlines()[-1]), done.stderr

def test_the_environment_changes_nothing(forks):
    "Accelerate's variables for accumulation, precision, compilation change nothing; an engine is refused."
    root, codes, printed = forks
    assert (codes['plain'], codes['set'], codes['refused']) == ([0], [0], [1]), printed[-3000:]
    assert story(root/'set') == story(root/'plain')
    assert len(story(root/'plain')) == 4
    assert 'ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 is' in printed
    assert 'the environment sets ACCELERATE_USE_FSDP=true' in printed

def test_a_long_validation_is_waited_for(forks):
    "One process validates for four seconds; the other waits, at most `patience` minutes, here a second."
    root, codes, printed = forks
    assert codes['patient'] == [0, 0], printed[-3000:]
    assert checkpoints.latest_checkpoint(root/'patient').name == 'step_0000002'
    assert codes['hasty'] != [0, 0]

def logged(folder) -> list[int]:
    "The steps in a run's log, if it has one."
    if not (folder/'log.jsonl').exists(): return []
    return [line['step'] for line in checkpoints.read_log(folder, 'train')]

def test_a_run_saves_before_it_ends(tmp_path):
    "SIGTERM or Ctrl-C to the command: a checkpoint, one line, code 143 or 130; the same command continues."
    command = [sys.executable, '-m', 'flowloss_nb.runs', 'experiments/train/train', str(tmp_path)]
    for word in ('steps=100000', 'validate_every=0', 'clips=2'): command += ['-p', word]
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)     # in the background Ctrl-C is ignored
    for sent, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        done, end = len(logged(tmp_path)), time.time() + PATIENCE
        p = subprocess.Popen(command, env=os.environ | PATHS, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                             preexec_fn=heed)
        while len(logged(tmp_path)) <= done + 2:
            assert p.poll() is None and time.time() < end, p.stderr.read()[-2000:]
            time.sleep(.5)
        p.send_signal(sent)
        printed = p.communicate(timeout=PATIENCE)[1]
        assert p.returncode == code, printed[-2000:]
        assert re.search('the checkpoint in .* is whole', printed), printed[-2000:]
        assert 'Traceback' not in printed
        assert printed.count('\n') < 5
        last = int(checkpoints.latest_checkpoint(tmp_path).name[5:])
        assert logged(tmp_path) == list(range(1, last + 1))
        assert not list((tmp_path/'checkpoints').glob('.*'))
