"""Every experiment on a GPU that is only pretended: a module, a batch or an index that is left on the CPU is an error here as it is there.

The notebooks' own cells run, up to the one that writes metrics.json, at a quarter of the pixels, with an F that looks once.
"""
import re, warnings
from functools import cache
import matplotlib.pyplot
import pytest, torch
from notebooks import NBS, cells, experiments, source
from pretend import GPU, pretended_gpu, there

SMALL = {   # as little as shows every line
    'train': dict(steps=1, objective='flow', clips=2, validate_every=1, sample_steps=1, test_clips=1),
    'compare': dict(steps=2, batch_size=1, clips=1, draws=1, validate_every=2, sample_steps=1, test_clips=1, psi=100.),
    'strategy': dict(steps=1, batch_size=1, clips=1, validate_at=[1], validate_clips=1, test_clips=1, sample_steps=1, psi=100., distances=True),
    'train_bridge': dict(steps=1, sample_steps=1, psi=100.),
    'train_codec': dict(steps=1, batch_size=1, clips=2, test_clips=1),
    'train_estimator': dict(clips=2, batch_size=1, K=1, test_clips=1, sigmas=[.5], phases=[['match', 1, 1, 1e-3, 1., .25], ['flow', 1, 1, 1e-3, 1., .25]]),
    'train_small_svd': dict(clips=2, picture_steps=1, clip_steps=1, steps=1, test_clips=1),
    'bench_step': dict(steps=1, batch_size=1, clips=1),
    'compare_estimators': dict(clips=1, tracks=2, track_frames=2, cost_sizes=[[32, 48]]),
    'explore': dict(levels=[.5], redraws=1), 'fig1_framework': {}, 'fig2_weights': dict(levels=1, draws=100), 'fig3_noise': dict(clips=1, sigmas=[.5]),
    'plan_scale': {}, 'full_size_step': {}}
RECORDS = {'fig4_curves', 'fig5_step100', 'fig6_step1600', 'table1_test', 'report'}     # draw what is recorded, and compute nothing
DATA = {'prepare_bridge', 'bench_prepare'}      # pictures and files: no tensor computes
ON_CPU = {'bench_estimators'}                   # what DOT's gradient costs a CPU
UNTIL = dict(plan_scale='def pull(', full_size_step='took = {')     # both stay on the CPU; what follows compares counts, which are not taken here, and gradients

def test_every_experiment_is_here():
    assert {n.stem for n in experiments()} == {*SMALL} | RECORDS | DATA | ON_CPU

@pytest.fixture
def quick(monkeypatch):
    "Clips of 32×48, and an F that looks once; costs are asked for elsewhere."
    from flowloss_nb.basics import cost
    from flowloss_nb.data import metaworld
    from flowloss_nb.flow import dot, estimators, raft
    from flowloss_nb.runs import plan, stage, trained
    from flowloss_nb.basics.clips import ClipSet
    load, init = metaworld.load_clips, raft.RAFT.__init__
    @cache
    def small(*a, **k):
        clips = load(*a, **k)
        def half(k, v): return v[..., ::2, ::2]/2 if k == 'flow' else v[..., ::2, ::2]
        def truth(i): return {k: half(k, v) for k, v in clips.known_truth(i).items()}
        return ClipSet(clips.frames[:, :, ::2, ::2], clips.prompts, clips.ids, truth)
    def once(self, *a, **k): init(self, *a, **k); self.updates = 1
    counted = lambda *a, **k: dict(flops=1, forward=1, kept=1, seconds=1.)
    for owner in (metaworld, stage, trained): monkeypatch.setattr(owner, 'load_clips', small)
    monkeypatch.setattr(raft.RAFT, '__init__', once)
    monkeypatch.setattr(dot.DOT, 'tracks', lambda self, video: torch.ones(*video.shape[:2], 2, 3).to(video))
    monkeypatch.setattr(estimators.TorchvisionRaft.__init__, '__defaults__', (1,))
    for asked in ('unet_cost', 'decode_cost', 'encode_cost', 'flow_cost', 'condition_cost'): monkeypatch.setattr(plan, asked, counted)
    def run_once(f):
        loss, *_ = out if isinstance(out := f(), tuple) else (out,)
        if loss.requires_grad: loss.backward()
        return counted()
    monkeypatch.setattr(cost, 'cost', run_once)

def run_cells(notebook, changes: dict) -> dict:
    "Run a notebook's cells here, up to the one that writes its metrics."
    space = {}
    for cell in cells(notebook):
        text = re.sub(r'^(from matplotlib_inline.*|set_matplotlib_formats.*|.*display\(box\).*)$', '', source(cell), flags=re.M)
        if cell['cell_type'] != 'code': continue
        if notebook.stem in UNTIL and UNTIL[notebook.stem] in text: break
        exec(compile(text, f'{notebook.stem}, cell {cell["id"]}', 'exec'), space)
        if 'parameters' in cell['metadata'].get('tags', []): space.update(changes)
        matplotlib.pyplot.close('all')
        if 'metrics.json' in text: return space
    assert notebook.stem in UNTIL, 'no cell writes metrics.json'
    return space

@pytest.mark.parametrize('stem', SMALL)
def test_experiment_on_a_pretended_gpu(stem, quick, tmp_path, monkeypatch):
    import accelerate, flowloss_nb.runs.trained, flowloss_nb.evaluation.comparison # before torch believes in a GPU
    matplotlib.use('agg'); torch.set_num_threads(1); monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(), pretended_gpu():
        warnings.simplefilter('ignore')
        space = run_cells(next((NBS/'experiments').rglob(f'{stem}.ipynb')), SMALL[stem])
        if 'stage' in space: assert all(next(iter(net.state_dict().values())).device == GPU for net in (space['stage'].codec, space['stage'].estimator))
        if 'state' in space: assert all(there(p) for p in space['state'].ema.parameters()), 'it trained on the CPU'

def test_what_torch_refuses_is_refused():
    "The pretended GPU refuses what a GPU refuses, and allows what it allows."
    with pretended_gpu():
        here, far, net = torch.ones(3), torch.ones(3, device='cuda'), torch.nn.Linear(3, 3).to('cuda')
        assert (far.device, here.device, next(net.parameters()).device, (far + 1).device, far.new_zeros(2).device) == (GPU, torch.device('cpu'), GPU, GPU, GPU)
        assert (far + torch.tensor(2.)).sum().item() == 9 and far[torch.tensor([0])].is_cuda and here.to(far).is_cuda and not far.cpu().is_cuda
        net(far).sum().backward(); assert next(net.parameters()).grad.is_cuda
        for bad in (lambda: here + far, lambda: net(here), lambda: here[torch.zeros(1, dtype=torch.long, device='cuda')], lambda: torch.stack([far[0], here[0]]),
                    lambda: torch.rand(2, device='cuda', generator=torch.Generator())):
            with pytest.raises(RuntimeError, match='same device|generator'): bad()
        with pytest.raises(TypeError, match='numpy'): far.numpy()
    assert not torch.ones(1).is_cuda

def test_a_stage_on_the_cpu_stays_there(quick, tmp_path):
    "cpu=True, or a stage asked for the CPU, computes there although a GPU is there; a job brings what it is given."
    from flowloss_nb.runs.stage import choose_objective, embedded_stage, stage_denoiser
    from flowloss_nb.training.step import TrainParams
    from flowloss_nb.training.trainer import train
    params = TrainParams(steps=1, batch_size=1, validate_every=0, ratio_every=1, cpu=True, tensorboard=False, progress=False)
    sizes = dict(widths=(32, 32), attends=(False, False))
    for device in ('cpu', 'cuda'):
        with pretended_gpu():
            stage = embedded_stage(tmp_path, clips=1, device=device)
            assert next(stage.judge.parameters()).device.type == next(stage_denoiser(stage, **sizes).parameters()).device.type == device
            state = train(params, tmp_path/device, stage_denoiser(stage, **sizes), stage.codec, choose_objective('flow', stage, psi=100.), stage.train)
            assert not any(there(p) for p in [*state.ema.parameters(), *stage.estimator.parameters(), *stage.codec.buffers()])
