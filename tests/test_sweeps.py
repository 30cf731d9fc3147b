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
BOOK = "from dataclasses import dataclass\nfrom pathlib import Path\nimport time, torch\nfrom torch import nn\nfrom flowloss_nb.basics.clips import ClipSet\nfrom flowloss_nb.diffusion.edm import denoise\nfrom flowloss_nb.training.checkpoints import write_json\nfrom flowloss_nb.training.step import TrainParams\nfrom flowloss_nb.training.trainer import train"
MODEL = '''class Codec(nn.Module):
    def encode(self, video): return video
    def encode_first(self, first): return first
class Denoiser(nn.Module):
    def __init__(self):
        super().__init__(); torch.manual_seed(seed); self.net = nn.Conv3d(3, 3, 3, padding=1)
    def condition(self, prompt, first, first_latent, drop=None): return {}
    def forward(self, x, sigma, cond): return denoise(lambda u, c: self.net(u.transpose(1, 2)).transpose(1, 2), x, sigma)
def objective(z_hat, z, batch, sigma, generator): time.sleep(.05); return {'loss': (z_hat - z).square().mean()}
clips = ClipSet(torch.randint(256, (8, 4, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8), ['go']*8)
state = train(TrainParams(steps=steps, batch_size=2, checkpoint_every=5, validate_every=0, ratio_every=0, cpu=True, tensorboard=False, progress=False), Path(run_dir), Denoiser(), Codec(), objective, clips)
write_json(Path(run_dir)/'metrics.json', {'norm': float(state.ema.net.weight.norm()), 'step': state.step})'''

def book(path):
    cells = [{'cell_type': 'code', 'metadata': {'tags': ['parameters']} if i == 0 else {}, 'source': s, 'id': f'c{i}', 'execution_count': None, 'outputs': []}
             for i, s in enumerate(("run_dir = 'x'  # Folder\nseed = 0  # Of the weights\nsteps = 10  # Steps", BOOK, MODEL))]
    path.write_text(json.dumps({'cells': cells, 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}))
    return str(path)

def kill_once(folder, steps):
    "Kill the worker that runs this run, once it has a checkpoint; its process is the one that holds the run's folder. What the run had logged until then is kept: by the clock, no step takes as long twice."
    end = time.time() + PATIENCE
    while time.time() < end:
        last = checkpoints.latest_checkpoint(folder)
        if last and int(last.name[5:]) < steps - 20:
            os.kill(int((folder/'notebook.lock').read_text().split()[0]), signal.SIGKILL)
            (folder.parent/'killed').write_text(json.dumps([l['seconds'] for l in checkpoints.read_log(folder, 'train')][:int(last.name[5:])])); return
        time.sleep(.05)

def test_a_worker_is_killed_and_the_run_completes(tmp_path, monkeypatch):
    needs_system(find_spec('ray'), 'Ray is not installed: pip install "flowloss_nb[cluster]"')
    from ray.cluster_utils import Cluster
    monkeypatch.setenv('PYTHONPATH', str(ROOT)); monkeypatch.setenv('OMP_NUM_THREADS', '1'); monkeypatch.setenv('RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO', '0')
    steps = 60
    plan = dict(notebook=book(tmp_path/'book.ipynb'), params=dict(steps=steps), grid=dict(seed=[0, 1]))
    torch.set_num_threads(1)
    exec(f'{BOOK}\n{MODEL}', dict(run_dir=str(tmp_path/'whole'), seed=0, steps=steps))      # the same run, here and unbroken
    node = dict(num_cpus=1, num_gpus=1, object_store_memory=80*2**20)   # GPUs in name: what is tested is that a run asks for one
    cluster = Cluster(initialize_head=True, head_node_args=node); cluster.add_node(**node)
    try:
        killer = Thread(target=kill_once, args=(tmp_path/'s'/'seed=0', steps)); killer.start()
        rows = sweep(plan, tmp_path/'s', cluster=cluster.address, gpus=1)
        killer.join()
    finally:
        import ray
        ray.shutdown(); cluster.shutdown()
    assert (tmp_path/'s'/'killed').exists(), 'the run ended before it could be killed'
    assert [r['state'] for r in rows] == ['done']*2, rows
    a, b = (json.loads((tmp_path/f/'metrics.json').read_text()) for f in ('whole', 's/seed=0'))
    assert a == b and b['step'] == steps        # to the bit
    lines, before = checkpoints.read_log(tmp_path/'s'/'seed=0', 'train'), json.loads((tmp_path/'s'/'killed').read_text())
    assert [l['step'] for l in lines] == list(range(1, steps + 1))
    assert before and [l['seconds'] for l in lines][:len(before)] == before     # it went on from the checkpoint, and not from the start
