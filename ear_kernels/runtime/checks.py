"""Checks of arguments that several operations share; every message names the value and what would be right."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def takes_tensors(function: Function) -> Function:
    """``function``, which raises TypeError by name where an argument is not the tensor that its annotation promises.

    Of the annotations ``Tensor``, ``Tensor | None`` and ``list[Tensor]`` or ``tuple[Tensor, ...]``; others are left
    to the function.
    """
    hints = get_type_hints(function)
    single: dict[str, str] = {}
    several: set[str] = set()
    for name, hint in hints.items():
        if hint is Tensor or set(get_args(hint)) == {Tensor, type(None)}:
            single[name] = "a torch.Tensor" if hint is Tensor else "a torch.Tensor or None"
        elif get_origin(hint) in (list, tuple) and set(get_args(hint)) <= {Tensor, ...}:
            several.add(name)
    names = tuple(signature(function).parameters)

    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if name in single:
                if not isinstance(value, Tensor) and (value is not None or single[name] == "a torch.Tensor"):
                    check_tensor(name, value, single[name])
            elif name in several:
                if not isinstance(value, (list, tuple)):
                    raise TypeError(f"{name} is a {type(value).__name__}; it must be a list of tensors")
                for index, each in enumerate(value):
                    check_tensor(f"{name}[{index}]", each)
        return function(*args, **kwargs)

    return cast(Function, checked)


def check_tensor(name: str, tensor: Any, what: str = "a torch.Tensor") -> None:
    """``tensor`` must be one: not a list, an array or None; ``what`` says what is expected."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be {what}")


def check_floating(name: str, tensor: Any, what: str = "a torch.Tensor") -> None:
    check_tensor(name, tensor, what)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")


def check_real(name: str, tensor: Any) -> None:
    """``tensor`` must hold booleans or real numbers, as a mask or weights do."""
    check_tensor(name, tensor)
    if tensor.is_complex():
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be bool or hold real numbers")


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    check_tensor(name, tensor)
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device} and {like_name} on {like.device}; put both on one device")


def check_broadcast(name: str, tensor: Tensor, rows: tuple[int, ...], what: str = "the rows") -> None:
    """``tensor`` must broadcast to exactly ``rows``."""
    check_tensor(name, tensor)
    shape = tuple(tensor.shape)
    fits = len(shape) <= len(rows) and all(
        size in (1, full) for size, full in zip(reversed(shape), reversed(rows), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} has shape {shape}; it must broadcast to {what} {rows}")


def dimension(name: str, dim: int, ndim: int) -> int:
    """``dim`` as a non-negative index of a dimension before the last one (which holds the features)."""
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{name} is {dim!r}; it must be an integer")
    if not -ndim <= dim < ndim or dim % ndim == ndim - 1:
        raise ValueError(
            f"{name} is {dim} for a tensor of {ndim} dimensions; it must name a dimension before the last, "
            "which holds the features"
        )
    return dim % ndim


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The autocast dtype where autocast is on for the tensors' device, else what they promote to.

    "meta" tensors have no autocast of their own; the CPU's counts.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    device = "cpu" if present[0].is_meta else present[0].device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype = present[0].dtype
    for tensor in present[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def kernel_refusal(
    first: Tensor,
    *tensors: Tensor | None,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16),
    widest: int | None = None,
) -> str | None:
    """Why kernels cannot take these tensors, for :func:`ear_kernels.runtime.backend.applies`; None if they can.

    Args:
        first, *tensors: the floating-point inputs; absent ones are None.
        dtypes: those that the kernels take.
        widest: the most features that a row of ``first`` may have, if there is a limit (1 is the least then).
    """
    for tensor in (first, *tensors):
        if tensor is not None and tensor.dtype not in dtypes:
            names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
            taken = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
            return f"dtype {tensor.dtype} (the kernels take {taken})"
    if widest is not None and not 1 <= first.shape[-1] <= widest:
        return f"width {first.shape[-1]} (the kernels take 1 to {widest})"
    return None
