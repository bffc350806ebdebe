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
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Programs take runs of ``rows_per_program`` rows, ROWS at a time."""
    cols = tl.arange(0, BLOCK)[None, :]
    live = cols < WIDTH
    w_W = tl.load(weight + cols, mask=live, other=0.0).to(tl.float32)
    b_W = tl.load(bias + cols, mask=live, other=0.0).to(tl.float32)
    if branch_bias is not None:
        bb_W = tl.load(branch_bias + cols, mask=live, other=0.0).to(tl.float32)
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    factor = 1.0
    if out_scale is not None:
        factor = 1.0 / tl.load(out_scale)
    begin = tl.program_id(0) * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        place = row.to(tl.int64) * WIDTH + cols
        inside = live & (row < end)
        x = tl.load(stream + place, mask=inside, other=0.0).to(tl.float32)
        if branch is not None:
            y = tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
            if branch_bias is not None:
                y += bb_W
            x = (x + y).to(out_stream.dtype.element_ty)
            tl.store(out_stream + place, x, mask=inside)
            x = x.to(tl.float32)
        mu = tl.sum(x, 1) / WIDTH
        centred = tl.where(live, x - mu[:, None], 0.0)
        rs = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
        normed = centred * rs[:, None] * w_W + b_W
        if out_scale is not None:
            normed *= factor
        tl.store(out + place, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count", "per_program"])
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
