"""The two halves of a pre-norm block, each with the norm before it as one autograd function. Imports Triton.

Joined, a half keeps the normed rows ``(x - mean) rstd`` in the compute dtype and neither the residual stream nor
``LN(x)``: the norm's backward, which reads those rows anyway, writes ``LN(x)`` over them for the weight gradient that
comes after it. At W = 768 that is 94 MB a block of EAR-B, of 420.
"""

from typing import Any

import torch
from torch import Tensor

from ear_kernels.ops.transformer import autograd, launch
from ear_kernels.ops.transformer.launch import Dropout
from ear_kernels.runtime.autograd import graph_is_kept, refuse_double_backward
from ear_kernels.runtime.column_sums import column_sums
from ear_kernels.runtime.gemm import weight_gradient

# What the norm before a half takes: branch, its bias, residual, weight, bias; dropout, eps.
NormInputs = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Dropout, float]


def _norm(ctx: Any, inputs: NormInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(x, LN(x), what :func:`_norm_backward` wants saved)."""
    branch, branch_bias, residual, weight, bias, dropout, eps = inputs
    normed = residual.new_empty(residual.shape, dtype=dtype)
    x, out, _, rstd = launch.add_norm(branch, branch_bias, residual, weight, bias, dropout, eps, dtype, normed)
    ctx.norm_dropout = dropout
    ctx.norm_dtypes = [autograd.dtype_of(tensor) for tensor in inputs[:5]]
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
    partials = launch.norm_partials(normed, 3)
    branch, residual = launch.add_norm_backward(
        grad_out, grad_x, normed, weight, None, rstd, ctx.norm_dropout, branch_dtype, partials, (bias, recomputed)
    )
    sums = column_sums(partials)
    parameters = [sums[0].to(dtypes[0]), sums[1].to(dtypes[1])]
    return [branch, autograd.cast_to(bias_dtype, sums[2]), residual, *parameters], recomputed


class NormSelfAttention(torch.autograd.Function):
    """``x = residual + dropout(branch + branch_bias)``, ``[R, C]``, and attention of ``LN(x)``, ``[B, L, W]``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Inputs: those of the norm, weight, bias, heads, dropout, causal, (B, L) of attention, the dtype."""
        x, rows, saved = _norm(ctx, inputs[:7], inputs[-1])
        out, attention_saved = autograd.attention(ctx, rows, *inputs[7:-1])
        ctx.save_for_backward(*attention_saved, *saved)
        return x, out

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("norm_self_attention")
        saved = ctx.saved_tensors
        grad_out = torch.zeros_like(saved[2]) if grad_out is None else grad_out.contiguous()
        grad, grad_rows, grad_bias = autograd.attention_backward(ctx, grad_out, saved[:5])
        norm, rows = _norm_backward(ctx, grad_x, grad_rows, saved[5:], "norm_self_attention")
        return *norm, None, None, weight_gradient(grad, rows, ctx.dtypes[0]), grad_bias, *[None] * 5


class NormGeluMLP(torch.autograd.Function):
    """``x = residual + dropout(branch + branch_bias)`` and the MLP of ``LN(x)``, both ``[R, W]``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Inputs: those of the norm, then those of :class:`GeluMLP` after its rows, and the dtype."""
        weight_in, bias_in, weight_out, bias_out, ctx.dropout, dtype = inputs[7:]
        ctx.dtypes = [autograd.dtype_of(tensor) for tensor in inputs[7:11]]
        x, rows, saved = _norm(ctx, inputs[:7], dtype)
        pre, first = autograd.cast_linear(rows, weight_in, bias_in)
        del rows
        out, second = autograd.cast_linear(launch.gelu_dropout(pre, ctx.dropout), weight_out, bias_out)
        ctx.save_for_backward(pre, first, second, ctx.dropout.seed, *saved)
        return x, out

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("norm_gelu_mlp")
        pre, first, second, _, *saved = ctx.saved_tensors
        grad = pre.new_zeros(pre.shape[0], second.shape[0]) if grad_out is None else grad_out.contiguous()
        grad_pre, rest = autograd.mlp_backward(grad, pre, second, ctx.dropout, ctx.dtypes)
        norm, rows = _norm_backward(ctx, grad_x, torch.mm(grad_pre, first), saved, "norm_gelu_mlp")
        return *norm, None, None, weight_gradient(grad_pre, rows, ctx.dtypes[0]), *rest, None, None
