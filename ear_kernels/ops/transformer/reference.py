"""The memory-bound parts of a pre-norm transformer block in plain PyTorch: the oracle and the CPU path."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dropout_add_layer_norm(
    branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout: float, eps: float, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``x = residual + dropout(branch)`` and ``LN(x)``; draws from torch's generator, ``seed`` is the kernel's."""
    x = residual + F.dropout(branch, dropout)
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def gelu_mlp(
    x: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """``Linear(dropout(GELU(Linear(x))))``; draws from torch's generator, ``seed`` is the kernel's."""
    return F.linear(F.dropout(F.gelu(F.linear(x, weight_in, bias_in)), dropout), weight_out, bias_out)


def gelu_derivative(x: Tensor) -> Tensor:
    """Of the exact GELU, ``Phi(x) + x phi(x)``."""
    return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * (2 * torch.pi) ** -0.5
