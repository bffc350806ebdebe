"""Launches of self-attention with dropout over a packed query, key and value. Imports Triton."""

import math
from typing import Any

import torch
from torch import Tensor

from ear_kernels.ops.transformer import kernels_attention as kernels
from ear_kernels.runtime.column_sums import column_sums
from ear_kernels.runtime.launching import ceil_div, launch, next_power_of_two

QUERIES = kernels.BM.value
WIDEST_HEAD = 80
"""Wider heads are PyTorch's: one block of 128 takes 0.87 ms at 80 features, cuDNN 0.58 and a copy."""


def keys_and_warps(dim: int) -> tuple[int, int]:
    """Keys of a tile and warps of all three kernels: the fastest on an H200 at heads of 64 and of 80 features.

    Up to 64 the tensor cores' WGMMA needs four warps; wider heads are two blocks, for mma.sync.
    """
    return (64, 4) if dim <= 64 else (32, 2)


def threshold_of(dropout: float) -> tuple[int, float]:
    """(int32 below which an element is dropped, scale of what is kept) of a probability, to 2^-32."""
    steps = min(round(dropout * 2**32), 2**32 - 1)
    return steps - 2**31, 1 / (1 - steps / 2**32)


def draw(batch: int, heads: int, length: int, device: torch.device) -> Tensor:
    """What the dropout of one call is made of: int32 ``[2, B H, L]`` from torch's generator."""
    return torch.randint(-(2**31), 2**31, (2, batch * heads, length), dtype=torch.int32, device=device)


def _scalars_and_options(
    dim: int, length: int, heads: int, dropout: float, causal: bool
) -> tuple[list[float], dict[str, Any]]:
    """The kernels' numbers, and their constexprs and launch options."""
    keys, warps = keys_and_warps(dim)
    block = 64 if dim > 64 else max(16, next_power_of_two(dim))
    scalars = [length, heads, math.log2(math.e) / math.sqrt(dim), *threshold_of(dropout)]
    even = (dim == block or dim > 64) and length % QUERIES == 0 and length % keys == 0
    return scalars, {"DIM": dim, "BLOCK_D": block, "BN": keys, "EVEN": even, "CAUSAL": causal, "num_warps": warps}


def attention(
    qkv: Tensor, heads: int, draws: Tensor | None, dropout: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Contiguous ``qkv [B, L, 3W]`` -> (``[B, L, W]``, float32 ``[B H, L]``: log2 of the softmax's sums)."""
    batch, length, triple = qkv.shape
    out = qkv.new_empty((batch, length, triple // 3))
    lse = qkv.new_empty((batch * heads, length), dtype=torch.float32)
    if out.numel():
        scalars, options = _scalars_and_options(triple // 3 // heads, length, heads, dropout, causal)
        grid = (ceil_div(length, QUERIES), batch * heads)
        launch(kernels.attention_fwd_kernel, grid, qkv, out, lse, draws, *scalars, on=qkv, **options)
    return out, lse


def attention_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    draws: Tensor | None,
    dropout: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """(gradient of ``qkv``, its column sums ``[3W]`` in float32); ``grad_out [B, L, W]`` is contiguous."""
    batch, length, triple = qkv.shape
    width = triple // 3
    grad = torch.empty_like(qkv)
    if not grad.numel():
        return grad, qkv.new_zeros(triple, dtype=torch.float32)
    scalars, options = _scalars_and_options(width // heads, length, heads, dropout, causal)
    blocks_m, blocks_n = ceil_div(length, QUERIES), ceil_div(length, options["BN"])
    delta = torch.empty_like(lse)
    # Rows that only one of the kernels writes, where their blocks differ, count as zeros.
    new = lse.new_empty if blocks_m == blocks_n else lse.new_zeros
    partials = new((batch * max(blocks_m, blocks_n), triple))
    launch(
        kernels.attention_bwd_query_kernel, (blocks_m, batch * heads),
        qkv, out, grad_out, lse, draws, grad, delta, partials, *scalars, on=qkv, **options,
    )  # fmt: skip
    launch(
        kernels.attention_bwd_key_kernel, (blocks_n, batch * heads),
        qkv, grad_out, lse, delta, draws, grad, partials, *scalars, on=qkv, **options,
    )  # fmt: skip
    return grad, column_sums(partials)
