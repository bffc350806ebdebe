"""Residual add + LayerNorm and the GELU of inference: nothing is kept for a backward, and rows may go out as e4m3.

Legend: R rows of width W. ``out_scale`` is a float32 number on the device or None: with it ``out`` is e4m3 and gets
values divided by it, which the GPU's conversion saturates at +-448. DEPENDENT: the kernel may start before the one
before it in the stream has ended, and reads nothing but parameters until that has.

Every load is cast to float32 at once (see ``ops/generator/kernels_adaln.py``).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ear_kernels.ops.transformer.kernels import _normal


@triton.jit
def _chunk(pointer, index, CHUNK: tl.constexpr, WIDTH: tl.constexpr):
    cols = index * CHUNK + tl.arange(0, CHUNK)[None, :]
    return tl.load(pointer + cols, mask=cols < WIDTH, other=0.0).to(tl.float32)


@triton.jit
def _parameter(pointer, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """The chunks ``[1, CHUNK]`` of a vector ``[W]``."""
    parts = ()
    for index in tl.static_range(CHUNKS):
        parts += (_chunk(pointer, index, CHUNK, WIDTH),)
    return parts


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def residual_norm_kernel(
    branch,  # [R, W], or None
    branch_bias,  # [W], added to branch, or None
    stream,  # [R, W]
    weight,  # [W]
    bias,  # [W]
    out_scale,
    out_stream,  # [R, W], out, with branch: stream + branch + branch_bias (may be stream's memory)
    out,  # [R, W], out: LN of it
    rows,
    rows_per_program,
    eps,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    HELD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Programs take runs of ``rows_per_program`` rows, ROWS at a time, and of a row CHUNKS of CHUNK columns.

    With a warp a row, whose chunk is 4 columns a thread, nothing goes through shared memory.
    """
    if HELD:
        w = _parameter(weight, CHUNK, CHUNKS, WIDTH)
        b = _parameter(bias, CHUNK, CHUNKS, WIDTH)
        if branch_bias is not None:
            added = _parameter(branch_bias, CHUNK, CHUNKS, WIDTH)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    factor = 1.0
    if out_scale is not None:
        factor = 1.0 / tl.load(out_scale)
    begin = tl.program_id(0) * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        base = row.to(tl.int64) * WIDTH
        parts = ()
        others = ()
        for index in tl.static_range(CHUNKS):
            cols = index * CHUNK + tl.arange(0, CHUNK)[None, :]
            inside = (cols < WIDTH) & (row < end)
            parts += (tl.load(stream + base + cols, mask=inside, other=0.0).to(tl.float32),)
            if branch is not None:
                others += (tl.load(branch + base + cols, mask=inside, other=0.0).to(tl.float32),)
        if branch is not None:
            sums = ()
            for index in tl.static_range(CHUNKS):
                cols = index * CHUNK + tl.arange(0, CHUNK)[None, :]
                y = others[index]
                if branch_bias is not None:
                    y += added[index] if HELD else _chunk(branch_bias, index, CHUNK, WIDTH)
                x = (parts[index] + y).to(out_stream.dtype.element_ty)
                tl.store(out_stream + base + cols, x, mask=(cols < WIDTH) & (row < end))
                sums += (x.to(tl.float32),)
            parts = sums
        total = parts[0]
        for index in tl.static_range(1, CHUNKS):
            total += parts[index]
        mu = tl.sum(total, 1)[:, None] / WIDTH
        squares = tl.zeros([ROWS, CHUNK], tl.float32)
        for index in tl.static_range(CHUNKS):
            cols = index * CHUNK + tl.arange(0, CHUNK)[None, :]
            centred = tl.where(cols < WIDTH, parts[index] - mu, 0.0)
            squares += centred * centred
        rs = 1.0 / tl.sqrt(tl.sum(squares, 1)[:, None] / WIDTH + eps)
        for index in tl.static_range(CHUNKS):
            cols = index * CHUNK + tl.arange(0, CHUNK)[None, :]
            w_C = w[index] if HELD else _chunk(weight, index, CHUNK, WIDTH)
            b_C = b[index] if HELD else _chunk(bias, index, CHUNK, WIDTH)
            normed = (parts[index] - mu) * rs * w_C + b_C
            if out_scale is not None:
                normed *= factor
            tl.store(out + base + cols, normed.to(out.dtype.element_ty), mask=(cols < WIDTH) & (row < end))


@triton.jit(do_not_specialize=["per_program"])
def gelu_kernel(
    pre,  # [N]
    out_scale,
    out,  # [N], out
    count,
    per_program,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Programs take ``per_program`` blocks each, one after another."""
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    factor = 1.0
    if out_scale is not None:
        factor = 1.0 / tl.load(out_scale)
    place = tl.cast(tl.program_id(0), tl.int64) * per_program * BLOCK + tl.arange(0, BLOCK)
    next_h = tl.load(pre + place, mask=place < count)
    for index in range(per_program):
        h = next_h.to(tl.float32)
        ahead = place + BLOCK
        # The next block is loaded, into registers, before this one is computed.
        next_h = tl.load(pre + ahead, mask=(ahead < count) & (index + 1 < per_program))
        cumulative, _ = _normal(h, out.dtype.element_ty != tl.float32)
        y = h * cumulative
        if out_scale is not None:
            y *= factor
        tl.store(out + place, y.to(out.dtype.element_ty), mask=place < count)
        place = ahead
