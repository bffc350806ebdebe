"""Checks of arguments that several operations share; every message names the value and what would be right."""

import torch
from torch import Tensor


def check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a torch.Tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; it must be a floating-point tensor")


def check_device(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device} and {like_name} on {like.device}; put both on one device")


def check_broadcast(name: str, tensor: Tensor, rows: tuple[int, ...]) -> None:
    """``tensor`` must broadcast to exactly ``rows``."""
    shape = tuple(tensor.shape)
    fits = len(shape) <= len(rows) and all(
        size in (1, full) for size, full in zip(reversed(shape), reversed(rows), strict=False)
    )
    if not fits:
        raise ValueError(f"{name} has shape {shape}; it must broadcast to the rows {rows}")


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
