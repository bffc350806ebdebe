"""Softmax attention with a given dropout mask in plain PyTorch: the oracle.

Without a mask the eager path is ``F.scaled_dot_product_attention``.
"""

import torch
from torch import Tensor


def columns(length: int) -> Tensor:
    """The odd numbers c of the positions, int64 ``[L]``: what ``kernels._column`` computes."""
    x = (torch.arange(length) + 1) * 0x9E3779B1 & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x85EBCA6B & 0xFFFFFFFF
    return (x ^ (x >> 13)) | 1


def kept(draws: Tensor, threshold: int) -> Tensor:
    """Bool ``[B H, L, L]``: what the kernels keep of the attention weights for ``draws [2, B H, L]`` (int32).

    An element is kept if ``r_i c_j + s_i mod 2^32``, as a signed number, is at least ``threshold``.
    """
    r, s = draws.long().unsqueeze(-1).unbind()
    bits = (r * columns(draws.shape[-1]).to(r.device) + s) & 0xFFFFFFFF
    return torch.where(bits >= 2**31, bits - 2**32, bits) >= threshold


def attention(query: Tensor, key: Tensor, value: Tensor, factors: Tensor | None = None) -> Tensor:
    """``(softmax(q k^T / sqrt(D)) * factors) v`` of ``[B, H, L, D]``; ``factors [B, H, L, L]``: the dropout's."""
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return (weights if factors is None else weights * factors.to(weights.dtype)) @ value
