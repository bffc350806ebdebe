"""The memory-bound parts of a pre-norm transformer block in plain PyTorch: the oracle and the CPU path."""

import torch.nn.functional as F
from torch import Tensor


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
