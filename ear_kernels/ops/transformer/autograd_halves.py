"""The two halves of a pre-norm block, each with the norm before it as one autograd function. Imports Triton.

Joined, a half keeps the normed rows ``(x - mean) rstd`` in the compute dtype and neither the residual stream nor
``LN(x)``: the norm's backward, which reads those rows anyway, writes ``LN(x)`` over them for the weight gradient that
comes after it. At W = 768 that is 94 MB a block of EAR-B, of 420.
"""

from typing import Any

import torch
from torch import Tensor

from ear_kernels.ops.transformer import launch, launch_attention
from ear_kernels.ops.transformer.autograd import cast_linear, cast_to, dtype_of, mlp_backward
from ear_kernels.ops.transformer.launch import Dropout
from ear_kernels.runtime.autograd import graph_is_kept, refuse_double_backward
from ear_kernels.runtime.gemm import weight_gradient

# What the norm before a half takes: branch, its bias, residual, weight, bias; dropout, eps.
NormInputs = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Dropout, float]


def _norm(ctx: Any, inputs: NormInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(x, LN(x), what :func:`_norm_backward` wants saved)."""
    branch, branch_bias, residual, weight, bias, dropout, eps = inputs
    normed = residual.new_empty(residual.shape, dtype=dtype)
    x, out, _, rstd = launch.add_norm(branch, branch_bias, residual, weight, bias, dropout, eps, dtype, normed)
    ctx.norm_dropout = dropout
    ctx.norm_dtypes = [dtype_of(tensor) for tensor in inputs[:5]]
    ctx.is_overwritten = False
    ctx.set_materialize_grads(False)
    # The seed is in ``dropout``; saved, autograd sees if it is changed.
    return x, out, [normed, rstd, weight, bias, dropout.seed]


def _norm_backward(
    ctx: Any, grad_x: Tensor | None, grad_out: Tensor, saved: list[Tensor], name: str
) -> tuple[list[Tensor | None], Tensor]:
    """(gradients of branch, branch_bias, residual, weight, bias; LN(x) recomputed)."""
    if ctx.is_overwritten:
        raise RuntimeError(
            f"{name}: backward ran before and has overwritten what it saved; give the first call retain_graph=True"
        )
    ctx.is_overwritten = not graph_is_kept()
    normed, rstd, weight, bias, _ = saved
    recomputed = normed if ctx.is_overwritten else torch.empty_like(normed)
    branch_dtype, bias_dtype, stream_dtype, *dtypes = ctx.norm_dtypes
    if grad_x is None:
        grad_x = torch.zeros_like(normed, dtype=stream_dtype)
    branch, residual, sums = launch.add_norm_backward(
        grad_out, grad_x, normed, weight, None, rstd, ctx.norm_dropout, branch_dtype, (bias, recomputed)
    )
    parameters = [sums[0].to(dtypes[0]), sums[1].to(dtypes[1])]
    return [branch, cast_to(bias_dtype, sums[2]), residual, *parameters], recomputed


class NormSelfAttention(torch.autograd.Function):
    """``x = residual + dropout(branch + branch_bias)`` and self-attention of ``LN(x)``, both ``[R, W]``."""

    @staticmethod
    def forward(
        ctx: Any,
        branch: Tensor,
        branch_bias: Tensor | None,
        residual: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        norm_dropout: Dropout,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        heads: int,
        dropout: float,
        batch: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        inputs = (branch, branch_bias, residual, norm_weight, norm_bias, norm_dropout, eps)
        x, rows, saved = _norm(ctx, inputs, dtype)
        length = rows.shape[0] // batch if batch else 0
        qkv, low_weight = cast_linear(rows, weight, bias)
        qkv = qkv.view(batch, length, weight.shape[0])
        draws = launch_attention.draw(batch, heads, length, x.device) if dropout else None
        out, lse = launch_attention.attention(qkv, heads, draws, dropout)
        ctx.save_for_backward(low_weight, qkv, out, lse, draws, *saved)
        ctx.dtypes, ctx.heads, ctx.dropout = (weight.dtype, dtype_of(bias)), heads, dropout
        return x, out.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("norm_self_attention")
        low_weight, qkv, out, lse, draws, *saved = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous().view(out.shape)
        grad, sums = launch_attention.attention_backward(grad_out, qkv, out, lse, ctx.heads, draws, ctx.dropout)
        grad = grad.flatten(0, 1)
        norm, rows = _norm_backward(ctx, grad_x, torch.mm(grad, low_weight), saved, "norm_self_attention")
        weight_dtype, bias_dtype = ctx.dtypes
        weight = weight_gradient(grad, rows, weight_dtype)
        return *norm, None, None, weight, cast_to(bias_dtype, sums), None, None, None, None


class NormGeluMLP(torch.autograd.Function):
    """``x = residual + dropout(branch + branch_bias)`` and the MLP of ``LN(x)``, both ``[R, W]``."""

    @staticmethod
    def forward(
        ctx: Any,
        branch: Tensor,
        branch_bias: Tensor | None,
        residual: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        norm_dropout: Dropout,
        eps: float,
        weight_in: Tensor,
        bias_in: Tensor | None,
        weight_out: Tensor,
        bias_out: Tensor | None,
        dropout: Dropout,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        inputs = (branch, branch_bias, residual, norm_weight, norm_bias, norm_dropout, eps)
        x, rows, saved = _norm(ctx, inputs, dtype)
        pre, first = cast_linear(rows, weight_in, bias_in)
        del rows
        out, second = cast_linear(launch.gelu_dropout(pre, dropout), weight_out, bias_out)
        ctx.save_for_backward(pre, first, second, dropout.seed, *saved)
        ctx.dropout, ctx.dtypes = dropout, [dtype_of(each) for each in (weight_in, bias_in, weight_out, bias_out)]
        return x, out

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("norm_gelu_mlp")
        pre, first, second, _, *saved = ctx.saved_tensors
        grad = pre.new_zeros(pre.shape[0], second.shape[0]) if grad_out is None else grad_out.contiguous()
        grad_pre, rest = mlp_backward(grad, pre, second, ctx.dropout, ctx.dtypes)
        norm, rows = _norm_backward(ctx, grad_x, torch.mm(grad_pre, first), saved, "norm_gelu_mlp")
        return *norm, None, None, weight_gradient(grad_pre, rows, ctx.dtypes[0]), *rest, None, None
