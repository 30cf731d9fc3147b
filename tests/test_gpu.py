"What needs a GPU: half precision with a scaled loss, eight-bit moments, and that CPU and GPU say the same."
from dataclasses import replace
import pytest, torch
from flowloss_nb.training import checkpoints
from test_resume import PARAMS, go

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU: torch.cuda.is_available() is False')
SHORT = replace(PARAMS, steps=8, cpu=False, tensorboard=False, ratio_every=0, checkpoint_every=4)

def weights(folder): return checkpoints.load_checkpoint(checkpoints.latest_checkpoint(folder))[0]

def test_gpu_trains_as_cpu(tmp_path):
    go(tmp_path/'gpu', params=SHORT, luck=False); go(tmp_path/'cpu', params=replace(SHORT, cpu=True), luck=False)
    for k, v in weights(tmp_path/'cpu')['ema'].items(): torch.testing.assert_close(v, weights(tmp_path/'gpu')['ema'][k], rtol=1e-3, atol=1e-4)

@pytest.mark.parametrize('changes', [dict(mixed_precision='fp16'), dict(mixed_precision='bf16'), dict(adam8=True)], ids=['fp16', 'bf16', 'adam8'])
def test_resumes(changes, tmp_path):
    "Broken off after four steps and started again: the same as in one piece, the scale of the loss and the small moments included."
    if 'adam8' in changes: pytest.importorskip('bitsandbytes', reason='bitsandbytes is not installed: pip install "flowloss_nb[gpu]"')
    params = replace(SHORT, **changes)
    go(tmp_path/'whole', params=params); go(tmp_path/'two', params=replace(params, steps=4)); go(tmp_path/'two', seed=9, params=params)
    for k, v in weights(tmp_path/'whole')['model'].items(): torch.testing.assert_close(v, weights(tmp_path/'two')['model'][k], rtol=1e-4, atol=1e-5)
    assert checkpoints.load_checkpoint(checkpoints.latest_checkpoint(tmp_path/'two'))[1]['step'] == 8

def test_estimator_and_dot_say_the_same():
    from flowloss_nb.flow.dot import DOT
    from flowloss_nb.flow.estimators import small_estimator
    from flowloss_nb.flow.raft import dot_refiner
    torch.manual_seed(0)
    video, tracks = torch.rand(1, 3, 3, 64, 96)*2 - 1, torch.rand(1, 3, 40, 3)*torch.tensor([95., 63., 0.]) + torch.tensor([0., 0., 1.])
    for F, more in ((small_estimator(), ()), (DOT(None, None, dot_refiner()), (tracks,))):
        with torch.no_grad(): here, there = F(video, None, *more)[0], F.cuda()(video.cuda(), None, *(m.cuda() for m in more))[0]
        torch.testing.assert_close(here, there.cpu(), rtol=1e-2, atol=1e-2)
