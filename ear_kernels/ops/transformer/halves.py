"""The two halves of a pre-norm block, each with the norm before it as one autograd function. Imports Triton.

Joined, a half keeps the normed rows ``(x - mean) rstd`` in the compute dtype and neither the residual stream nor
``LN(x)``: the norm's backward, which reads those rows anyway, writes ``LN(x)`` over them for the weight gradient that
comes after it. At W = 768 that is 94 MB a block of EAR-B, of 420.
"""

from typing import Any

import torch
from torch import Tensor

from ear_kernels.ops.attention import autograd as attention
from ear_kernels.ops.transformer.autograd import (
    _add_norm,
    _add_norm_backward,
    _gelu_dropout,
    _gelu_dropout_backward,
    dropout_options,
)
from ear_kernels.runtime.autograd import graph_is_kept, refuse_double_backward
from ear_kernels.runtime.column_sums import column_sums
from ear_kernels.runtime.copies import low as low_copy
from ear_kernels.runtime.gemm import linear, weight_gradient

# What the norm before a half takes: branch, its bias, residual, weight, bias, seed, threshold, scale, eps.
NormInputs = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, int, float, float]


def _dtype_of(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _norm(ctx: Any, inputs: NormInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(x, LN(x), what :func:`_norm_backward` wants saved)."""
    branch, branch_bias, residual, weight, bias, seed, threshold, scale, eps = inputs
    normed = residual.new_empty(residual.shape, dtype=dtype)
    x, out, _, rstd = _add_norm(
        branch, branch_bias, residual, weight, bias, seed, threshold, scale, eps, dtype, normed
    )
    ctx.norm_options = threshold, scale, branch.dtype
    ctx.norm_dtypes = _dtype_of(branch_bias), residual.dtype, weight.dtype, bias.dtype
    ctx.spent = False
    ctx.set_materialize_grads(False)
    return x, out, [normed, rstd, weight, bias, seed]


def _norm_backward(
    ctx: Any, grad_x: Tensor | None, grad_out: Tensor, saved: tuple[Tensor, ...], name: str
) -> tuple[list[Tensor | None], Tensor]:
    """(gradients of branch, branch_bias, residual, weight, bias; LN(x) again)."""
    if ctx.spent:
        raise RuntimeError(
            f"{name}: backward ran before and has overwritten what it saved; give the first call retain_graph=True"
        )
    ctx.spent = not graph_is_kept()
    normed, rstd, weight, bias, seed = saved
    again = normed if ctx.spent else torch.empty_like(normed)
    bias_dtype, stream_dtype, *dtypes = ctx.norm_dtypes
    if grad_x is None:
        grad_x = torch.zeros_like(normed, dtype=stream_dtype)
    threshold, scale, branch_dtype = ctx.norm_options
    branch, residual, sums = _add_norm_backward(
        grad_out, grad_x, normed, weight, rstd, rstd, seed, threshold, scale, branch_dtype, again=(bias, again)
    )
    branch_bias = None if bias_dtype is None else sums[2].to(bias_dtype)
    return [branch, branch_bias, residual, sums[0].to(dtypes[0]), sums[1].to(dtypes[1])], again


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
        seed: Tensor,
        threshold: int,
        scale: float,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        heads: int,
        dropout: float,
        batch: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        inputs = (branch, branch_bias, residual, norm_weight, norm_bias, seed, threshold, scale, eps)
        x, rows, saved = _norm(ctx, inputs, dtype)
        low = low_copy(weight, dtype)
        length = rows.shape[0] // batch if batch else 0
        qkv = linear(rows, low, None if bias is None else low_copy(bias, dtype)).view(batch, length, weight.shape[0])
        draws = attention.draw(qkv.shape[0], heads, length, x.device) if dropout else None
        out, lse = attention.forward(qkv, heads, draws, dropout)
        ctx.save_for_backward(low, qkv, out, lse, draws, *saved)
        ctx.dtypes, ctx.heads, ctx.dropout = (weight.dtype, _dtype_of(bias)), heads, dropout
        return x, out.flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("norm_self_attention")
        low, qkv, out, lse, draws, *saved = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous().view(out.shape)
        grad, sums = attention.backward(grad_out, qkv, out, lse, ctx.heads, draws, ctx.dropout)
        grad = grad.flatten(0, 1)
        norm, rows = _norm_backward(ctx, grad_x, torch.mm(grad, low), saved, "norm_self_attention")
        weight_dtype, bias_dtype = ctx.dtypes
        weight = weight_gradient(grad, rows, weight_dtype)
        bias = None if bias_dtype is None else sums.to(bias_dtype)
        return (*norm, None, None, None, None, weight, bias, None, None, None, None)


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
        seed: Tensor,
        threshold: int,
        scale: float,
        eps: float,
        weight_in: Tensor,
        bias_in: Tensor | None,
        weight_out: Tensor,
        bias_out: Tensor | None,
        mlp_seed: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        inputs = (branch, branch_bias, residual, norm_weight, norm_bias, seed, threshold, scale, eps)
        x, rows, saved = _norm(ctx, inputs, dtype)
        first, second = low_copy(weight_in, dtype), low_copy(weight_out, dtype)
        pre = linear(rows, first, None if bias_in is None else low_copy(bias_in, dtype))
        del rows
        inner = _gelu_dropout(pre, mlp_seed, threshold, scale)
        out = linear(inner, second, None if bias_out is None else low_copy(bias_out, dtype))
        ctx.save_for_backward(pre, first, second, mlp_seed, *saved)
        ctx.dtypes = [_dtype_of(tensor) for tensor in (weight_in, bias_in, weight_out, bias_out)]
        return x, out

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("norm_gelu_mlp")
        pre, first, second, mlp_seed, *saved = ctx.saved_tensors
        weight_in, bias_in, weight_out, bias_out = ctx.dtypes
        grad = pre.new_zeros(pre.shape[0], second.shape[0]) if grad_out is None else grad_out.contiguous()
        inner = torch.empty_like(pre)
        threshold, scale, _ = ctx.norm_options
        grad_pre, sums = _gelu_dropout_backward(torch.mm(grad, second), pre, inner, mlp_seed, threshold, scale)
        grad_weight_out = weight_gradient(grad, inner, weight_out)
        del inner
        norm, rows = _norm_backward(ctx, grad_x, torch.mm(grad_pre, first), saved, "norm_gelu_mlp")
        return (
            *norm,
            *(None,) * 4,
            weight_gradient(grad_pre, rows, weight_in),
            None if bias_in is None else sums.to(bias_in),
            grad_weight_out,
            None if bias_out is None else column_sums(grad, bias_out),
            None,
            None,
        )


def norm_self_attention(
    branch: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    dropout: float,
    attention_dropout: float,
    eps: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See :func:`ear_kernels.functional_transformer.norm_self_attention`; ``branch, residual [B, L, W]``."""
    batch, width = residual.shape[0], residual.shape[-1]
    options = dropout_options(dropout, seed, norm_weight)
    rows = branch.reshape(-1, width), branch_bias, residual.reshape(-1, width)
    with torch.autocast(residual.device.type, enabled=False):
        x, out = NormSelfAttention.apply(
            *rows, norm_weight, norm_bias, *options, eps, weight, bias, heads, attention_dropout, batch, dtype
        )
    return x.view(residual.shape), out.view(*residual.shape[:2], weight.shape[0] // 3)


def norm_gelu_mlp(
    branch: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    branch_bias: Tensor | None,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    dropout: float,
    eps: float,
    seeds: tuple[Tensor | None, Tensor | None],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See :func:`ear_kernels.functional_transformer.norm_gelu_mlp`; ``branch, residual [..., W]``."""
    width = residual.shape[-1]
    options = dropout_options(dropout, seeds[0], norm_weight)
    mlp_seed, *_ = dropout_options(dropout, seeds[1], norm_weight)
    rows = branch.reshape(-1, width), branch_bias, residual.reshape(-1, width)
    with torch.autocast(residual.device.type, enabled=False):
        x, out = NormGeluMLP.apply(
            *rows, norm_weight, norm_bias, *options, eps, weight_in, bias_in, weight_out, bias_out, mlp_seed, dtype
        )
    return x.view(residual.shape), out.view(*residual.shape[:-1], weight_out.shape[0])
