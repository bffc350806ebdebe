"""Launchers and autograd of the transformer block's memory-bound parts. Imports Triton."""

from typing import Any

import torch
from torch import Tensor

from ear_kernels.ops.transformer import kernels
from ear_kernels.runtime.autograd import refuse_double_backward
from ear_kernels.runtime.column_sums import column_sums
from ear_kernels.runtime.copies import low as low_copy
from ear_kernels.runtime.gemm import linear, weight_gradient
from ear_kernels.runtime.launching import RowConfig, next_power_of_two, row_grid, row_warps

PROGRAMS = 528
"""Programs of a backward kernel over rows: 4 for each of an H200's SMs; a constant for the order of its sums."""

COLUMNS = 1024
"""Columns of the MLP's inner width that a program takes."""

GELU_PROGRAMS = 2112
"""Most runs of rows that the GELU's forward takes."""

GELU_BACKWARD_PROGRAMS = 528
"""Programs of the GELU's backward, all columns together: 4 for each of an H200's SMs."""

STEPS = 2**16


def norm_forward_warps(width: int) -> int:
    """Within 2 % of the fastest on an H200 at 768, 1,024 and 1,280 (benchmarks/sweep_transformer.py)."""
    return 4 if 1024 < width <= 2048 else row_warps(width)


def norm_backward_config(width: int) -> RowConfig:
    """Within 2 % of the fastest there of 12 to 40 launches each."""
    if 1024 < width <= 2048:
        return RowConfig(4, 4, PROGRAMS)
    return RowConfig(row_warps(width), 3, 396 if width == 1024 else PROGRAMS)


def dropout_options(dropout: float, seed: Tensor | None, like: Tensor) -> tuple[Tensor, int, float]:
    """(seed tensor, threshold of 16 bits, scale of what is kept) of a dropout probability.

    ``like`` stands in for a seed that is not needed, and is kept for backward in its place.
    """
    threshold = round(dropout * STEPS)
    if threshold and seed is None:
        seed = torch.randint(2**31, (1,), device=like.device)
    return (seed if seed is not None else like), threshold, 1 / (1 - threshold / STEPS)


def _add_norm(
    branch: Tensor,
    branch_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor,
    threshold: int,
    scale: float,
    eps: float,
    dtype: torch.dtype,
    normed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, LN(x) in ``dtype``, mean, rstd) for contiguous ``branch, residual [R, W]``.

    With ``normed [R, W]`` that gets ``(x - mean) rstd``, and the mean is left out.
    """
    rows, width = residual.shape
    x, out = residual.new_empty((rows, width)), residual.new_empty((rows, width), dtype=dtype)
    mean, rstd = (residual.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if rows:
        kernels.dropout_add_layer_norm_fwd_kernel[(rows,)](
            branch,
            branch_bias if branch_bias is not None else weight,
            residual,
            weight,
            bias,
            seed,
            x,
            out,
            mean,
            rstd,
            normed if normed is not None else out,
            threshold,
            scale,
            eps,
            WIDTH=width,
            BLOCK=max(8, next_power_of_two(width)),
            DROPOUT=threshold > 0,
            HAS_BRANCH_BIAS=branch_bias is not None,
            SAVE_NORMED=normed is not None,
            num_warps=norm_forward_warps(width),
        )
    return x, out, mean, rstd


def _add_norm_backward(
    grad_out: Tensor,
    grad_x: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor,
    threshold: int,
    scale: float,
    dtype: torch.dtype,
    again: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of branch (in ``dtype``) and residual; ``[3, W]`` float32: of weight, bias and branch_bias.

    With ``again = (bias, out)`` ``x`` is ``(x - mean) rstd``, and out, which may be its memory, gets LN(x).
    """
    rows, width = x.shape
    grad_branch = x.new_empty((rows, width), dtype=dtype)
    # Alike in dtype to x, of which there may be no more than its normed rows.
    grad_residual = x.new_empty((rows, width)) if grad_x is None or again is None else torch.empty_like(grad_x)
    if rows == 0:
        return grad_branch, grad_residual, x.new_zeros((3, width), dtype=torch.float32)
    config = norm_backward_config(width)
    programs, rows_per_program = row_grid(rows, config.programs)
    partials = x.new_empty((programs, 3, width), dtype=torch.float32)
    kernels.dropout_add_layer_norm_bwd_kernel[(programs,)](
        grad_out.contiguous(),
        grad_x.contiguous() if grad_x is not None else x,
        x,
        weight,
        again[0] if again is not None else weight,
        mean,
        rstd,
        seed,
        grad_residual,
        grad_branch,
        again[1] if again is not None else x,
        partials,
        rows,
        rows_per_program,
        threshold,
        scale,
        WIDTH=width,
        BLOCK=max(8, next_power_of_two(width)),
        DROPOUT=threshold > 0,
        HAS_GRAD_X=grad_x is not None,
        NORMED=again is not None,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    return grad_branch, grad_residual, column_sums(partials)


class DropoutAddLayerNorm(torch.autograd.Function):
    """``branch, residual [R, W]`` -> (``x [R, W]`` in the residual's dtype, ``LN(x)`` in ``dtype``)."""

    @staticmethod
    def forward(
        ctx: Any,
        branch: Tensor,
        branch_bias: Tensor | None,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        seed: Tensor,
        threshold: int,
        scale: float,
        eps: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        x, out, mean, rstd = _add_norm(
            branch, branch_bias, residual, weight, bias, seed, threshold, scale, eps, dtype
        )
        ctx.save_for_backward(x, weight, bias, mean, rstd, seed)
        ctx.threshold, ctx.scale, ctx.dtype = threshold, scale, branch.dtype
        ctx.bias_dtype = None if branch_bias is None else branch_bias.dtype
        ctx.set_materialize_grads(False)
        return x, out

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("dropout_add_layer_norm")
        x, weight, bias, mean, rstd, seed = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(x)
        options = (ctx.threshold, ctx.scale, ctx.dtype)
        branch, residual, sums = _add_norm_backward(grad_out, grad_x, x, weight, mean, rstd, seed, *options)
        branch_bias = None if ctx.bias_dtype is None else sums[2].to(ctx.bias_dtype)
        nothing = (None,) * 5
        return branch, branch_bias, residual, sums[0].to(weight.dtype), sums[1].to(bias.dtype), *nothing


def _gelu_dropout(pre: Tensor, seed: Tensor, threshold: int, scale: float) -> Tensor:
    rows, width = pre.shape
    out = torch.empty_like(pre)
    if rows:
        programs, rows_per_program = row_grid(rows, GELU_PROGRAMS)
        block = max(8, min(COLUMNS, next_power_of_two(width)))
        kernels.gelu_dropout_fwd_kernel[(programs, -(-width // block))](
            pre,
            seed,
            out,
            rows,
            rows_per_program,
            threshold,
            scale,
            WIDTH=width,
            BLOCK=block,
            DROPOUT=threshold > 0,
            num_warps=row_warps(block),
        )
    return out


def _gelu_dropout_backward(
    grad_out: Tensor, pre: Tensor, out: Tensor, seed: Tensor, threshold: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(gradient of ``pre``, in the memory of ``grad_out``; its column sums); writes the result again to ``out``."""
    rows, width = pre.shape
    if rows == 0:
        return grad_out, pre.new_zeros(width, dtype=torch.float32)
    block = max(8, min(COLUMNS, next_power_of_two(width)))
    tiles = -(-width // block)
    programs, rows_per_program = row_grid(rows, max(1, GELU_BACKWARD_PROGRAMS // tiles))
    partials = pre.new_empty((programs, width), dtype=torch.float32)
    kernels.gelu_dropout_bwd_kernel[(programs, tiles)](
        grad_out,
        pre,
        seed,
        grad_out,
        out,
        partials,
        rows,
        rows_per_program,
        threshold,
        scale,
        WIDTH=width,
        BLOCK=block,
        DROPOUT=threshold > 0,
        STAGES=3,
        num_warps=row_warps(block),
    )
    return grad_out, column_sums(partials)


class Linear(torch.autograd.Function):
    """``x @ weight^T`` of ``x [R, C]``; a float32 weight gets its gradient in float32, unrounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        low = low_copy(weight, x.dtype)
        ctx.save_for_backward(x, low)
        ctx.dtype = weight.dtype
        return linear(x, low, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        refuse_double_backward("linear")
        x, low = ctx.saved_tensors
        grad = grad.contiguous()
        return torch.mm(grad, low), weight_gradient(grad, x, ctx.dtype)


class GeluMLP(torch.autograd.Function):
    """``Linear(dropout(GELU(Linear(x))))`` of ``x [R, W]``; saves x and the pre-activation only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_in: Tensor,
        bias_in: Tensor | None,
        weight_out: Tensor,
        bias_out: Tensor | None,
        seed: Tensor,
        threshold: int,
        scale: float,
    ) -> Tensor:
        dtype = x.dtype
        first, second = low_copy(weight_in, dtype), low_copy(weight_out, dtype)
        pre = linear(x, first, None if bias_in is None else low_copy(bias_in, dtype))
        out = linear(
            _gelu_dropout(pre, seed, threshold, scale),
            second,
            None if bias_out is None else low_copy(bias_out, dtype),
        )
        ctx.save_for_backward(x, pre, first, second, seed)
        ctx.threshold, ctx.scale = threshold, scale
        ctx.dtypes = [None if each is None else each.dtype for each in (weight_in, bias_in, weight_out, bias_out)]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("gelu_mlp")
        x, pre, first, second, seed = ctx.saved_tensors
        weight_in, bias_in, weight_out, bias_out = ctx.dtypes
        grad = grad.contiguous()
        inner = torch.empty_like(pre)
        grad_pre, sums = _gelu_dropout_backward(torch.mm(grad, second), pre, inner, seed, ctx.threshold, ctx.scale)
        return (
            torch.mm(grad_pre, first),
            weight_gradient(grad_pre, x, weight_in),
            None if bias_in is None else sums.to(bias_in),
            weight_gradient(grad, inner, weight_out),
            None if bias_out is None else column_sums(grad, bias_out),
            None,
            None,
            None,
        )


def dropout_add_layer_norm(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None,
    dropout: float,
    eps: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See :func:`ear_kernels.functional.dropout_add_layer_norm`."""
    width = residual.shape[-1]
    options = (*dropout_options(dropout, seed, weight), eps, dtype)
    x, out = DropoutAddLayerNorm.apply(
        branch.reshape(-1, width), branch_bias, residual.reshape(-1, width), weight, bias, *options
    )
    return x.view(residual.shape), out.view(residual.shape)


def gelu_mlp(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    dropout: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`ear_kernels.functional.gelu_mlp`."""
    options = dropout_options(dropout, seed, weight_in)
    rows = x.reshape(-1, x.shape[-1]).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        out = GeluMLP.apply(rows, weight_in, bias_in, weight_out, bias_out, *options)
    return out.view(*x.shape[:-1], weight_out.shape[0])


def project(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """See :func:`ear_kernels.functional_transformer.project`."""
    with torch.autocast(x.device.type, enabled=False):
        out = Linear.apply(x.reshape(-1, x.shape[-1]).to(dtype), weight)
    return out.view(*x.shape[:-1], weight.shape[0])
