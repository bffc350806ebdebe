"""Launches of the norm's, the GELU's and the heads' kernels. Imports Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ear_kernels.ops.transformer import kernels
from ear_kernels.runtime.column_sums import column_sums
from ear_kernels.runtime.launching import RowConfig, ceil_div, launch, next_power_of_two, row_grid, row_warps

PROGRAMS = 528
"""Programs of a backward kernel over rows: 4 for each of an H200's SMs; a constant for the order of its sums."""

COLUMNS = 1024
"""Columns of the MLP's inner width that a program takes."""

GELU_PROGRAMS = 2112
"""Most runs of rows that the GELU's forward takes."""

STEPS = 2**16


@dataclass(frozen=True)
class Dropout:
    """What forward and backward draw the same mask from.

    Args:
        seed: int64 ``[1]``; None where nothing is dropped.
        threshold: of 16 random bits; an element below is dropped.
        scale: of what is kept.
    """

    seed: Tensor | None
    threshold: int
    scale: float

    @classmethod
    def of(cls, probability: float, seed: Tensor | None, device: torch.device) -> Dropout:
        """A probability rounded to 1 / 65536; a seed that is needed and not given comes from torch's generator."""
        threshold = round(probability * STEPS)
        if threshold and seed is None:
            seed = torch.randint(2**31, (1,), device=device)
        return cls(seed if threshold else None, threshold, 1 / (1 - threshold / STEPS))


def norm_forward_warps(width: int) -> int:
    """Within 2 % of the fastest on an H200 at 768, 1,024 and 1,280 (benchmarks/sweep_transformer.py)."""
    return 4 if 1024 < width <= 2048 else row_warps(width)


def norm_backward_config(width: int) -> RowConfig:
    """Within 2 % of the fastest there of 12 to 40 launches each."""
    if 1024 < width <= 2048:
        return RowConfig(4, 4, PROGRAMS)
    return RowConfig(row_warps(width), 3, 396 if width == 1024 else PROGRAMS)


def add_norm(
    branch: Tensor | None,
    branch_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    dropout: Dropout,
    eps: float,
    dtype: torch.dtype,
    normed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(x, LN(x) in ``dtype``, mean, rstd) for contiguous ``branch, residual [R, W]``.

    Without a branch x is the residual itself. With ``normed [R, W]`` that gets ``(x - mean) rstd``, and the mean is
    None.
    """
    rows, width = residual.shape
    added = None if branch is None else residual.new_empty((rows, width))
    out = residual.new_empty((rows, width), dtype=dtype)
    mean = residual.new_empty(rows, dtype=torch.float32) if normed is None else None
    rstd = residual.new_empty(rows, dtype=torch.float32)
    if rows:
        launch(
            kernels.dropout_add_layer_norm_fwd_kernel, (rows,), branch, branch_bias, residual, weight, bias,
            dropout.seed, added, out, mean, rstd, normed, dropout.threshold, dropout.scale, eps, on=out,
            WIDTH=width, BLOCK=max(8, next_power_of_two(width)), num_warps=norm_forward_warps(width),
        )  # fmt: skip
    return residual if added is None else added, out, mean, rstd


def norm_partials(x: Tensor, sums: int) -> Tensor:
    """float32 ``[programs, sums, W]`` for what the backward of norm or addition over ``x [R, W]`` sums up."""
    rows, width = x.shape
    if rows == 0:
        return x.new_zeros((1, sums, width), dtype=torch.float32)
    programs, _ = row_grid(rows, norm_backward_config(width).programs)
    return x.new_empty((programs, sums, width), dtype=torch.float32)


def add_norm_backward(
    grad_out: Tensor,
    grad_x: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    dropout: Dropout,
    dtype: torch.dtype | None,
    partials: Tensor,
    recompute: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Gradients of branch (in ``dtype``; None, as that is, without a branch) and residual.

    What sums up to the gradients of weight, bias and branch_bias is written to ``partials [programs, 3, W]`` (without
    a branch ``[programs, 2, W]``) of :func:`norm_partials`, or a part of them. Without a mean ``x`` is
    ``(x - mean) rstd`` and ``recompute`` is (bias, out): out, which may be the memory of ``x``, gets LN(x).
    """
    rows, width = x.shape
    bias, recomputed = recompute if recompute is not None else (None, None)
    grad_branch = None if dtype is None else x.new_empty((rows, width), dtype=dtype)
    # Alike in dtype to the stream, of which x may be no more than its normed rows.
    grad_residual = x.new_empty((rows, width)) if grad_x is None or recompute is None else torch.empty_like(grad_x)
    if rows == 0:
        return grad_branch, grad_residual
    config = norm_backward_config(width)
    programs, rows_per_program = row_grid(rows, config.programs)
    grad_x = None if grad_x is None else grad_x.contiguous()
    launch(
        kernels.dropout_add_layer_norm_bwd_kernel, (programs,), grad_out.contiguous(), grad_x, x, weight, bias,
        mean, rstd, dropout.seed, grad_residual, grad_branch, recomputed, partials, rows, rows_per_program,
        partials.stride(0), dropout.threshold, dropout.scale, on=x,
        WIDTH=width, BLOCK=max(8, next_power_of_two(width)), STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return grad_branch, grad_residual


def dropout_add_(x: Tensor, branch: Tensor, branch_bias: Tensor | None, dropout: Dropout) -> None:
    """``x += dropout(branch + branch_bias)`` for contiguous ``x, branch [R, W]``."""
    rows, width = x.shape
    if rows:
        launch(
            kernels.dropout_add_fwd_kernel, (rows,), branch, branch_bias, x, dropout.seed,
            dropout.threshold, dropout.scale, on=x,
            WIDTH=width, BLOCK=max(8, next_power_of_two(width)), num_warps=norm_forward_warps(width),
        )  # fmt: skip


def dropout_add_backward(grad: Tensor, dropout: Dropout, dtype: torch.dtype, partials: Tensor) -> Tensor:
    """Gradient of the branch (in ``dtype``) for contiguous ``grad [R, W]``; that of its bias as partial sums."""
    rows, width = grad.shape
    grad_branch = torch.empty_like(grad, dtype=dtype)
    if rows:
        config = norm_backward_config(width)
        programs, rows_per_program = row_grid(rows, config.programs)
        launch(
            kernels.dropout_add_bwd_kernel, (programs,), grad, dropout.seed, grad_branch, partials,
            rows, rows_per_program, partials.stride(0), dropout.threshold, dropout.scale, on=grad,
            WIDTH=width, BLOCK=max(8, next_power_of_two(width)), STAGES=config.stages, num_warps=config.warps,
        )  # fmt: skip
    return grad_branch


def gelu_dropout(pre: Tensor, dropout: Dropout) -> Tensor:
    """``dropout(GELU(pre))`` of ``pre [R, V]``."""
    rows, width = pre.shape
    out = torch.empty_like(pre)
    if rows:
        programs, rows_per_program = row_grid(rows, GELU_PROGRAMS)
        block = max(8, min(COLUMNS, next_power_of_two(width)))
        launch(
            kernels.gelu_dropout_fwd_kernel, (programs, ceil_div(width, block)), pre, dropout.seed, out,
            rows, rows_per_program, dropout.threshold, dropout.scale, on=pre,
            WIDTH=width, BLOCK=block, num_warps=row_warps(block),
        )  # fmt: skip
    return out


def gelu_dropout_backward(grad: Tensor, pre: Tensor, out: Tensor, dropout: Dropout) -> Tensor:
    """Write the gradient of ``pre`` over ``grad`` and forward's result to ``out``; its column sums are returned."""
    rows, width = pre.shape
    if rows == 0:
        return pre.new_zeros(width, dtype=torch.float32)
    block = max(8, min(COLUMNS, next_power_of_two(width)))
    tiles = ceil_div(width, block)
    programs, rows_per_program = row_grid(rows, max(1, PROGRAMS // tiles))
    partials = pre.new_empty((programs, width), dtype=torch.float32)
    launch(
        kernels.gelu_dropout_bwd_kernel, (programs, tiles), grad, pre, dropout.seed, grad, out, partials,
        rows, rows_per_program, dropout.threshold, dropout.scale, on=pre,
        WIDTH=width, BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip
    return column_sums(partials)


def pack_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Three ``[B, H, L, D]`` as one matrix ``[B L, 3 H D]``, and its column sums in float32."""
    batch, heads, length, dim = query.shape
    parts = [query, key, value]
    if len({part.stride() for part in parts}) > 1 or query.stride(-1) != 1:
        parts = [part.contiguous() for part in parts]
    width = heads * dim
    packed = query.new_empty((batch * length, 3 * width))
    if not packed.numel():
        return packed, query.new_zeros(3 * width, dtype=torch.float32)
    programs, rows_per_program = row_grid(batch * length, PROGRAMS)
    partials = query.new_empty((programs, 3 * width), dtype=torch.float32)
    launch(
        kernels.pack_heads_kernel, (programs, 3), *parts, packed, partials, batch * length, rows_per_program, length,
        *parts[0].stride()[:3], on=packed,
        WIDTH=width, DIM=dim, BLOCK=next_power_of_two(width), num_warps=row_warps(width),
    )  # fmt: skip
    return packed, column_sums(partials)
