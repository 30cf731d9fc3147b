"Many processes, sharded weights, and an end that is asked for: the same training as one process alone."
import json, os, random, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import pytest, torch
from conftest import PATIENCE
from flowloss_nb.training import checkpoints
from test_resume import PARAMS, fork, go, story

ROOT = Path(__file__).parents[1]
HANGS = 900     # Seconds: processes that wait for each other forever would use up PATIENCE
FEW = replace(PARAMS, steps=20, tensorboard=False, ratio_every=2, validate_every=10, checkpoint_every=10)

def two(folder, params, **env):
    "The run in two processes, each with its own interpreter (sharding starts threads, which do not survive a fork); what the first one printed."
    port = str(random.randint(20000, 60000))
    env = os.environ | dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port, ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1',
                            PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT/'tests')])) | env
    program = f'import torch; torch.set_num_threads(1)\nfrom test_scale import *\ngo({str(folder)!r}, params=replace(FEW, **{params!r}), luck=False)'
    both = [subprocess.Popen([sys.executable, '-c', f'from pathlib import Path\n{program.replace(repr(str(folder)), f"Path({str(folder)!r})")}'], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)),
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    try: told = [p.communicate(timeout=HANGS) for p in both]
    finally: [p.kill() for p in both]
    assert [p.returncode for p in both] == [0, 0], told[0][1][-2000:] + told[1][1][-2000:]
    return told[0][0]

def weights(folder): return checkpoints.load_checkpoint(checkpoints.latest_checkpoint(folder))[0]

@pytest.fixture(scope='module')
def one(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('one')
    go(folder, params=FEW, luck=False)
    return folder

def test_sharded_equals_whole(one, tmp_path):
    "Two processes that hold half of every weight, gradient and moment each; their checkpoint is whole. Gates open on one and not on the other: no ratio is measured, which would wait forever."
    assert two(tmp_path, dict(fsdp=True)).count('the gradient ratio flow / recon is not measured') == 1
    assert any('ratio' in line for line in story(one)) and not any('ratio' in line for line in story(tmp_path))
    a, b = weights(one), weights(tmp_path)
    assert {k: set(v) for k, v in a.items()} == {k: set(v) for k, v in b.items()}
    for part in ('model', 'ema'):
        for k in a[part]: torch.testing.assert_close(a[part][k], b[part][k], rtol=0, atol=1e-5)
    for x, y in zip(story(one), story(tmp_path), strict=True):
        for k in {'loss', 'recon', 'flow', 'grad_norm', 'size'} & {*x}: assert x[k] == pytest.approx(y[k], rel=1e-4), (k, x, y)

def test_sharded_goes_on_where_one_left_off(one, tmp_path):
    "Ten steps in one process, ten more in two with sharded weights: as twenty in one."
    go(tmp_path, params=replace(FEW, steps=10), luck=False)
    two(tmp_path, dict(fsdp=True))
    for k, v in weights(one)['ema'].items(): torch.testing.assert_close(v, weights(tmp_path)['ema'][k], rtol=0, atol=1e-5)

SLOW = """import json, sys, time
import test_resume
from functools import partial
from test_resume import *
FEW = replace(PARAMS, steps=2, validate_every=1, checkpoint_every=2, ratio_every=0, tensorboard=False)
def validate(ema, step): time.sleep(4); return {}
def slow(run_dir, seed, params, luck): train(params, run_dir, Denoiser(seed, 0.), Codec(), partial(objective, luck=False), clips(), validate)
plain = partial(test_resume.go)
def pair(folder, **changes):
    two = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(random.randint(20000, 60000)))
    return [fork(folder, params=replace(FEW, **changes), RANK=str(r), LOCAL_RANK=str(r), **two) for r in range(2)]
wait = lambda pids: [os.waitid(os.P_PID, pid, os.WEXITED).si_status for pid in pids]
root, said = Path(sys.argv[1]), {'GRADIENT_ACCUMULATION_STEPS': '4', 'MIXED_PRECISION': 'bf16', 'DYNAMO_BACKEND': 'INDUCTOR', 'GRADIENT_CLIPPING': '0.01', 'DOWNCAST_BF16': 'true'}
env = lambda said: {f'ACCELERATE_{k}': v for k, v in said.items()}
codes = dict(plain=wait([fork(root/'plain', params=FEW)]), said=wait([fork(root/'said', params=FEW, **env(said))]), refused=wait([fork(root/'refused', params=FEW, **env({'USE_FSDP': 'true'}))]))
test_resume.go = slow
codes |= dict(patient=wait(pair(root/'patient')), hasty=wait(pair(root/'hasty', patience=1/60)))
print(json.dumps(codes))"""

@pytest.fixture(scope='module')
def forks(tmp_path_factory):
    "Short runs in processes forked from one that has imported everything: exit codes by folder."
    root = tmp_path_factory.mktemp('forks')
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT/'tests')]))
    done = subprocess.run([sys.executable, '-c', SLOW, str(root)], env=env, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, json.loads(done.stdout.splitlines()[-1]), done.stderr

def test_the_environment_changes_nothing(forks):
    "Gradient accumulation, precision, compilation as variables of accelerate: the same run to the bit; another engine is refused."
    root, codes, said = forks
    assert (codes['plain'], codes['said'], codes['refused']) == ([0], [0], [1]), said[-3000:]
    assert story(root/'said') == story(root/'plain') and len(story(root/'plain')) == 4
    assert 'ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 is not heeded' in said and 'the environment sets ACCELERATE_USE_FSDP=true' in said

def test_a_long_validation_is_waited_for(forks):
    "One process validates for four seconds; the other waits for it, or gives up after `patience` minutes, here a second."
    root, codes, said = forks
    assert codes['patient'] == [0, 0] and checkpoints.latest_checkpoint(root/'patient').name == 'step_0000002', said[-3000:]
    assert codes['hasty'] != [0, 0]

def test_a_run_that_is_asked_to_end_saves(tmp_path):
    "SIGTERM or Ctrl-C to the command, which runs a notebook in a kernel: a checkpoint, one line, code 143 or 130; the same command goes on."
    command = [sys.executable, '-m', 'flowloss_nb.runs', 'experiments/train/train', str(tmp_path), '-p', 'steps=100000', '-p', 'validate_every=0', '-p', 'clips=2']
    for asks, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        done, end = len(checkpoints.read_log(tmp_path)) if (tmp_path/'log.jsonl').exists() else 0, time.time() + PATIENCE
        p = subprocess.Popen(command, env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)), cwd=ROOT, stderr=subprocess.PIPE, text=True,
                             preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))   # in the background Ctrl-C is ignored
        while not ((tmp_path/'log.jsonl').exists() and len(checkpoints.read_log(tmp_path)) > done + 2):
            assert p.poll() is None and time.time() < end, p.stderr.read()[-2000:]
            time.sleep(.5)
        p.send_signal(asks)
        told = p.communicate(timeout=PATIENCE)[1]
        assert p.returncode == code and 'the checkpoint in' in told and 'is whole' in told and 'Traceback' not in told and told.count('\n') < 5, told[-2000:]
        last = checkpoints.latest_checkpoint(tmp_path)
        assert int(last.name[5:]) == checkpoints.read_log(tmp_path, 'train')[-1]['step'] and not list((tmp_path/'checkpoints').glob('.*'))
    assert [line['step'] for line in checkpoints.read_log(tmp_path, 'train')] == list(range(1, int(last.name[5:]) + 1))
