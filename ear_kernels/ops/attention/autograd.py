"""Launchers and autograd of self-attention with dropout, its query-key-value linear included. Imports Triton."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ear_kernels.ops.transformer import kernels_attention as kernels
from ear_kernels.runtime.autograd import refuse_double_backward
from ear_kernels.runtime.column_sums import column_sums
from ear_kernels.runtime.copies import low as low_copy
from ear_kernels.runtime.gemm import linear, weight_gradient
from ear_kernels.runtime.launching import next_power_of_two


@dataclass(frozen=True)
class AttentionConfig:
    """Queries and keys of a tile, the loop's stages, warps; ``shared`` as in the kernels' docstring.

    Heads of 65 to 80 features are a block of 64 and one of 16 where it is False, and one block of 128 else.
    """

    bm: int
    bn: int
    stages: int
    warps: int
    shared: bool


# The fastest on an H200 at heads of 64 and lengths of 320 (docs/performance_train_step.md): forward, query, key.
CONFIGS = (AttentionConfig(64, 64, 3, 4, shared=True),) * 3
# For heads of 65 to 80 features the fastest there at 80 (mma.sync). Wider ones are PyTorch's: one block of 128 takes
# 0.87 ms at 80, cuDNN 0.58 and a copy.
SPLIT_CONFIGS = (AttentionConfig(64, 32, 3, 2, shared=False),) * 3


def configs(dim: int) -> tuple[AttentionConfig, AttentionConfig, AttentionConfig]:
    """Launches of the forward kernel and of the backward kernels of query and key, for heads of ``dim`` features."""
    return CONFIGS if dim <= 64 else SPLIT_CONFIGS


def threshold_of(dropout: float) -> tuple[int, float]:
    """(int32 below which an element is dropped, scale of what is kept) of a probability, to 2^-32."""
    steps = min(round(dropout * 2**32), 2**32 - 1)
    return steps - 2**31, 1 / (1 - steps / 2**32)


def draw(batch: int, heads: int, length: int, device: torch.device) -> Tensor:
    """What the dropout of one call is made of: int32 ``[2, B H, L]`` from torch's generator."""
    return torch.randint(-(2**31), 2**31, (2, batch * heads, length), dtype=torch.int32, device=device)


def constants(config: AttentionConfig, dim: int, length: int, dropout: bool) -> dict[str, Any]:
    """Constexprs and launch options for heads of ``dim`` features, at most 80."""
    split = not config.shared and dim > 64
    block_d, block_e = (64, 16) if split else (max(16, next_power_of_two(dim)), 0)
    full = block_d + block_e == dim
    return {
        "DIM": dim,
        "BLOCK_D": block_d,
        "BLOCK_E": block_e,
        "BM": config.bm,
        "BN": config.bn,
        "DROPOUT": dropout,
        "EVEN": (full or dim > 64) and length % config.bm == 0 and length % config.bn == 0,
        "FULL": full,
        "SHARED": config.shared,
        "STAGES": config.stages,
        "num_warps": config.warps,
    }


def forward(
    qkv: Tensor, heads: int, draws: Tensor | None, dropout: float, config: AttentionConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Contiguous ``qkv [B, L, 3W]`` -> (``[B, L, W]``, float32 ``[B H, L]``: log2 of the softmax's sums)."""
    batch, length, triple = qkv.shape
    width = triple // 3
    dim = width // heads
    config = config or configs(dim)[0]
    out = qkv.new_empty((batch, length, width))
    lse = qkv.new_empty((batch * heads, length), dtype=torch.float32)
    if out.numel():
        threshold, keep_scale = threshold_of(dropout)
        kernels.attention_fwd_kernel[(-(-length // config.bm), batch * heads)](
            qkv,
            out,
            lse,
            draws if draws is not None else lse,
            length,
            heads,
            math.log2(math.e) / math.sqrt(dim),
            threshold,
            keep_scale,
            **constants(config, dim, length, draws is not None),
        )
    return out, lse


def backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    draws: Tensor | None,
    dropout: float,
    query_config: AttentionConfig | None = None,
    key_config: AttentionConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """(gradient of ``qkv``, its column sums ``[3W]`` in float32); ``grad_out [B, L, W]`` is contiguous."""
    batch, length, triple = qkv.shape
    width = triple // 3
    dim = width // heads
    query_config, key_config = query_config or configs(dim)[1], key_config or configs(dim)[2]
    grad = torch.empty_like(qkv)
    if not grad.numel():
        return grad, qkv.new_zeros(triple, dtype=torch.float32)
    blocks_m, blocks_n = -(-length // query_config.bm), -(-length // key_config.bn)
    delta = torch.empty_like(lse)
    sums_query = lse.new_empty((batch * blocks_m, width))
    sums_rest = lse.new_empty((batch * blocks_n, 2 * width))
    threshold, keep_scale = threshold_of(dropout)
    scale = math.log2(math.e) / math.sqrt(dim)
    drawn = draws if draws is not None else lse
    kernels.attention_bwd_query_kernel[(blocks_m, batch * heads)](
        qkv,
        out,
        grad_out,
        lse,
        drawn,
        grad,
        delta,
        sums_query,
        length,
        heads,
        scale,
        threshold,
        keep_scale,
        **constants(query_config, dim, length, draws is not None),
    )
    kernels.attention_bwd_key_kernel[(blocks_n, batch * heads)](
        qkv,
        grad_out,
        lse,
        delta,
        drawn,
        grad,
        sums_rest,
        length,
        heads,
        scale,
        threshold,
        keep_scale,
        **constants(key_config, dim, length, draws is not None),
    )
    return grad, torch.cat((column_sums(sums_query), column_sums(sums_rest)))


class SelfAttention(torch.autograd.Function):
    """``x [B, L, C]`` -> the heads' results side by side, ``[B, L, W]``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, dropout: float, save: bool
    ) -> Tensor:
        batch, length, columns = x.shape
        low = low_copy(weight, x.dtype)
        rows = x.reshape(-1, columns)
        qkv = linear(rows, low, None if bias is None else low_copy(bias, x.dtype)).view(
            batch, length, weight.shape[0]
        )
        draws = draw(batch, heads, length, x.device) if dropout else None
        out, lse = forward(qkv, heads, draws, dropout)
        if save:
            ctx.save_for_backward(rows, low, qkv, out, lse, draws)
            ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
            ctx.heads, ctx.dropout = heads, dropout
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("self_attention")
        rows, low, qkv, out, lse, draws = ctx.saved_tensors
        grad, sums = backward(grad_out.contiguous(), qkv, out, lse, ctx.heads, draws, ctx.dropout)
        grad = grad.flatten(0, 1)
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            torch.mm(grad, low).view(*qkv.shape[:2], rows.shape[1]),
            weight_gradient(grad, rows, weight_dtype),
            None if bias_dtype is None else sums.to(bias_dtype),
            None,
            None,
            None,
        )


def self_attention(
    x: Tensor, weight: Tensor, bias: Tensor | None, heads: int, dropout: float, dtype: torch.dtype
) -> Tensor:
    """See :func:`ear_kernels.functional_transformer.self_attention`."""
    given = (x, weight) if bias is None else (x, weight, bias)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    with torch.autocast(x.device.type, enabled=False):
        return SelfAttention.apply(x.to(dtype), weight, bias, heads, dropout, save)
