"Many processes, sharded weights, and an end that is asked for: the same training as one process alone."
import os, random, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import pytest, torch
from flowloss_nb import records
from test_resume import PARAMS, fork, go, story

ROOT = Path(__file__).parents[1]
FEW = replace(PARAMS, steps=20, tensorboard=False, ratio_every=0, validate_every=10, checkpoint_every=10)

def two(folder, params, **env):
    "The run in two processes, each with its own interpreter (sharding starts threads, which do not survive a fork)."
    port = str(random.randint(20000, 60000))
    env = os.environ | dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port, ACCELERATE_USE_CPU='true', OMP_NUM_THREADS='1',
                            PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT/'tests')])) | env
    program = f'import torch; torch.set_num_threads(1)\nfrom test_scale import *\ngo({str(folder)!r}, params=replace(FEW, **{params!r}), luck=False)'
    both = [subprocess.Popen([sys.executable, '-c', f'from pathlib import Path\n{program.replace(repr(str(folder)), f"Path({str(folder)!r})")}'], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)),
                             stderr=subprocess.PIPE, text=True) for r in range(2)]
    told = [p.communicate(timeout=120)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], told[0][-2000:] + told[1][-2000:]

def weights(folder): return records.load_checkpoint(records.latest_checkpoint(folder))[0]

@pytest.fixture(scope='module')
def one(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp('one')
    go(folder, params=FEW, luck=False)
    return folder

def test_sharded_equals_whole(one, tmp_path):
    "Two processes that hold half of every weight, gradient and moment each; their checkpoint is whole."
    two(tmp_path, dict(fsdp=True))
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

def test_a_run_that_is_asked_to_end_saves(tmp_path):
    "SIGTERM to the command, which runs a notebook in a kernel: a checkpoint, one line, code 143; the same command goes on."
    command = [sys.executable, '-m', 'flowloss_nb.runs', 'experiments/train', str(tmp_path), '-p', 'steps=100000', '-p', 'validate_every=0', '-p', 'clips=2']
    p = subprocess.Popen(command, env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT)), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.time() + 150
    while not ((tmp_path/'log.jsonl').exists() and len(records.read_log(tmp_path)) > 2):
        assert p.poll() is None and time.time() < end, p.stderr.read()[-2000:]
        time.sleep(.5)
    p.send_signal(signal.SIGTERM)
    told = p.communicate(timeout=60)[1]
    assert p.returncode == 143 and 'the checkpoint in' in told and 'is whole' in told, told[-2000:]
    last = records.latest_checkpoint(tmp_path)
    assert int(last.name[5:]) == records.read_log(tmp_path, 'train')[-1]['step'] and not list((tmp_path/'checkpoints').glob('.*'))
