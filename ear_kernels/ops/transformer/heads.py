"""Query, key and value from one linear, for attention that is not our own. Imports Triton."""

from typing import Any

import torch
from torch import Tensor

from ear_kernels.ops.transformer import kernels
from ear_kernels.ops.transformer.autograd import PROGRAMS
from ear_kernels.runtime.autograd import refuse_double_backward
from ear_kernels.runtime.copies import low as low_copy
from ear_kernels.runtime.gemm import linear, weight_gradient
from ear_kernels.runtime.launching import next_power_of_two, row_grid, row_warps


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
        low = low_copy(weight, x.dtype)
        rows = x.reshape(-1, width)
        packed = linear(rows, low, None if bias is None else low_copy(bias, x.dtype))
        ctx.save_for_backward(rows, low)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        query, key, value = (
            packed.view(batch, length, 3, heads, weight.shape[0] // (3 * heads)).permute(2, 0, 3, 1, 4).unbind()
        )
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("qkv_heads")
        rows, low = ctx.saved_tensors
        batch, heads, length, dim = grads[0].shape
        strides = {grad.stride() for grad in grads}
        if len(strides) > 1 or grads[0].stride(-1) != 1:
            grads = tuple(grad.contiguous() for grad in grads)
        width = heads * dim
        packed = rows.new_empty((batch * length, 3 * width))
        sums = rows.new_zeros(3 * width, dtype=torch.float32)
        if packed.numel():
            programs, rows_per_program = row_grid(batch * length, PROGRAMS)
            partials = rows.new_empty((programs, 3 * width), dtype=torch.float32)
            kernels.pack_heads_kernel[(programs, 3)](
                *grads,
                packed,
                partials,
                batch * length,
                rows_per_program,
                length,
                *grads[0].stride()[:3],
                WIDTH=width,
                DIM=dim,
                BLOCK=next_power_of_two(width),
                STAGES=2,
                num_warps=row_warps(width),
            )
            sums = partials.sum(0)
        weight_dtype, bias_dtype = ctx.dtypes
        grad_x = torch.mm(packed, low).view(batch, length, low.shape[1])
        return (
            grad_x,
            weight_gradient(packed, rows, weight_dtype),
            None if bias_dtype is None else sums.to(bias_dtype),
            None,
        )


def qkv_heads(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`ear_kernels.functional_transformer.qkv_heads`."""
    with torch.autocast(x.device.type, enabled=False):
        return QKVHeads.apply(x.to(dtype), weight, bias, heads)
