"""Linears of a transformer block for inference, with what follows them: shapes, dtypes, checks, errors.

None of them has a backward; calls that would need one are refused. Operands are floating-point tensors of one dtype,
or both e4m3 (``torch.float8_e4m3fn``) with their scales.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ear_kernels.runtime.backend import applies
from ear_kernels.runtime.checks import check_device, check_floating, takes_tensors
from ear_kernels.runtime.launching import is_describable, is_on_hopper

E4M3 = torch.float8_e4m3fn
E4M3_LARGEST = 448.0
"""The largest e4m3 number; results beyond it become it."""


@takes_tensors
def linear_gelu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    dependent: bool = False,
) -> Tensor:
    """``GELU(x W^T + bias)``, GELU the exact one, without a backward.

    Args:
        x: ``[R, K]``.
        weight: ``[N, K]``, of the dtype of ``x``.
        bias: ``[N]`` or None.
        scales: of ``x`` and of ``weight``, float32 ``[1]`` on their device, where those are e4m3: the numbers meant
            are the e4m3 ones times the scale.
        out_scale: float32 ``[1]``, for a result in e4m3, which it was divided by. Results beyond 448 times it become
            that.
        dtype: of the result: that of ``x`` or e4m3; with e4m3 operands bfloat16 (if None), float16, float32 or e4m3.
        out: ``[R, N]`` in that dtype, contiguous; written and returned.
        dependent: the kernel may start while the one before it in the stream runs (programmatic dependent launch,
            where a kernel of this package is launched on Hopper). Meanwhile it reads the parameters: weight, bias and
            the weight's scale must not be written by that kernel. It waits for its end before it reads ``x`` or
            writes. Not for a call whose stream waits for an event since the last kernel.

    Returns:
        ``[R, N]``.

    Raises:
        ValueError: shapes, devices, scales or an ``out`` that do not fit; a gradient would be needed.
        TypeError: dtypes that do not fit.
    """
    return _linear("linear_gelu", x, weight, bias, scales, out_scale, dtype, out, dependent)


@takes_tensors
def linear_inference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    out_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    dependent: bool = False,
) -> Tensor:
    """``x W^T + bias``, without a backward; arguments, result and errors are those of :func:`linear_gelu`."""
    return _linear("linear_inference", x, weight, bias, scales, out_scale, dtype, out, dependent)


def _linear(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: tuple[Tensor, Tensor] | None,
    out_scale: Tensor | None,
    dtype: torch.dtype | None,
    out: Tensor | None,
    dependent: bool,
) -> Tensor:
    _check(name, x, weight, bias)
    dtype = _check_scales(x, scales, out_scale, dtype)
    shape = (x.shape[0], weight.shape[0])
    if out is not None:
        check_device("out", out, x, "x")
        if out.dtype != dtype:
            raise TypeError(f"out has dtype {out.dtype}; it must be {dtype}")
        if out.shape != shape or not out.is_contiguous():
            raise ValueError(
                f"out has shape {tuple(out.shape)} and strides {out.stride()}; it must be {list(shape)}, contiguous"
            )
    if not torch.compiler.is_compiling() and applies(name, x, _refusal(x, weight, out, dtype)):
        from ear_kernels.ops.transformer import launch_linear

        scale_x, scale_weight = scales or (None, None)
        given = launch_linear.Scales(scale_x, scale_weight, out_scale)
        return launch_linear.linear(x, weight, bias, out, dtype, given, name == "linear_gelu", dependent)
    result = _reference(x, weight, bias, scales, out_scale, dtype, name == "linear_gelu")
    return result if out is None else out.copy_(result)


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: tuple[Tensor, Tensor] | None,
    out_scale: Tensor | None,
    dtype: torch.dtype,
    gelu: bool,
) -> Tensor:
    """In plain PyTorch, e4m3 operands as float32."""
    if scales is not None:
        x, weight = (tensor.float() * scale for tensor, scale in zip((x, weight), scales, strict=True))
        bias = None if bias is None else bias.float()
    result = F.linear(x, weight, bias)
    result = F.gelu(result) if gelu else result
    if out_scale is not None:
        result = (result / out_scale).clamp(-E4M3_LARGEST, E4M3_LARGEST)
    return result.to(dtype)


def _refusal(x: Tensor, weight: Tensor, out: Tensor | None, dtype: torch.dtype) -> str | None:
    """Why the kernels, and the static table before them, do not take a call."""
    if x.dtype not in (torch.float16, torch.bfloat16, E4M3):
        return f"dtype {x.dtype} (the kernels take float16, bfloat16 and e4m3)"
    if E4M3 in (x.dtype, dtype) and not is_on_hopper(x):
        return "e4m3 on a device that is not of compute capability 9"
    matrices = (x, weight) if out is None else (x, weight, out)
    row_of_out = weight.shape[0] * min(dtype.itemsize, x.element_size())
    if x.shape[1] == 0 or row_of_out % 16 or (x.shape[0] and not is_describable(*matrices)):
        return "matrices of which not every row starts at a multiple of 16 bytes"
    return None


def _refuse_gradients(name: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError(f"{name} has no backward and got a tensor that requires a gradient; use torch.no_grad()")


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floating("x", x)
    check_floating("weight", weight)
    check_device("weight", weight, x, "x")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; they must be [R, K] and [N, K]"
        )
    if x.dtype != weight.dtype:
        raise TypeError(f"x has dtype {x.dtype} and weight {weight.dtype}; they must be alike")
    if bias is not None:
        check_floating("bias", bias)
        check_device("bias", bias, x, "x")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be {[weight.shape[0]]}")
        if x.dtype != E4M3 and bias.dtype != x.dtype:
            raise TypeError(f"bias has dtype {bias.dtype} and x {x.dtype}; they must be alike")
    _refuse_gradients(name, x, weight, bias)


def _check_scales(
    x: Tensor, scales: tuple[Tensor, Tensor] | None, out_scale: Tensor | None, dtype: torch.dtype | None
) -> torch.dtype:
    """The result's dtype."""
    narrow = x.dtype == E4M3
    if narrow != (scales is not None):
        given = "given" if scales else "not given"
        raise ValueError(f"x has dtype {x.dtype} and scales are {given}; e4m3 alone has scales")
    dtype = dtype or (torch.bfloat16 if narrow else x.dtype)
    if dtype not in ((torch.bfloat16, torch.float16, torch.float32, E4M3) if narrow else (x.dtype, E4M3)):
        raise TypeError(f"dtype is {dtype} for operands in {x.dtype}; another dtype but e4m3 needs e4m3 operands")
    if (dtype == E4M3) != (out_scale is not None):
        given = "given" if out_scale is not None else "not given"
        raise ValueError(f"dtype is {dtype} and out_scale {given}; e4m3 alone has one")
    scale_x, scale_weight = scales or (None, None)
    for name, scale in {"scales[0]": scale_x, "scales[1]": scale_weight, "out_scale": out_scale}.items():
        if scale is not None:
            check_floating(name, scale)
            check_device(name, scale, x, "x")
            if scale.dtype != torch.float32 or scale.shape != (1,):
                raise ValueError(f"{name} is {scale.dtype} {tuple(scale.shape)}; it must be float32 (1,)")
    return dtype
