"""The two-layer SiLU network and its gated residual, in plain PyTorch (paper Eq. 11, second line)."""

import torch.nn.functional as F
from torch import Tensor


def gated_silu_ffn(
    hidden: Tensor,
    modulated: Tensor,
    gate: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
) -> Tensor:
    """``hidden + gate * (weight_out @ SiLU(weight_in @ modulated + bias_in) + bias_out)``."""
    inner = F.silu(F.linear(modulated, weight_in, bias_in))
    return hidden + gate * F.linear(inner, weight_out, bias_out)
