"""A whole pre-norm block as one autograd function, from residual stream to residual stream. Imports Triton.

It needs nothing of the blocks beside it. That costs two passes over the stream more than halves that hand a pending
branch on. Like the halves it keeps the normed rows ``(x - mean) rstd`` in the compute dtype, nothing of the stream.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ear_kernels.ops.transformer import launch, launch_attention
from ear_kernels.ops.transformer.autograd import cast_to, dtype_of, mlp_backward
from ear_kernels.ops.transformer.launch import Dropout
from ear_kernels.ops.transformer.reference import Block
from ear_kernels.runtime.autograd import graph_is_kept, refuse_double_backward
from ear_kernels.runtime.column_sums import column_sums
from ear_kernels.runtime.copies import low_all
from ear_kernels.runtime.gemm import linear, weight_gradient

NONE = Dropout(None, 0, 1.0)


class Options(NamedTuple):
    """Those of :class:`reference.BlockOptions` with their seeds, the compute dtype, and whether backward may come."""

    heads: int
    attention_dropout: float
    dropouts: list[Dropout]
    eps: tuple[float, float]
    dtype: torch.dtype
    save: bool


class TransformerBlock(torch.autograd.Function):
    """The residual stream ``[B, L, W]``, contiguous -> itself after the block."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, options: Options, *parameters: Tensor | None) -> Tensor:
        p: Any = Block(*parameters)  # type: ignore[arg-type]
        heads, dtype, after = options.heads, options.dtype, options.dropouts
        # The other two biases are added by kernels, which take any dtype.
        qkv_weight, qkv_bias, proj_weight, fc1_weight, fc1_bias, fc2_weight = low_all(
            (p.qkv_weight, p.qkv_bias, p.proj_weight, p.fc1_weight, p.fc1_bias, p.fc2_weight), dtype
        )
        batch, length, width = x.shape
        rows = x.view(-1, width)
        normed = [rows.new_empty(rows.shape, dtype=dtype) if options.save else None for _ in range(2)]
        norm1, norm2 = (p.norm1_weight, p.norm1_bias), (p.norm2_weight, p.norm2_bias)

        _, out, _, rstd1 = launch.add_norm(None, None, rows, *norm1, NONE, options.eps[0], dtype, normed[0])
        qkv = linear(out, qkv_weight, qkv_bias).view(batch, length, p.qkv_weight.shape[0])
        draws = launch_attention.draw(batch, heads, length, x.device) if options.attention_dropout else None
        mixed, lse = launch_attention.attention(qkv, heads, draws, options.attention_dropout)
        branch = linear(mixed.view(-1, mixed.shape[2]), proj_weight, None), p.proj_bias
        stream, out, _, rstd2 = launch.add_norm(*branch, rows, *norm2, after[0], options.eps[1], dtype, normed[1])
        pre = linear(out, fc1_weight, fc1_bias)
        inner = launch.gelu_dropout(pre, after[1])
        launch.dropout_add_(stream, linear(inner, fc2_weight, None), p.fc2_bias, after[2])
        if options.save:
            attention = normed[0], rstd1, qkv_weight, qkv, mixed, lse, draws, proj_weight
            mlp = normed[1], rstd2, fc1_weight, pre, fc2_weight
            # What autograd is to see changed: seeds, and parameters that backward reads.
            ctx.save_for_backward(*attention, *mlp, *norm1, *norm2, *(each.seed for each in after))
            ctx.options, ctx.dtypes, ctx.is_overwritten = options, Block(*map(dtype_of, parameters)), False  # type: ignore[arg-type]
        return stream.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("transformer_block")
        if ctx.is_overwritten:
            raise RuntimeError(
                "transformer_block: backward ran before and has overwritten what it saved; "
                "give the first call retain_graph=True"
            )
        ctx.is_overwritten = not graph_is_kept()
        (
            normed1, rstd1, qkv_weight, qkv, mixed, lse, draws, proj_weight,
            normed2, rstd2, fc1_weight, pre, fc2_weight,
            norm1_weight, norm1_bias, norm2_weight, norm2_bias, *seeds,
        ) = ctx.saved_tensors  # fmt: skip
        options: Options = ctx.options
        dtypes: Any = ctx.dtypes
        # Under activation checkpointing the saved seeds are those of the recomputation.
        after = [replace(each, seed=seed) for each, seed in zip(options.dropouts, seeds, strict=True)]
        # LN(x) for the weight gradients is written over the normed rows.
        rows1, rows2 = (n if ctx.is_overwritten else torch.empty_like(n) for n in (normed1, normed2))
        grad = grad_out.reshape(normed1.shape).contiguous()

        # Partial sums of what both norms and the last addition sum up: added up by one launch at the end.
        partials = launch.norm_partials(normed1, 6)

        branch: Any
        branch = launch.dropout_add_backward(grad, after[2], options.dtype, partials[:, 0])
        mlp_dtypes = [dtypes.fc1_weight, dtypes.fc1_bias, dtypes.fc2_weight, None]
        grad_pre, (fc1_bias, fc2, _) = mlp_backward(branch, pre, fc2_weight, after[1], mlp_dtypes)
        grad_normed = torch.mm(grad_pre, fc1_weight)
        norm2 = norm2_weight, None, rstd2, after[0], options.dtype, partials[:, 1:4], (norm2_bias, rows2)
        branch, grad = launch.add_norm_backward(grad_normed, grad, normed2, *norm2)
        fc1 = weight_gradient(grad_pre, rows2, dtypes.fc1_weight)
        del grad_pre, pre

        grad_mixed = torch.mm(branch, proj_weight).view(mixed.shape)
        proj = weight_gradient(branch, mixed.view(-1, mixed.shape[2]), dtypes.proj_weight)
        grad_qkv, qkv_bias = launch_attention.attention_backward(
            grad_mixed, qkv, mixed, lse, options.heads, draws, options.attention_dropout
        )
        grad_qkv = grad_qkv.flatten(0, 1)
        grad_normed = torch.mm(grad_qkv, qkv_weight)
        norm1 = norm1_weight, None, rstd1, NONE, None, partials[:, 4:], (norm1_bias, rows1)
        _, grad = launch.add_norm_backward(grad_normed, grad, normed1, *norm1)
        qkv_grad = weight_gradient(grad_qkv, rows1, dtypes.qkv_weight)
        fc2_bias, *sums2, proj_bias, weight1, bias1 = column_sums(partials).unbind()
        gradients = [
            weight1.to(dtypes.norm1_weight), bias1.to(dtypes.norm1_bias),
            qkv_grad, cast_to(dtypes.qkv_bias, qkv_bias), proj, cast_to(dtypes.proj_bias, proj_bias),
            sums2[0].to(dtypes.norm2_weight), sums2[1].to(dtypes.norm2_bias),
            fc1, fc1_bias, fc2, cast_to(dtypes.fc2_bias, fc2_bias),
        ]  # fmt: skip
        return grad.view(grad_out.shape), None, *gradients
