"""A GPU that is only pretended: every tensor computes on the CPU and carries a mark that says where it would be.

What torch does over CUDA tensors, this does over marked ones: it goes on where both are on one device, and refuses where they are not.
So whole experiments run, with true values, and a module, batch or index that was left behind is an error, as it would be on a GPU.
"""
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU = torch.device('cuda', 0)
MOVES = {'copy_', '__setitem__', 'backward', 'grad', '__deepcopy__', '_has_compatible_shallow_copy_type', 'set_', '_make_subclass'} # may join two devices
FROM_LISTS = {'tensor', 'as_tensor', 'asarray'}     # a list of numbers becomes a tensor on the CPU, whatever they were
STRICT = {'cat', 'stack', 'concat', 'concatenate', 'hstack', 'vstack'}     # not even a CPU number may be among CUDA tensors

def there(x) -> bool:
    "Is this tensor on the pretended GPU?"
    return getattr(x, 'pretended', False)

def mark(x, on: bool):
    if isinstance(x, Tensor): x.pretended = on
    return x

def tensors(x) -> list:
    "All tensors in arguments or answers, at any depth."
    if isinstance(x, Tensor): return [x]
    if isinstance(x, dict): x = list(x.values())
    return [t for v in x for t in tensors(v)] if isinstance(x, (list, tuple)) else []

def wanted(device) -> bool | None:
    "Does this name the GPU? None: it names nothing."
    return None if device is None else device == 'cuda' or (isinstance(device, int) or torch.device(device).type == 'cuda')

def moved(x: Tensor, on: bool | None, dtype=None, copy=False) -> Tensor:
    out = x.to(dtype, copy=copy) if dtype or copy else x
    on = there(x) if on is None else on
    return mark(out.clone() if out is x and on != there(x) else out, on)

def refuse(name: str, *devices):
    raise RuntimeError(f'{name}: Expected all tensors to be on the same device, but found at least two devices, {" and ".join(devices)}!')

def check(name: str, args):
    "Refuse what torch refuses over two devices; a number (0 dimensions) on the CPU may go with CUDA tensors."
    found = tensors(args)
    if not any(map(there, found)): return
    if name in ('__getitem__', 'index_put_', 'index_put'):
        if not there(found[0]): refuse('indices should be either on cpu or on the same device as the indexed tensor', 'cpu', 'cuda:0')
    elif any(not there(t) and (t.ndim or name in STRICT) for t in found): refuse(name, 'cuda:0', 'cpu')

class Pretend(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name, x = dict(kwargs or {}), func.__name__, args[0] if args else None
        if name in ('__get__', '__set__'):
            what = func.__self__.__name__
            if name == '__set__': func(*args); return mark(x, there(args[1])) if what == 'data' else None
            if what == 'device' and there(x): return GPU
            if what in ('is_cuda', 'is_cpu'): return there(x) == (what == 'is_cuda')
        if name in ('numpy', '__array__') and there(x):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first.")
        if name == 'get_device': return 0 if there(x) else -1
        if name == 'cpu': return moved(x, False)
        if name == 'cuda': return moved(x, True)
        if name == 'to' and isinstance(x, Tensor):
            copy = kwargs.pop('copy', False)
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **{k: v for k, v in kwargs.items() if k != 'other'})
            other = next((t for t in [*args[1:], kwargs.get('other')] if isinstance(t, Tensor)), None)
            if device is None or device.type in ('cpu', 'cuda'): return moved(x, wanted(device) if other is None else there(other), dtype, copy)
        on = wanted(kwargs.get('device')) if name != '_parse_to' else None
        if on is not None and torch.device(kwargs['device']).type != 'meta': kwargs['device'] = 'cpu'
        given = tensors([args, kwargs])
        if name in FROM_LISTS and not isinstance(x, Tensor): on, given = bool(on), []
        if name not in MOVES and name not in FROM_LISTS: check(name, [args, kwargs])
        if on is None: on = any(map(there, given))
        if on and kwargs.get('generator') is not None: raise RuntimeError(f"{name}: Expected a 'cuda' device type for generator but found 'cpu'")
        out, before = func(*args, **kwargs), {id(t) for t in given}
        if on:
            for t in tensors(out):
                if id(t) not in before or name in FROM_LISTS: mark(t, True)
        return out

@contextmanager
def pretended_gpu():
    "Within: torch and accelerate believe in one GPU; outside, nothing has changed."
    from accelerate.state import AcceleratorState, GradientState
    def forget(): AcceleratorState._reset_state(True); GradientState._reset_state()
    answers = dict(is_available=True, device_count=1, current_device=0, set_device=None, is_bf16_supported=True, synchronize=None, get_rng_state=torch.get_rng_state(), set_rng_state=None, manual_seed_all=None, empty_cache=None,
                   get_device_properties=SimpleNamespace(name='pretended', total_memory=80*2**30, major=9, minor=0))
    patches = [mock.patch(f'torch.cuda.{k}', lambda *a, _v=v, **kw: _v) for k, v in answers.items()]
    patches += [mock.patch('accelerate.state.check_cuda_p2p_ib_support', lambda: True), mock.patch('torch.accelerator.is_available', lambda: False), mock.patch.object(torch.Tensor, 'pretended', False, create=True)]
    forget()
    for p in patches: p.start()
    try:
        with Pretend(): yield
    finally:
        for p in reversed(patches): p.stop()
        forget()
