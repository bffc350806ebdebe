"""The one rule of when the weights of a module may be read in the place of a call.

Fused operations take the weights of many modules and call none of them. That is the same only for a plain module: its
class is torch's own, its ``forward`` is untouched, and it has no hooks. A LoRA layer, a weight norm, a pruned,
parametrised or quantised layer is not plain, and is called. Everything that reads weights asks at every call.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

_CLASSES = (nn.Linear, nn.LayerNorm, nn.SiLU, nn.GELU, nn.Dropout, nn.Identity, nn.Sequential)
_FORWARDS: dict[type[nn.Module], Any] = {kind: kind.forward for kind in _CLASSES}
"""What torch's classes run, before anybody patched one."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def replace_method(module: nn.Module, name: str, function: Callable[..., Any]) -> None:
    """Give a module, on the instance, a method of this package, in a form that is copied and pickled with it."""
    setattr(module, name, functools.partial(function, module))


def is_replaced(module: nn.Module, name: str) -> bool:
    """Whether an instance has a method that is not of its class, and not one of ours either."""
    method = module.__dict__.get(name)
    if method is None:
        return False
    function = method.func if isinstance(method, functools.partial) else None
    return str(getattr(function, "__module__", "")).partition(".")[0] not in ("ear_kernels", "ear_model")


def runs_forward(module: nn.Module) -> bool:
    """Whether calling a module runs its class's ``forward``, or one of ours in its place, and nothing else.

    What holds for all modules is asked once, by :func:`are_modules_watched`.
    """
    return _has_no_hooks(module) and not is_replaced(module, "forward")


def _has_no_hooks(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooks


def are_modules_watched() -> bool:
    """Whether there are hooks of every module, as profilers and counters set them, or patches of torch's classes."""
    return bool(_has_any_global_hook()) or any(kind.forward is not own for kind, own in _FORWARDS.items())


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` is what ``kind``, one of torch's classes, does with its parameters and numbers."""
    return type(module) is kind and "forward" not in module.__dict__ and _has_no_hooks(module)


def work_together(x: Tensor, tensors: Iterable[Tensor | None], dtypes: Sequence[torch.dtype] = DTYPES) -> bool:
    """Whether parameters are plain tensors that torch's own operations take together with ``x``, autocast or not.

    ``dtypes``: those that are taken under autocast.
    """
    device = x.device
    taken = dtypes if torch.is_autocast_enabled("cpu" if x.is_meta else device.type) else (x.dtype,)
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in (nn.Parameter, Tensor) or tensor.dtype not in taken or tensor.device != device
        ):
            return False
    return True
