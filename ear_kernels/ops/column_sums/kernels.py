"""Sums of a matrix's columns in a fixed order."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "rows_per_program"])
def column_sums_kernel(
    x,  # [R, N], rows stride_x apart
    out,  # [programs of axis 1, N], out
    rows,
    rows_per_program,
    stride_x,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Axis 0 of the grid: COLS columns; axis 1: ``rows_per_program`` rows (a multiple of ROWS).

    A tile is tall and narrow, its rows just long enough for the memory's sectors: a few thousand columns then fill
    the GPU, and every thread has all its loads under way at once.
    """
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    live = cols < N
    offsets = tl.arange(0, ROWS)
    begin = tl.program_id(1) * rows_per_program
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(begin, tl.minimum(begin + rows_per_program, rows), ROWS):
        row = first + offsets
        place = x + row.to(tl.int64)[:, None] * stride_x + cols[None, :]
        total += tl.load(place, mask=(row < rows)[:, None] & live[None, :], other=0.0).to(tl.float32)
    # In steps: the interpreter adds rows one after another, whose error grows with their number.
    eighth = tl.sum(tl.reshape(total, [8, ROWS // 8, COLS]), 0)
    sums = tl.sum(tl.sum(tl.reshape(eighth, [ROWS // 128, 16, COLS]), 1), 0)
    tl.store(out + tl.program_id(1).to(tl.int64) * N + cols, sums.to(out.dtype.element_ty), mask=live)
