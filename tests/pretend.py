"""A pretended GPU: every tensor computes on the CPU and carries a mark of the device where it would be.

Marked tensors behave as CUDA tensors do: an operation runs if its tensors are on one device, and is refused
if they are not. So whole experiments run, with true values, and a module, batch or index that was left on the
CPU is an error, as it would be on a GPU.
"""
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU = torch.device('cuda', 0)
# may join two devices
MOVES = {'copy_', '__setitem__', 'backward', 'grad', '__deepcopy__', '_has_compatible_shallow_copy_type',
         'set_', '_make_subclass'}
# make of a list of numbers a tensor on the CPU, wherever the numbers were
FROM_LISTS = {'tensor', 'as_tensor', 'asarray'}
# allow not even a CPU number among CUDA tensors
STRICT = {'cat', 'stack', 'concat', 'concatenate', 'hstack', 'vstack'}

def there(x) -> bool:
    "Is this tensor on the pretended GPU?"
    return getattr(x, 'pretended', False)

def mark(x, on: bool):
    if isinstance(x, Tensor): x.pretended = on
    return x

def tensors(x) -> list:
    "All tensors in arguments or results, at any depth."
    if isinstance(x, Tensor): return [x]
    if isinstance(x, dict): x = list(x.values())
    return [t for v in x for t in tensors(v)] if isinstance(x, (list, tuple)) else []

def wanted(device) -> bool | None:
    "Is this device the GPU? None: there is no device."
    if device is None: return None
    return isinstance(device, int) or torch.device(device).type == 'cuda'

def moved(x: Tensor, on: bool | None, dtype=None, copy=False) -> Tensor:
    out = x.to(dtype, copy=copy) if dtype or copy else x
    on = there(x) if on is None else on
    return mark(out.clone() if out is x and on != there(x) else out, on)

def refuse(name: str, *devices):
    raise RuntimeError(f'{name}: Expected all tensors to be on the same device, '
                       f'but found at least two devices, {" and ".join(devices)}!')

def check(name: str, args):
    "Refuse what torch refuses over two devices; a number (0 dimensions) on the CPU may go with CUDA tensors."
    found = tensors(args)
    if not any(map(there, found)): return
    if name in ('__getitem__', 'index_put_', 'index_put'):
        indices = 'indices should be either on cpu or on the same device as the indexed tensor'
        if not there(found[0]): refuse(indices, 'cpu', 'cuda:0')
    elif any(not there(t) and (t.ndim or name in STRICT) for t in found): refuse(name, 'cuda:0', 'cpu')

class Pretend(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name, x = dict(kwargs or {}), func.__name__, args[0] if args else None
        if name in ('__get__', '__set__'):
            what = func.__self__.__name__
            if name == '__set__':
                func(*args)
                return mark(x, there(args[1])) if what == 'data' else None
            if what == 'device' and there(x): return GPU
            if what in ('is_cuda', 'is_cpu'): return there(x) == (what == 'is_cuda')
        if name in ('numpy', '__array__') and there(x):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. "
                            'Use Tensor.cpu() to copy the tensor to host memory first.')
        if name == 'get_device': return 0 if there(x) else -1
        if name == 'cpu': return moved(x, False)
        if name == 'cuda': return moved(x, True)
        if name == 'to' and isinstance(x, Tensor):
            copy, other = kwargs.pop('copy', False), kwargs.pop('other', None)
            like = next((t for t in [*args[1:], other] if isinstance(t, Tensor)), None)
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device is None or device.type in ('cpu', 'cuda'):
                return moved(x, wanted(device) if like is None else there(like), dtype, copy)
            if other is not None: kwargs['other'] = other
        on = wanted(kwargs.get('device')) if name != '_parse_to' else None
        if on is not None and torch.device(kwargs['device']).type != 'meta': kwargs['device'] = 'cpu'
        given = tensors([args, kwargs])
        if name in FROM_LISTS and not isinstance(x, Tensor): on, given = bool(on), []
        if name not in MOVES and name not in FROM_LISTS: check(name, [args, kwargs])
        if on is None: on = any(map(there, given))
        if on and kwargs.get('generator') is not None:
            raise RuntimeError(f"{name}: Expected a 'cuda' device type for generator but found 'cpu'")
        out, before = func(*args, **kwargs), {id(t) for t in given}
        if on:
            for t in tensors(out):
                if id(t) not in before or name in FROM_LISTS: mark(t, True)
        return out

def forget():
    "Let accelerate look for devices again."
    from accelerate.state import AcceleratorState, GradientState
    AcceleratorState._reset_state(True)
    GradientState._reset_state()

@contextmanager
def pretended_gpu():
    "Inside, torch and accelerate find one GPU; outside, nothing has changed."
    import accelerate.state
    properties = SimpleNamespace(name='pretended', total_memory=80*2**30, major=9, minor=0)
    answers = dict(is_available=True, device_count=1, current_device=0, set_device=None,
                   is_bf16_supported=True, synchronize=None, set_rng_state=None,
                   get_rng_state=torch.get_rng_state(),
                   manual_seed_all=None, empty_cache=None, get_device_properties=properties)
    forget()
    with ExitStack() as patched:
        patched.callback(forget)
        for name, answer in answers.items():
            patched.enter_context(mock.patch(f'torch.cuda.{name}', lambda *a, _answer=answer, **k: _answer))
        patched.enter_context(mock.patch('accelerate.state.check_cuda_p2p_ib_support', lambda: True))
        patched.enter_context(mock.patch('torch.accelerator.is_available', lambda: False))
        patched.enter_context(mock.patch.object(Tensor, 'pretended', False, create=True))
        # also where no mode is active: what is computed again for a gradient
        patched.enter_context(mock.patch.object(Tensor, 'is_cuda', property(there), create=True))
        with Pretend(): yield
