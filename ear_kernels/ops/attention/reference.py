"""Softmax attention with a given dropout mask in plain PyTorch: the oracle.

Without a mask the eager path is ``F.scaled_dot_product_attention``.
"""

import torch
from torch import Tensor


def kept(draws: Tensor, threshold: int) -> Tensor:
    """Bool ``[B H, L, L]``: what the kernels keep of the attention weights for ``draws [3, B H, L]`` (int32).

    An element is kept if ``r_i (c_j | 1) + o_j mod 2^32``, as a signed number, is at least ``threshold``.
    """
    r, c, o = draws.long().unbind()
    bits = (r.unsqueeze(-1) * (c | 1).unsqueeze(-2) + o.unsqueeze(-2)) & 0xFFFFFFFF
    return torch.where(bits >= 2**31, bits - 2**32, bits) >= threshold


def attention(query: Tensor, key: Tensor, value: Tensor, factors: Tensor | None = None) -> Tensor:
    """``(softmax(q k^T / sqrt(D)) * factors) v`` of ``[B, H, L, D]``; ``factors [B, H, L, L]``: the dropout's."""
    weights = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    return (weights if factors is None else weights * factors.to(weights.dtype)) @ value
