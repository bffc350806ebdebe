"""The memory-bound parts of a pre-norm transformer block in plain PyTorch: the oracle and the CPU path.

The eager path of attention is ``F.scaled_dot_product_attention``; :func:`attention` is its oracle with a given
dropout mask.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Block(NamedTuple):
    """Parameters of a pre-norm block of width W, A = heads x D features of attention and V of the MLP's inner layer.

    Linears may have no bias.
    """

    norm1_weight: Tensor  # [W]
    norm1_bias: Tensor  # [W]
    qkv_weight: Tensor  # [3 A, W], the rows as (query, key, value), (head), (feature)
    qkv_bias: Tensor | None  # [3 A]
    proj_weight: Tensor  # [W, A]
    proj_bias: Tensor | None  # [W]
    norm2_weight: Tensor  # [W]
    norm2_bias: Tensor  # [W]
    fc1_weight: Tensor  # [V, W]
    fc1_bias: Tensor | None  # [V]
    fc2_weight: Tensor  # [W, V]
    fc2_bias: Tensor | None  # [W]


class BlockOptions(NamedTuple):
    """Numbers of a pre-norm block; probabilities of dropout are in [0, 1).

    Args:
        heads: of the attention.
        attention_dropout: of the attention's weights.
        dropouts: of the attention's output, of the MLP's inner layer and of its output.
        eps: of the two norms.
    """

    heads: int
    attention_dropout: float = 0.0
    dropouts: tuple[float, float, float] = (0.0, 0.0, 0.0)
    eps: tuple[float, float] = (1e-6, 1e-6)


def dropout_add_layer_norm(
    branch: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None,
    dropout: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``x = residual + dropout(branch + branch_bias)`` and ``LN(x)``; draws from torch's generator."""
    if branch_bias is not None:
        branch = branch + branch_bias.to(branch.dtype)
    x = residual + F.dropout(branch, dropout)
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def gelu_mlp(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    dropout: float,
) -> Tensor:
    """``Linear(dropout(GELU(Linear(x))))``; draws from torch's generator."""
    return F.linear(F.dropout(F.gelu(F.linear(x, weight_in, bias_in)), dropout), weight_out, bias_out)


def qkv_heads(x: Tensor, weight: Tensor, bias: Tensor | None, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value ``[B, H, L, D]`` of one linear over ``x [B, L, W]``."""
    batch, length, _ = x.shape
    packed = F.linear(x, weight, bias).view(batch, length, 3, heads, weight.shape[0] // (3 * heads))
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind()
    return query, key, value


def transformer_block(x: Tensor, block: Block, options: BlockOptions) -> Tensor:
    """A pre-norm block over ``x [B, L, W]``; draws from torch's generator in the order of timm's block."""
    p, rates = block, options.dropouts
    normed = F.layer_norm(x, x.shape[-1:], p.norm1_weight, p.norm1_bias, options.eps[0])
    heads = qkv_heads(normed, p.qkv_weight, p.qkv_bias, options.heads)
    mixed = F.scaled_dot_product_attention(*heads, dropout_p=options.attention_dropout).transpose(1, 2).flatten(2)
    x = x + F.dropout(F.linear(mixed, p.proj_weight, p.proj_bias), rates[0])
    normed = F.layer_norm(x, x.shape[-1:], p.norm2_weight, p.norm2_bias, options.eps[1])
    out = gelu_mlp(normed, p.fc1_weight, p.fc1_bias, p.fc2_weight, p.fc2_bias, rates[1])
    return x + F.dropout(out, rates[2])


def columns(length: int) -> Tensor:
    """The odd numbers c of the positions, int64 ``[L]``: what ``kernels_attention._column`` computes."""
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


def attention(
    query: Tensor, key: Tensor, value: Tensor, factors: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """``(softmax(q k^T / sqrt(D)) * factors) v`` of ``[B, H, L, D]``; ``factors [B, H, L, L]``: the dropout's.

    ``causal``: query i sees the keys 0 .. i; the logits of the others are minus infinity.
    """
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    weights = logits.softmax(-1)
    return (weights if factors is None else weights * factors.to(weights.dtype)) @ value


def e4m3(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype``, divided by ``scale`` if that is given; e4m3 saturates at its largest number."""
    if scale is not None:
        x = x * (1 / scale).to(x.dtype)
    if dtype == torch.float8_e4m3fn:
        largest = torch.finfo(dtype).max
        x = x.clamp(-largest, largest)
    return x.to(dtype)


def residual_norm(
    stream: Tensor, branches: Sequence[tuple[Tensor, Tensor | None]], weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``x = stream + branches + their biases`` in the stream's dtype and ``LN(x)`` in at least float32."""
    for branch, own in branches:
        stream = stream + (branch if own is None else branch + own.to(branch.dtype)).to(stream.dtype)
    x = stream.to(torch.promote_types(stream.dtype, torch.float32))
    return stream, F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)


def attention_rows(query: Tensor, kv: Tensor, heads: int) -> Tensor:
    """``[G, M, W]`` of ``query [G, M, W]`` and ``kv [G, N, 2W]`` by ``F.scaled_dot_product_attention``."""
    key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in kv.chunk(2, -1))
    split = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(split, key, value).transpose(1, 2).flatten(2)


def attention_cached(qkv: Tensor, cache: Tensor, place: Tensor, heads: int) -> Tensor:
    """``[G, W]`` of a new row ``qkv [G, 3W]`` to those of ``cache [2, G, N, W]`` up to it, where it is written."""
    query, key, value = qkv.chunk(3, -1)
    if not len(qkv):
        return query  # of no sequences and a mask torch 2.11's gives None on a GPU
    cache.index_copy_(2, place, torch.stack([key, value]).unsqueeze(2))
    split = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query.unsqueeze(1), *cache))
    seen = torch.arange(cache.shape[2], device=qkv.device) <= place
    # What is not written may be anything: it is weighed with 0, which NaN is not ended by.
    q, k, v = split
    k, v = (part.where(seen.unsqueeze(-1), 0.0) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.unsqueeze(0)).transpose(1, 2).flatten(1)
