"""Every experiment on a pretended GPU: a module, a batch or an index that is left on the CPU is an error.

The notebooks' own cells run, up to the one that writes metrics.json, at a quarter of the pixels, with an F of
one update.
"""
import re, warnings
from functools import cache
import matplotlib.pyplot
import pytest, torch
from notebooks import NBS, cells, experiments, source
from pretend import GPU, pretended_gpu, there

SMALL = {   # as little as shows every line
    'train': dict(steps=1, objective='flow', clips=2, validate_every=1, sample_steps=1, test_clips=1),
    'compare': dict(steps=2, batch_size=1, clips=1, draws=1, validate_every=2,
                    sample_steps=1, test_clips=1, psi=100.),
    'strategy': dict(steps=1, batch_size=1, clips=1, validate_at=[1], validate_clips=1, test_clips=1,
                     sample_steps=1, psi=100., distances=True),
    'train_bridge': dict(steps=1, sample_steps=1, psi=100.),
    'train_codec': dict(steps=1, batch_size=1, clips=2, test_clips=1),
    'train_estimator': dict(clips=2, batch_size=1, K=1, test_clips=1, sigmas=[.5],
                            phases=[['match', 1, 1, 1e-3, 1., .25], ['flow', 1, 1, 1e-3, 1., .25]]),
    'train_judge': dict(steps=1, batch_size=1, seeds=[0, 2], K=1, test_clips=1),
    'train_distance': dict(steps=1, batch_size=1, clips=2, looks=1),
    'train_small_svd': dict(clips=2, picture_steps=1, clip_steps=1, steps=1, test_clips=1),
    'bench_step': dict(steps=1, batch_size=1, clips=1),
    'compare_estimators': dict(clips=1, tracks=2, track_frames=2, cost_sizes=[[32, 48]]),
    'explore': dict(levels=[.5], redraws=1),
    'fig1_framework': {},
    'fig2_weights': dict(levels=1, draws=100),
    'fig3_noise': dict(clips=1, sigmas=[.5]),
    'where_motion': dict(sigmas=[.5], sample_steps=1),
    'plan_scale': {},
    'full_size_step': {}}
# draw what is recorded, and compute nothing
RECORDS = {'fig4_curves', 'fig5_step100', 'fig6_step1600', 'table1_test', 'report'}
# pictures and files: no tensor computes
DATA = {'prepare_bridge', 'bench_prepare'}
# what DOT's gradient costs a CPU
ON_CPU = {'bench_estimators'}
# both stay on the CPU; the cells that follow compare gradients, and counts, which are not taken here
UNTIL = dict(plan_scale='def gradient(', full_size_step='def total(')

def test_every_experiment_is_here():
    assert {n.stem for n in experiments()} == {*SMALL} | RECORDS | DATA | ON_CPU

@pytest.fixture
def quick(monkeypatch):
    "Clips of 32×48, an F of one update, and no counting of operations, which has its own tests."
    from flowloss_nb.basics import cost
    from flowloss_nb.data import metaworld
    from flowloss_nb.flow import dot, estimators, raft
    from flowloss_nb.runs import plan, stage, trained
    from flowloss_nb.basics.clips import ClipSet
    load, init = metaworld.load_clips, raft.RAFT.__init__
    @cache
    def small(*a, **k):
        clips = load(*a, **k)
        def half(k, v):
            if k == 'gripper': return v/2
            return v[..., ::2, ::2]/2 if k == 'flow' else v[..., ::2, ::2]
        def truth(i): return {k: half(k, v) for k, v in clips.known_truth(i).items()}
        return ClipSet(clips.frames[:, :, ::2, ::2], clips.prompts, clips.ids, truth)
    def once(self, *a, **k):
        init(self, *a, **k)
        self.updates = 1
    def counted(*a, **k): return dict(flops=1, forward=1, kept=1, seconds=1.)
    for owner in (metaworld, stage, trained): monkeypatch.setattr(owner, 'load_clips', small)
    monkeypatch.setattr(raft.RAFT, '__init__', once)
    def tracks(self, video): return torch.ones(*video.shape[:2], 2, 3).to(video)
    monkeypatch.setattr(dot.DOT, 'tracks', tracks)
    monkeypatch.setattr(estimators.TorchvisionRaft.__init__, '__defaults__', (1,))
    for part in ('unet', 'decode', 'encode', 'flow', 'condition'):
        monkeypatch.setattr(plan, f'{part}_cost', counted)
    def run_once(f):
        out = f()
        loss = out[0] if isinstance(out, tuple) else out
        if loss.requires_grad: loss.backward()
        return counted()
    monkeypatch.setattr(cost, 'cost', run_once)

ONLY_IN_JUPYTER = r'^(from matplotlib_inline.*|set_matplotlib_formats.*|.*display\(box\).*)$'

def run_cells(notebook, changes: dict) -> dict:
    "Run a notebook's cells here, up to the one that writes its metrics."
    space = {}
    for cell in cells(notebook):
        if cell['cell_type'] != 'code': continue
        text = re.sub(ONLY_IN_JUPYTER, '', source(cell), flags=re.M)
        if notebook.stem in UNTIL and UNTIL[notebook.stem] in text: break
        exec(compile(text, f'{notebook.stem}, cell {cell["id"]}', 'exec'), space)
        if 'parameters' in cell['metadata'].get('tags', []): space.update(changes)
        matplotlib.pyplot.close('all')
        if 'metrics.json' in text: return space
    assert notebook.stem in UNTIL, 'no cell writes metrics.json'
    return space

@pytest.mark.parametrize('stem', SMALL)
def test_experiment_on_a_pretended_gpu(stem, quick, tmp_path, monkeypatch):
    # before torch finds a GPU
    import accelerate, flowloss_nb.evaluation.comparison, flowloss_nb.runs.trained
    matplotlib.use('agg')
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(), pretended_gpu():
        warnings.simplefilter('ignore')
        space = run_cells(next((NBS/'experiments').rglob(f'{stem}.ipynb')), SMALL[stem])
        for net in (space['stage'].codec, space['stage'].estimator) if 'stage' in space else ():
            assert next(iter(net.state_dict().values())).device == GPU
        if 'state' in space: assert all(map(there, space['state'].ema.parameters())), 'it trained on the CPU'

def test_what_torch_refuses_is_refused():
    "The pretended GPU refuses what a GPU refuses, and allows what it allows."
    with pretended_gpu():
        here, far, net = torch.ones(3), torch.ones(3, device='cuda'), torch.nn.Linear(3, 3).to('cuda')
        weight, index = next(net.parameters()), torch.zeros(1, dtype=torch.long, device='cuda')
        assert here.device == torch.device('cpu')
        made = far + 1, far.new_zeros(2), far[torch.tensor([0])], here.to(far)
        assert {x.device for x in (far, weight, *made)} == {GPU}
        assert (far + torch.tensor(2.)).sum().item() == 9
        assert not far.cpu().is_cuda
        net(far).sum().backward()
        assert weight.grad.is_cuda
        for bad in (lambda: here + far, lambda: net(here), lambda: here[index],
                    lambda: torch.stack([far[0], here[0]]),
                    lambda: torch.rand(2, device='cuda', generator=torch.Generator())):
            with pytest.raises(RuntimeError, match='same device|generator'): bad()
        with pytest.raises(TypeError, match='numpy'): far.numpy()
    assert not torch.ones(1).is_cuda

def test_a_stage_on_the_cpu_stays_there(quick, tmp_path):
    "cpu=True and a stage for the CPU compute there although there is a GPU; a job moves what it is given."
    from flowloss_nb.runs.stage import choose_objective, embedded_stage, stage_denoiser
    from flowloss_nb.training.step import TrainParams
    from flowloss_nb.training.trainer import train
    params = TrainParams(steps=1, batch_size=1, validate_every=0, ratio_every=1, cpu=True, tensorboard=False,
                         progress=False)
    for device in ('cpu', 'cuda'):
        with pretended_gpu():
            stage = embedded_stage(tmp_path, clips=1, device=device)
            denoiser = stage_denoiser(stage, widths=(32, 32), attends=(False, False))
            for net in (stage.judge, denoiser): assert next(net.parameters()).device.type == device
            objective = choose_objective('flow', stage, psi=100.)
            state = train(params, tmp_path/device, denoiser, stage.codec, objective, stage.train)
            used = [*state.ema.parameters(), *stage.estimator.parameters(), *stage.codec.buffers()]
            assert not any(map(there, used))
