"A model in half precision is trained, averaged, saved and judged as one in float32 is; its average is float32."
from dataclasses import replace
import pytest, torch
from safetensors.torch import load_file
from flowloss_nb.basics.folders import latest_checkpoint
from flowloss_nb.training.step import TrainParams
from flowloss_nb.training.trainer import load_ema, train
from test_resume import Codec, Denoiser, clips, objective

PARAMS = TrainParams(steps=12, batch_size=2, warmup=0, lr=1e-3, ema=.999, validate_every=6, checkpoint_every=6, ratio_every=0, cpu=True, progress=False, tensorboard=False)

class Half(Denoiser):
    "Its network computes in the dtype of its weights."
    def forward(self, x, sigma, cond): return super().forward(x.to(self.rest.weight.dtype), sigma, {k: v.to(self.rest.weight.dtype) for k, v in cond.items()})

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float32))
def test_average_is_float32(tmp_path, dtype):
    judged = []
    def validate(ema, step):
        judged.append({p.dtype for p in ema.parameters()})
        return {'size': sum(p.norm() for p in ema.parameters()).item()}
    def go(steps): return train(replace(PARAMS, steps=steps), tmp_path, Half(0, 0.).to(dtype), Codec(), objective, clips(), validate=validate)
    begun = go(6)
    assert {p.dtype for p in begun.core().parameters()} == {dtype}
    saved = load_file(latest_checkpoint(tmp_path)/'ema.safetensors')
    assert {v.dtype for v in saved.values()} == {torch.float32}
    state = go(12)      # resumed: the average goes on from the saved bits
    assert judged == [{torch.float32}]*2
    for (name, a), b in zip(state.ema.named_parameters(), state.core().parameters()):
        assert a.dtype == torch.float32 and not a.equal(saved[name]) and not a.equal(b.float()), name
    assert {p.dtype for p in load_ema(Half(1, 0.), tmp_path).parameters()} == {torch.float32}
    assert all(a.equal(b) for a, b in zip(load_ema(Half(1, 0.), tmp_path).parameters(), state.ema.parameters()))
