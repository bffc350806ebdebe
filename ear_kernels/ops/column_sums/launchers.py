"""The launcher of the column sums. Imports Triton."""

import torch
from torch import Tensor

from ear_kernels.launch import ceil_div
from ear_kernels.ops.column_sums import kernels

TILE = 8192
"""Elements of a tile: 32 a thread for 8 warps."""

WARPS = 8
SPLIT_ROWS = 4096
"""More rows than this are summed in two stages."""

FIRST_STAGE_PROGRAMS = 528
"""Programs of the first of two stages: 4 for each of an H200's SMs; a constant for the order of the sums."""


def tile_of(width: int, itemsize: int) -> tuple[int, int]:
    """(rows, columns) of a tile: 64 bytes a row, or 16 elements of a narrow one."""
    columns = min(64 // itemsize, max(16, 1 << max(width - 1, 0).bit_length()))
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
        kernels.column_sums_kernel[(tiles, splits)](
            matrix,
            out,
            rows,
            rows_per_program,
            matrix.stride(0),
            N=width,
            ROWS=tile_rows,
            COLS=tile_columns,
            num_warps=WARPS,
        )
        if splits == 1:
            return out.view(x.shape[1:])
        matrix, rows = out, splits
