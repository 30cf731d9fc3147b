"A sweep on a Ray cluster of two nodes, one worker of which is killed in the middle of a run."
import json, os, signal, time
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
import torch
from conftest import PATIENCE, needs_system
from flowloss_nb.training import checkpoints
from flowloss_nb.runs.sweeps import sweep

ROOT = Path(__file__).parents[1]
PARAMETERS = '''run_dir = 'x'  # Folder
seed = 0  # Of the weights
steps = 10  # Steps'''
IMPORTS = '''from pathlib import Path
import time, torch
from torch import nn
from flowloss_nb.basics.clips import ClipSet
from flowloss_nb.basics.files import write_json
from flowloss_nb.diffusion.edm import denoise
from flowloss_nb.training.losses import Losses
from flowloss_nb.training.step import TrainParams
from flowloss_nb.training.trainer import train'''
TRAINING = '''class Codec(nn.Module):
    def encode(self, video): return video
    def encode_first(self, first): return first
class Denoiser(nn.Module):
    noise_aug = 0.
    def __init__(self):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Conv3d(3, 3, 3, padding=1)
    def condition(self, prompt, first, first_latent, drop=None): return {}
    def raw(self, u, c): return self.net(u.transpose(1, 2)).transpose(1, 2)
    def forward(self, x, sigma, cond): return denoise(self.raw, x, sigma)
def objective(d):
    time.sleep(.05)
    return Losses((d.z_hat - d.z).square().mean())
frames = torch.randint(256, (8, 4, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
params = TrainParams(steps=steps, batch_size=2, checkpoint_every=5, validate_every=0, ratio_every=0, cpu=True,
                     tensorboard=False, progress=False)
state = train(params, Path(run_dir), Denoiser(), Codec(), objective, ClipSet(frames, ['go']*8))
write_json(Path(run_dir)/'metrics.json', {'norm': float(state.ema.net.weight.norm()), 'step': state.step})'''

def book(path):
    "A notebook that trains a model of one layer."
    cell = dict(cell_type='code', execution_count=None, metadata={}, outputs=[])
    sources = enumerate((PARAMETERS, IMPORTS, TRAINING))
    cells = [cell | dict(id=f'c{i}', source=source) for i, source in sources]
    cells[0]['metadata'] = dict(tags=['parameters'])
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return str(path)

def kill_once(folder, steps):
    """Kill the worker that runs this run, once it has a checkpoint: the process that holds the run's folder.

    What the run has logged until then is stored: by the clock, no step takes as long twice.
    """
    end = time.time() + PATIENCE
    while time.time() < end:
        last = checkpoints.latest_checkpoint(folder)
        if last and (done := int(last.name[5:])) < steps - 20:
            os.kill(int((folder/'notebook.lock').read_text().split()[0]), signal.SIGKILL)
            (folder.parent/'killed.json').write_text(json.dumps(seconds(folder)[:done]))
            return
        time.sleep(.05)

def seconds(folder) -> list[float]:
    "How long each step of a run took, by its log."
    return [line['seconds'] for line in checkpoints.read_log(folder, 'train')]

def test_a_worker_is_killed_and_the_run_completes(tmp_path, monkeypatch):
    needs_system(find_spec('ray'), 'Ray is not installed: pip install "flowloss_nb[cluster]"')
    from ray.cluster_utils import Cluster
    for name, value in dict(PYTHONPATH=ROOT, OMP_NUM_THREADS=1, RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0).items():
        monkeypatch.setenv(name, str(value))
    steps = 60
    plan = dict(notebook=book(tmp_path/'book.ipynb'), params=dict(steps=steps), grid=dict(seed=[0, 1]))
    # the same run, here and unbroken
    torch.set_num_threads(1)
    exec(f'{IMPORTS}\n{TRAINING}', dict(run_dir=str(tmp_path/'whole'), seed=0, steps=steps))
    # GPUs in name only: the test is that a run asks for one
    node = dict(num_cpus=1, num_gpus=1, object_store_memory=80*2**20)
    cluster, killed = Cluster(initialize_head=True, head_node_args=node), tmp_path/'s'/'seed=0'
    cluster.add_node(**node)
    try:
        killer = Thread(target=kill_once, args=(killed, steps))
        killer.start()
        rows = sweep(plan, tmp_path/'s', cluster=cluster.address, gpus=1)
        killer.join()
    finally:
        import ray
        ray.shutdown()
        cluster.shutdown()
    assert (tmp_path/'s'/'killed.json').exists(), 'the run ended before it could be killed'
    assert [row['state'] for row in rows] == ['done']*2, rows
    a, b = (json.loads((folder/'metrics.json').read_text()) for folder in (tmp_path/'whole', killed))
    assert a == b       # to the bit
    assert b['step'] == steps
    assert [line['step'] for line in checkpoints.read_log(killed, 'train')] == list(range(1, steps + 1))
    before = json.loads((tmp_path/'s'/'killed.json').read_text())
    assert before
    assert seconds(killed)[:len(before)] == before     # it continued from the checkpoint, not from the start
