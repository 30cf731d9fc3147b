"What needs a GPU: half precision with a scaled loss, eight-bit moments, and agreement of CPU and GPU."
from dataclasses import replace
import pytest, torch
from flowloss_nb.training import checkpoints
from test_resume import PARAMS, go

without = not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(without, reason='no GPU: torch.cuda.is_available() is False')
SHORT = replace(PARAMS, steps=8, cpu=False, tensorboard=False, ratio_every=0, checkpoint_every=4)

def weights(folder): return checkpoints.load_checkpoint(checkpoints.latest_checkpoint(folder))[0]

def test_gpu_trains_as_cpu(tmp_path):
    go(tmp_path/'gpu', params=SHORT, luck=False)
    go(tmp_path/'cpu', params=replace(SHORT, cpu=True), luck=False)
    on_gpu = weights(tmp_path/'gpu')['ema']
    for k, v in weights(tmp_path/'cpu')['ema'].items():
        torch.testing.assert_close(v, on_gpu[k], rtol=1e-3, atol=1e-4)

CHANGES = dict(fp16=dict(mixed_precision='fp16'), bf16=dict(mixed_precision='bf16'), adam8=dict(adam8=True))

@pytest.mark.parametrize('name', CHANGES)
def test_resumes(name, tmp_path):
    "Stopped after four steps and resumed: as in one piece, with the scale of the loss and the small moments."
    missing = 'bitsandbytes is not installed: pip install "flowloss_nb[gpu]"'
    if name == 'adam8': pytest.importorskip('bitsandbytes', reason=missing)
    params = replace(SHORT, **CHANGES[name])
    go(tmp_path/'whole', params=params)
    go(tmp_path/'two', params=replace(params, steps=4))
    go(tmp_path/'two', seed=9, params=params)
    resumed = weights(tmp_path/'two')['model']
    for k, v in weights(tmp_path/'whole')['model'].items():
        torch.testing.assert_close(v, resumed[k], rtol=1e-4, atol=1e-5)
    assert checkpoints.load_checkpoint(checkpoints.latest_checkpoint(tmp_path/'two'))[1]['step'] == 8

def test_estimator_and_dot_agree():
    from flowloss_nb.flow.dot import DOT
    from flowloss_nb.flow.estimators import small_estimator
    from flowloss_nb.flow.raft import dot_refiner
    torch.manual_seed(0)
    video = torch.rand(1, 3, 3, 64, 96)*2 - 1
    tracks = torch.rand(1, 3, 40, 3)*torch.tensor([95., 63., 0.]) + torch.tensor([0., 0., 1.])
    for estimator, more in ((small_estimator(), ()), (DOT(None, None, dot_refiner()), (tracks,))):
        with torch.no_grad():
            on_cpu, _ = estimator(video, None, *more)
            on_gpu, _ = estimator.cuda()(video.cuda(), None, *(m.cuda() for m in more))
        torch.testing.assert_close(on_cpu, on_gpu.cpu(), rtol=1e-2, atol=1e-2)
