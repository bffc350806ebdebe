"""Autograd of the transformer block's memory-bound parts. Imports Triton."""

from typing import Any

import torch
from torch import Tensor

from ear_kernels.ops.transformer import launch, launch_attention
from ear_kernels.ops.transformer.launch import Dropout
from ear_kernels.runtime.autograd import refuse_double_backward
from ear_kernels.runtime.column_sums import column_sums
from ear_kernels.runtime.copies import low
from ear_kernels.runtime.gemm import linear, weight_gradient


def dtype_of(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def cast_to(dtype: torch.dtype | None, gradient: Tensor) -> Tensor | None:
    """A gradient in the dtype of its tensor; None for a tensor that was not given."""
    return None if dtype is None else gradient.to(dtype)


def cast_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(``rows @ weight^T + bias`` in the rows' dtype, the weight in that dtype)."""
    weight = low(weight, rows.dtype)
    return linear(rows, weight, None if bias is None else low(bias, rows.dtype)), weight


class DropoutAddLayerNorm(torch.autograd.Function):
    """The inputs of :func:`launch.add_norm` -> (``x [R, W]`` in the residual's dtype, ``LN(x)`` in ``dtype``)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        branch, branch_bias, _, weight, bias, dropout, *_ = inputs
        x, out, mean, rstd = launch.add_norm(*inputs)
        # The seed is in ``dropout``; saved, autograd sees if it is changed.
        ctx.save_for_backward(x, weight, bias, mean, rstd, dropout.seed)
        ctx.dropout, ctx.dtype, ctx.bias_dtype = dropout, branch.dtype, dtype_of(branch_bias)
        ctx.set_materialize_grads(False)
        return x, out

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor | None, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_double_backward("dropout_add_layer_norm")
        x, weight, bias, mean, rstd, _ = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(x)
        partials = launch.norm_partials(x, 3)
        branch, residual = launch.add_norm_backward(
            grad_out, grad_x, x, weight, mean, rstd, ctx.dropout, ctx.dtype, partials
        )
        sums = column_sums(partials)
        parameters = sums[0].to(weight.dtype), sums[1].to(bias.dtype)
        return branch, cast_to(ctx.bias_dtype, sums[2]), residual, *parameters, None, None, None


class Linear(torch.autograd.Function):
    """``x @ weight^T`` of ``x [R, C]``; a float32 weight gets its gradient in float32, unrounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        out, low_weight = cast_linear(x, weight, None)
        ctx.save_for_backward(x, low_weight)
        ctx.dtype = weight.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        refuse_double_backward("project")
        x, low_weight = ctx.saved_tensors
        grad = grad.contiguous()
        return torch.mm(grad, low_weight), weight_gradient(grad, x, ctx.dtype)


def mlp_backward(
    grad: Tensor, pre: Tensor, second: Tensor, dropout: Dropout, dtypes: list[Any]
) -> tuple[Tensor, list[Tensor | None]]:
    """(gradient of ``pre``; those of bias_in, weight_out and bias_out) of the MLP from its pre-activation on.

    ``dtypes`` are those of weight_in, bias_in, weight_out and bias_out; ``second`` is weight_out in the low dtype.
    """
    grad_pre, inner = torch.mm(grad, second), torch.empty_like(pre)
    sums = launch.gelu_dropout_backward(grad_pre, pre, inner, dropout)
    _, bias_in, weight_out, bias_out = dtypes
    bias = None if bias_out is None else column_sums(grad, bias_out)
    return grad_pre, [cast_to(bias_in, sums), weight_gradient(grad, inner, weight_out), bias]


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
        dropout: Dropout,
    ) -> Tensor:
        pre, first = cast_linear(x, weight_in, bias_in)
        out, second = cast_linear(launch.gelu_dropout(pre, dropout), weight_out, bias_out)
        ctx.save_for_backward(x, pre, first, second, dropout.seed)
        ctx.dropout, ctx.dtypes = dropout, [dtype_of(each) for each in (weight_in, bias_in, weight_out, bias_out)]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("gelu_mlp")
        x, pre, first, second, _ = ctx.saved_tensors
        grad_pre, rest = mlp_backward(grad.contiguous(), pre, second, ctx.dropout, ctx.dtypes)
        return torch.mm(grad_pre, first), weight_gradient(grad_pre, x, ctx.dtypes[0]), *rest, None


class QKVHeads(torch.autograd.Function):
    """``x [B, L, W]`` -> query, key and value ``[B, H, L, D]``, strided views of one linear's output.

    Backward packs their gradients into one matrix and sums its columns in the same pass; autograd's own way stacks,
    permutes and copies.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, width = x.shape
        rows = x.reshape(-1, width)
        packed, low_weight = cast_linear(rows, weight, bias)
        ctx.save_for_backward(rows, low_weight)
        ctx.dtypes = weight.dtype, dtype_of(bias)
        query, key, value = (
            packed.view(batch, length, 3, heads, weight.shape[0] // (3 * heads)).permute(2, 0, 3, 1, 4).unbind()
        )
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("qkv_heads")
        rows, low_weight = ctx.saved_tensors
        batch, _, length, _ = grads[0].shape
        packed, sums = launch.pack_heads(*grads)
        weight_dtype, bias_dtype = ctx.dtypes
        grad_x = torch.mm(packed, low_weight).view(batch, length, low_weight.shape[1])
        return grad_x, weight_gradient(packed, rows, weight_dtype), cast_to(bias_dtype, sums), None


def attention(
    ctx: Any,
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    dropout: float,
    causal: bool,
    shape: tuple[int, int],
) -> tuple[Tensor, list[Tensor | None]]:
    """(the heads' results side by side, ``[B, L, W]``; what backward wants saved) of ``rows [B L, C]``."""
    qkv, low_weight = cast_linear(rows, weight, bias)
    qkv = qkv.view(*shape, weight.shape[0])
    draws = launch_attention.draw(shape[0], heads, shape[1], rows.device) if dropout else None
    out, lse = launch_attention.attention(qkv, heads, draws, dropout, causal)
    ctx.dtypes, ctx.heads, ctx.dropout, ctx.causal = (weight.dtype, dtype_of(bias)), heads, dropout, causal
    return out, [low_weight, qkv, out, lse, draws]


def attention_backward(ctx: Any, grad_out: Tensor, saved: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the packed query, key and value ``[B L, 3W]``, of the rows, and of the bias."""
    low_weight, qkv, out, lse, draws = saved
    options = ctx.heads, draws, ctx.dropout, ctx.causal
    grad, sums = launch_attention.attention_backward(grad_out, qkv, out, lse, *options)
    grad = grad.flatten(0, 1)
    return grad, torch.mm(grad, low_weight), cast_to(ctx.dtypes[1], sums)


class SelfAttention(torch.autograd.Function):
    """``x [B, L, C]`` -> the heads' results side by side, ``[B, L, W]``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, dropout: float, causal: bool
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[2])
        out, saved = attention(ctx, rows, weight, bias, heads, dropout, causal, (x.shape[0], x.shape[1]))
        ctx.save_for_backward(rows, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("self_attention")
        rows, *saved = ctx.saved_tensors
        grad, grad_rows, grad_bias = attention_backward(ctx, grad_out.contiguous(), saved)
        grad_x = grad_rows.view(*grad_out.shape[:2], rows.shape[1])
        return grad_x, weight_gradient(grad, rows, ctx.dtypes[0]), grad_bias, None, None, None
