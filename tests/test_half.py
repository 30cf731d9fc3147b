"A model in half precision is trained, averaged, saved and measured like any; its average is float32."
from dataclasses import replace
import pytest, torch
from safetensors.torch import load_file
from flowloss_nb.basics.folders import latest_checkpoint
from flowloss_nb.training.step import TrainParams
from flowloss_nb.training.trainer import load_ema, train
from test_resume import Codec, Denoiser, clips, objective

PARAMS = TrainParams(steps=12, batch_size=2, warmup=0, lr=1e-3, ema=.999, ratio_every=0,
                     validate_every=6, checkpoint_every=6, cpu=True, progress=False, tensorboard=False)

class Half(Denoiser):
    "Its network computes in the dtype of its weights."
    def forward(self, x, sigma, cond):
        dtype = self.rest.weight.dtype
        return super().forward(x.to(dtype), sigma, {k: v.to(dtype) for k, v in cond.items()})

@pytest.mark.parametrize('dtype', (torch.bfloat16, torch.float32))
def test_average_is_float32(tmp_path, dtype):
    validated = []
    def validate(ema, step):
        validated.append({p.dtype for p in ema.parameters()})
        return {'size': sum(p.norm() for p in ema.parameters()).item()}
    def go(steps):
        params, model = replace(PARAMS, steps=steps), Half(0, 0.).to(dtype)
        return train(params, tmp_path, model, Codec(), objective, clips(), validate=validate)
    first = go(6)
    assert {p.dtype for p in first.core().parameters()} == {dtype}
    saved = load_file(latest_checkpoint(tmp_path)/'ema.safetensors')
    assert {v.dtype for v in saved.values()} == {torch.float32}
    state = go(12)      # resumed: the average continues from the saved bits
    assert validated == [{torch.float32}]*2
    for (name, a), b in zip(state.ema.named_parameters(), state.core().parameters()):
        assert a.dtype == torch.float32, name
        assert not a.equal(saved[name]), name
        assert not a.equal(b.float()), name
    loaded = list(load_ema(Half(1, 0.), tmp_path).parameters())
    assert {p.dtype for p in loaded} == {torch.float32}
    assert all(a.equal(b) for a, b in zip(loaded, state.ema.parameters()))
