"""The transformer block's inference operations: nothing for a backward, results into given memory, e4m3.

Tensors are on one device; contiguous ones are not copied. A CUDA graph may capture all of them. ``dependent=True``
(see :func:`ear_kernels.runtime.launching.dependent_launch`) is for calls that follow other kernels of a graph: the
parameters and nothing else is read before the kernel before has ended. It changes no result, GPUs before compute
capability 9 ignore it, and after and before a product of cuBLAS, which takes no part, it gains nothing.
torch.compile is not supported.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ear_kernels.ops.transformer import reference
from ear_kernels.runtime.backend import applies
from ear_kernels.runtime.checks import check_device, check_floating, compute_dtype, kernel_refusal, takes_tensors
from ear_kernels.runtime.launching import processor

E4M3 = torch.float8_e4m3fn
OUTPUTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@takes_tensors
@torch.no_grad()
def residual_norm(
    stream: Tensor,
    branches: Sequence[tuple[Tensor, Tensor | None]],
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    out_stream: Tensor | None = None,
    dtype: torch.dtype | None = None,
    scale: Tensor | None = None,
    dependent: bool = False,
) -> Tensor:
    """``LN(x)`` of ``x``, the residual stream plus what was added to it since it was written.

    Of a block's two norms one need not write x: the other can add both branches.

    Args:
        stream: ``[..., W]``, contiguous.
        branches: two at most, what attention or MLP made, ``[..., W]``, each with the bias ``[W]`` of the linear that
            made it, if that was left out there, or None.
        weight, bias: the norm's parameters, ``[W]``.
        eps: of the norm.
        out_stream: where x is written: shape and dtype of ``stream``, contiguous; may be ``stream``. Without it x is
            written nowhere.
        dtype: of ``LN(x)``: a floating-point one or float8_e4m3fn; None is the autocast dtype where autocast is on
            and otherwise that of the first branch, or of ``stream`` without one.
        scale: float32 ``[1]``, for float8_e4m3fn and nothing else: ``LN(x) / scale`` is given, saturated at +-448.
        dependent: see the module.

    Returns:
        ``LN(x)``, ``[..., W]``.

    Raises:
        ValueError: shapes, devices or memory that do not fit. TypeError: dtypes that do not fit.
    """
    _check_norm(stream, branches, weight, bias, out_stream)
    dtype = dtype or compute_dtype(branches[0][0] if branches else stream)
    _check_output(dtype, scale, stream, "stream")
    added = [tensor for branch in branches for tensor in branch]
    refusal = _refusal(stream, *added, weight, bias, dtype=dtype, widest=8192)
    if stream.shape[-1] > 1 and applies("residual_norm", stream, refusal):
        from ear_kernels.ops.transformer import launch_inference

        width = stream.shape[-1]
        out = stream.new_empty(stream.shape, dtype=dtype)
        rows = [
            (each.contiguous().view(-1, width), own if own is None else own.contiguous()) for each, own in branches
        ]
        target = None if out_stream is None else out_stream.view(-1, width)
        parameters = weight.contiguous(), bias.contiguous(), eps
        launch_inference.residual_norm(
            stream.view(-1, width), rows, *parameters, target, out.view(-1, width), scale, dependent
        )
        return out
    x, normed = reference.residual_norm(stream, branches, weight, bias, eps)
    if out_stream is not None:
        out_stream.copy_(x)
    return reference.e4m3(normed, scale, dtype)


@takes_tensors
@torch.no_grad()
def attention(
    qkv: Tensor,
    heads: int,
    *,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    dependent: bool = False,
) -> Tensor:
    """Bidirectional multi-head self-attention of what one linear made.

    Args:
        qkv: ``[G, S, 3W]``: query, key and value of a row one after another, each head after head.
        heads: number of heads.
        out: where to write: ``[G, S, W]``, contiguous, of dtype ``dtype``; not memory of ``qkv``.
        scale: float32 ``[1]``, for float8_e4m3fn and nothing else: the result divided by it is given, saturated at
            +-448.
        dtype: of the result: a floating-point one or float8_e4m3fn; None is that of ``out`` or of ``qkv``.
        dependent: see the module.

    Returns:
        ``[G, S, W]``. Float32, heads wider than 80 and a dtype that is neither that of ``qkv`` nor float8_e4m3fn
        take PyTorch's scaled_dot_product_attention.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: dtypes that do not fit.
    """
    check_floating("qkv", qkv)
    if qkv.ndim != 3 or heads < 1 or qkv.shape[2] % (3 * heads) or not qkv.shape[2]:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; for {heads} heads it must be [G, S, 3 * {heads} * D]")
    groups, length, triple = qkv.shape
    dtype = dtype or (qkv.dtype if out is None else out.dtype)
    _check_output(dtype, scale, qkv, "qkv")
    _check_memory("out", out, (groups, length, triple // 3), dtype, qkv, "qkv")
    if _attention_applies(qkv, heads, triple // 3, dtype):
        packed = qkv.contiguous()
        return _attention(packed, packed, heads, out, triple // 3, dtype, scale, dependent)
    query, kv = qkv.split((triple // 3, triple - triple // 3), -1)
    result = reference.attention_rows(query, kv, heads)
    return _into(out, reference.e4m3(_wide(result, scale), scale, dtype))


@takes_tensors
@torch.no_grad()
def attention_rows(
    query: Tensor, kv: Tensor, heads: int, *, out: Tensor | None = None, dependent: bool = False
) -> Tensor:
    """Multi-head attention of some queries to all keys, bidirectional.

    Args:
        query: ``[G, M, W]``, each head after head.
        kv: ``[G, S, 2W]``: key and value of a row one after another, each head after head; alike in dtype.
        heads: number of heads.
        out: where to write: shape and dtype of ``query``, contiguous; not memory of ``query`` or ``kv``.
        dependent: see the module.

    Returns:
        ``[G, M, W]``. Float32 and heads wider than 80 take PyTorch's scaled_dot_product_attention.

    Raises:
        ValueError: shapes or devices that do not fit, no keys. TypeError: dtypes that do not fit.
    """
    check_floating("query", query)
    check_floating("kv", kv)
    check_device("kv", kv, query, "query")
    if query.ndim != 3 or heads < 1 or query.shape[2] % heads or not query.shape[2]:
        raise ValueError(f"query has shape {tuple(query.shape)}; for {heads} heads it must be [G, M, {heads} * D]")
    groups, rows, width = query.shape
    if kv.ndim != 3 or kv.shape[0] != groups or kv.shape[2] != 2 * width or not kv.shape[1]:
        raise ValueError(
            f"kv has shape {tuple(kv.shape)}; it must be [{groups}, S, {2 * width}] with S of at least 1"
        )
    if kv.dtype != query.dtype:
        raise TypeError(f"kv has dtype {kv.dtype} and query {query.dtype}; they must be alike")
    _check_memory("out", out, (groups, rows, width), query.dtype, query, "query")
    if _attention_applies(query, heads, width, query.dtype):
        return _attention(query.contiguous(), kv.contiguous(), heads, out, width, query.dtype, None, dependent)
    return _into(out, reference.attention_rows(query, kv, heads))


@takes_tensors
@torch.no_grad()
def attention_cached(
    qkv: Tensor, cache: Tensor, place: Tensor, heads: int, *, out: Tensor | None = None, dependent: bool = False
) -> Tensor:
    """Causal multi-head attention of one new row of each sequence to the rows of a cache and itself.

    Args:
        qkv: ``[G, 3W]``: query, key and value of the new row one after another, each head after head.
        cache: ``[2, G, N, W]``, contiguous: keys, then values, alike in dtype; the new row's are written into it.
        place: int64 ``[1]``: how many rows are there, 0 to N - 1, which is the new row's place. It is not checked,
            which would wait for the device; a CUDA graph reads it at replay.
        heads: number of heads.
        out: where to write: ``[G, W]`` in the dtype of ``qkv``, contiguous; not memory of ``qkv`` or ``cache``.
        dependent: see the module.

    Returns:
        ``[G, W]``. Float64 takes PyTorch's scaled_dot_product_attention.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: dtypes that do not fit.
    """
    check_floating("qkv", qkv)
    check_floating("cache", cache)
    for name, tensor in (("cache", cache), ("place", place)):
        check_device(name, tensor, qkv, "qkv")
    if qkv.ndim != 2 or heads < 1 or qkv.shape[1] % (3 * heads) or not qkv.shape[1]:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; for {heads} heads it must be [G, {3 * heads} * D]")
    groups, width = qkv.shape[0], qkv.shape[1] // 3
    if cache.ndim != 4 or (cache.shape[:2], cache.shape[3]) != ((2, groups), width) or not cache.shape[2]:
        raise ValueError(f"cache has shape {tuple(cache.shape)}; it must be [2, {groups}, N, {width}], N at least 1")
    if not cache.is_contiguous():
        raise ValueError(f"cache has strides {cache.stride()}; it must be contiguous")
    if cache.dtype != qkv.dtype:
        raise TypeError(f"cache has dtype {cache.dtype} and qkv {qkv.dtype}; they must be alike")
    if place.dtype != torch.int64 or tuple(place.shape) != (1,):
        raise TypeError(f"place is {place.dtype} {tuple(place.shape)}; it must be int64 [1]")
    _check_memory("out", out, (groups, width), qkv.dtype, qkv, "qkv")
    if applies("inference_attention", qkv, kernel_refusal(qkv, cache)):
        from ear_kernels.ops.transformer import launch_inference

        out = qkv.new_empty(groups, width) if out is None else out
        launch_inference.attention_cached(qkv.contiguous(), cache, place, heads, out, dependent)
        return out
    return _into(out, reference.attention_cached(qkv, cache, place, heads))


@takes_tensors
@torch.no_grad()
def quantise_e4m3(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` as float8_e4m3fn with one scale: its largest magnitude becomes 448.

    Args:
        weight: any shape, finite.

    Returns:
        float8_e4m3fn of the shape of ``weight``, contiguous, and the scale, float32 ``[1]``: the product of both is
        about ``weight``. The scale of zeros is 1.

    Raises:
        TypeError: not a floating-point tensor. ValueError: it is empty or not finite.
    """
    check_floating("weight", weight)
    if not weight.numel():
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must have elements")
    largest = weight.abs().amax().float()
    if not torch.isfinite(largest):
        raise ValueError(f"the largest magnitude of weight is {largest.item()}; weight must be finite")
    scale = torch.where(largest > 0, largest / torch.finfo(E4M3).max, 1.0).clamp(min=torch.finfo(torch.float32).tiny)
    return reference.e4m3(weight.float().contiguous(), scale, E4M3), scale.view(1)


def _attention(
    query: Tensor,
    kv: Tensor,
    heads: int,
    out: Tensor | None,
    width: int,
    dtype: torch.dtype,
    scale: Tensor | None,
    dependent: bool,
) -> Tensor:
    from ear_kernels.ops.transformer import launch_inference

    out = query.new_empty((*query.shape[:2], width), dtype=dtype) if out is None else out
    launch_inference.attention(query, kv, heads, out, scale, dependent)
    return out


def _attention_applies(query: Tensor, heads: int, width: int, dtype: torch.dtype) -> bool:
    """Whether our kernels take it; PyTorch's are no eager reference, so that a demand for Triton refuses nothing."""
    halves = (torch.float16, torch.bfloat16)
    fits = query.dtype in halves and dtype in (query.dtype, E4M3) and width // heads <= 80
    # A CUDA grid's second axis ends at 65,535; heads of 80 spill on AMD's wide waves.
    fits = fits and query.shape[0] * heads <= 65535 and (width // heads <= 64 or not processor(query).is_amd)
    return fits and applies("inference_attention", query, _refusal(query, dtype=dtype))


def _refusal(first: Tensor, *tensors: Tensor | None, dtype: torch.dtype, widest: int | None = None) -> str | None:
    """Why the kernels cannot take these tensors and write ``dtype``."""
    if dtype == torch.float64:
        return "an output of float64 (the kernels compute in float32)"
    if dtype == E4M3 and processor(first).major < 9:
        return "an output of float8_e4m3fn before compute capability 9"
    return kernel_refusal(first, *tensors, widest=widest)


def _wide(x: Tensor, scale: Tensor | None) -> Tensor:
    """In at least float32 where it will be scaled."""
    return x if scale is None else x.to(torch.promote_types(x.dtype, torch.float32))


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result)


def _check_scale(name: str, scale: Tensor, like: Tensor, like_name: str) -> None:
    check_floating(name, scale)
    check_device(name, scale, like, like_name)
    if scale.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {scale.dtype}; it must be float32")
    if tuple(scale.shape) != (1,):
        raise ValueError(f"{name} has shape {tuple(scale.shape)}; it must be [1]")


def _check_output(dtype: torch.dtype, scale: Tensor | None, like: Tensor, like_name: str) -> None:
    if dtype not in (*OUTPUTS, E4M3):
        raise TypeError(f"dtype is {dtype}; it must be one of {', '.join(map(str, (*OUTPUTS, E4M3)))}")
    if (dtype == E4M3) != (scale is not None):
        raise TypeError(
            f"dtype is {dtype} and scale is {'None' if scale is None else 'given'}; "
            f"a scale is for {E4M3}, which needs one"
        )
    if scale is not None:
        _check_scale("scale", scale, like, like_name)


def _check_memory(
    name: str, out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor, like_name: str
) -> None:
    if out is None:
        return
    check_floating(name, out)
    check_device(name, out, like, like_name)
    if out.dtype != dtype:
        raise TypeError(f"{name} has dtype {out.dtype}; it must be {dtype}")
    if tuple(out.shape) != shape or not out.is_contiguous():
        how = "" if out.is_contiguous() else ", not contiguous"
        raise ValueError(f"{name} has shape {tuple(out.shape)}{how}; it must be {list(shape)}, contiguous")


def _check_norm(
    stream: Tensor,
    branches: Sequence[tuple[Tensor, Tensor | None]],
    weight: Tensor,
    bias: Tensor,
    out_stream: Tensor | None,
) -> None:
    check_floating("stream", stream)
    if stream.ndim < 1 or not stream.is_contiguous():
        raise ValueError(f"stream has shape {tuple(stream.shape)}; it must be [..., W], contiguous")
    named: dict[str, Any] = {"weight": weight, "bias": bias}
    if not isinstance(branches, list | tuple):
        raise TypeError(f"branches is a {type(branches).__name__}; it must be a list of (tensor, bias or None)")
    if len(branches) > 2:
        raise ValueError(f"branches has {len(branches)} items; two at most can be added")
    for place, branch in enumerate(branches):
        if not isinstance(branch, tuple) or len(branch) != 2:
            raise TypeError(f"branches[{place}] is a {type(branch).__name__}; it must be (tensor, bias or None)")
        named |= {f"branches[{place}][{part}]": tensor for part, tensor in enumerate(branch)}
    if out_stream is not None and not branches:
        raise ValueError("out_stream is given without branches; it is for what is added to the stream")
    for name, tensor in named.items():
        if tensor is None and name.endswith("][1]"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; it must be a tensor")
        check_floating(name, tensor)
        check_device(name, tensor, stream, "stream")
        wanted = stream.shape if name.endswith("][0]") else stream.shape[-1:]
        if tensor.shape != wanted:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {list(wanted)}")
    _check_memory("out_stream", out_stream, tuple(stream.shape), stream.dtype, stream, "stream")
