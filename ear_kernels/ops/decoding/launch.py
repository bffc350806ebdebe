"""Launches of the small parts of a decoding step. Imports Triton."""

import torch
from torch import Tensor

from ear_kernels.ops.decoding import kernels
from ear_kernels.runtime.launching import ceil_div, launch, next_power_of_two, row_warps

COLUMNS = 1024
"""Columns of a row that a program copies."""


def _blocks(width: int) -> dict[str, int]:
    return {"WIDTH": width, "BLOCK": next_power_of_two(width), "num_warps": row_warps(width)}


def predicted_rows(
    stream: Tensor,
    orders: Tensor,
    left: Tensor,
    count: int,
    prefix: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    sequences, length, width = stream.shape
    rows = orders.new_empty(sequences * count)
    gathered, normed = stream.new_empty(len(rows), width), stream.new_empty((len(rows), width), dtype=dtype)
    launch(
        kernels.predicted_rows_kernel, (len(rows),), stream, orders, left, weight, bias, rows, gathered, normed,
        orders.shape[0], count, length, orders.shape[1], prefix, eps, on=stream, **_blocks(width),
    )  # fmt: skip
    return rows, gathered, normed


def guided_norm(
    branch: Tensor,
    branch_bias: Tensor,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    guidance: tuple[Tensor | None, Tensor, int],
    eps: float,
) -> Tensor:
    scales, left, count = guidance
    half = len(rows) if scales is None else len(rows) // 2
    hidden = rows.new_empty(half, rows.shape[1])
    launch(
        kernels.guided_norm_kernel, (half,), branch, branch_bias, rows, weight, bias, scales, left, hidden, half,
        count, eps, on=rows, **_blocks(rows.shape[1]),
    )  # fmt: skip
    return hidden


def write_tokens(
    sampled: Tensor,
    tokens: Tensor,
    start: Tensor,
    rows: Tensor,
    prefix: int,
    embed: tuple[Tensor, Tensor],
    position: Tensor,
    norm: tuple[Tensor, Tensor, float],
    dtype: torch.dtype,
) -> Tensor:
    count, size = sampled.shape
    length, width = start.shape[1:]
    normed = start.new_empty((count, width), dtype=dtype)
    launch(
        kernels.write_tokens_kernel, (count,), sampled, tokens, start, rows, *embed, position, *norm[:2], normed,
        length, tokens.shape[1], prefix, count, norm[2], on=start,
        D=size, GUIDED=len(rows) > count, BLOCK_D=min(16, next_power_of_two(size)), **_blocks(width),
    )  # fmt: skip
    return normed


def write_rows(values: Tensor, target: Tensor, rows: Tensor, left: Tensor, count: int) -> None:
    sources, width = values.shape
    block = min(COLUMNS, next_power_of_two(width))
    launch(
        kernels.write_rows_kernel, (len(rows), ceil_div(width, block)), values, target, rows, left, sources, count,
        on=values, N=width, BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip
