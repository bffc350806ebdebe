"""Residual add + LayerNorm of inference: nothing is kept for a backward, and rows may go out as e4m3.

Legend: R rows of width W. ``out_scale`` is a float32 number on the device or None: with it ``out`` is e4m3 and gets
values divided by it, which the GPU's conversion saturates at +-448. DEPENDENT: the kernel may start before the one
before it in the stream has ended, and reads nothing but parameters until that has.

Every load is cast to float32 at once (see ``ops/generator/kernels_adaln.py``).
"""

from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _chunk(row, index, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    """A chunk of a row, or of a parameter, zero outside."""
    cols = index * CHUNK + tl.arange(0, CHUNK)
    return tl.load(row + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _chunks(row, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    parts: "Any" = ()  # noqa: UP037 (Triton would look up a name)
    for index in tl.static_range(CHUNKS):
        parts += (_chunk(row, index, CHUNK, WIDTH),)
    return parts


@triton.jit
def residual_norm_kernel(
    branch,  # [R, W], or None
    branch_bias,  # [W], with branch, or None
    second,  # as branch, with it, or None
    second_bias,
    stream,  # [R, W]
    weight,  # [W]
    bias,  # [W]
    out_scale,
    out_stream,  # [R, W], out: x, the sum of these (may be stream's memory); or None
    out,  # [R, W], out: LN(x)
    eps,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A row a program, in CHUNKS of CHUNK columns: of 4 columns a thread, what the stream's loads and stores take at
    once, so that no chunk changes its layout on the way from the bfloat16 branch."""
    w = _chunks(weight, CHUNK, CHUNKS, WIDTH)
    b = _chunks(bias, CHUNK, CHUNKS, WIDTH)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    start = tl.program_id(0).to(tl.int64) * WIDTH
    total = tl.zeros([CHUNK], tl.float32)
    # All loads before the first store, which might be of the same memory for all that the compiler knows.
    old = _chunks(stream + start, CHUNK, CHUNKS, WIDTH)
    if branch is not None:
        added = _chunks(branch + start, CHUNK, CHUNKS, WIDTH)
    if second is not None:
        added_too = _chunks(second + start, CHUNK, CHUNKS, WIDTH)
    parts: "Any" = ()  # noqa: UP037
    for index in tl.static_range(CHUNKS):
        x = old[index]
        if branch is not None:
            x += added[index]
        if branch_bias is not None:
            x += _chunk(branch_bias, index, CHUNK, WIDTH)
        if second is not None:
            x += added_too[index]
        if second_bias is not None:
            x += _chunk(second_bias, index, CHUNK, WIDTH)
        low = x.to(stream.dtype.element_ty)
        if out_stream is not None:
            cols = index * CHUNK + tl.arange(0, CHUNK)
            tl.store(out_stream + start + cols, low, mask=cols < WIDTH)
        x = low.to(tl.float32)
        parts += (x,)
        total += x
    mu = tl.sum(total, 0) / WIDTH
    squares = tl.zeros([CHUNK], tl.float32)
    for index in tl.static_range(CHUNKS):
        centred = tl.where(index * CHUNK + tl.arange(0, CHUNK) < WIDTH, parts[index] - mu, 0.0)
        squares += centred * centred
    rs = 1.0 / tl.sqrt(tl.sum(squares, 0) / WIDTH + eps)
    factor = 1.0
    if out_scale is not None:
        factor = 1.0 / tl.load(out_scale)
    for index in tl.static_range(CHUNKS):
        cols = index * CHUNK + tl.arange(0, CHUNK)
        normed = (parts[index] - mu) * rs * w[index] + b[index]
        tl.store(out + start + cols, (normed * factor).to(out.dtype.element_ty), mask=cols < WIDTH)
