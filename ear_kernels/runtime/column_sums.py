"""Sums of a matrix's columns in a fixed order: the kernel and its launch. Imports Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ear_kernels.runtime.launching import ceil_div, launch, next_power_of_two

TILE = 8192
"""Elements of a tile: 32 a thread for 8 warps."""

WARPS = 8
SPLIT_ROWS = 4096
"""More rows than this are summed in two stages."""

FIRST_STAGE_PROGRAMS = 528
"""Programs of the first of two stages: 4 for each of an H200's SMs; a constant for the order of the sums."""


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


def tile_of(width: int, itemsize: int) -> tuple[int, int]:
    """(rows, columns) of a tile: 64 bytes a row, or 16 elements of a narrow one."""
    columns = min(64 // itemsize, max(16, next_power_of_two(width)))
    return TILE // columns, columns


def column_sums(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``x.sum(0)`` of ``x [R, ...]``, summed in float32 in an order that depends on shape and strides only.

    torch's reduction takes 10 us and more for the tall thin matrices of partial sums that our kernels leave.
    """
    matrix = x.flatten(1)
    if matrix.stride(1) != 1 and matrix.shape[1] > 1:
        matrix = matrix.contiguous()
    rows, width = matrix.shape
    if rows == 0 or width == 0:
        return x.new_zeros(x.shape[1:], dtype=dtype)
    while True:
        tile_rows, tile_columns = tile_of(width, matrix.element_size())
        tiles = ceil_div(width, tile_columns)
        splits = 1
        if rows > SPLIT_ROWS:
            splits = min(ceil_div(rows, tile_rows), max(1, FIRST_STAGE_PROGRAMS // tiles))
        rows_per_program = ceil_div(ceil_div(rows, splits), tile_rows) * tile_rows
        splits = ceil_div(rows, rows_per_program)
        out = matrix.new_empty((splits, width), dtype=torch.float32 if splits > 1 else dtype)
        launch(
            column_sums_kernel,
            (tiles, splits),
            matrix,
            out,
            rows,
            rows_per_program,
            matrix.stride(0),
            on=matrix,
            N=width,
            ROWS=tile_rows,
            COLS=tile_columns,
            num_warps=WARPS,
        )
        if splits == 1:
            return out.view(x.shape[1:])
        matrix, rows = out, splits
