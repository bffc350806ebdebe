"""LayerNorm followed by AdaLN modulation, in plain PyTorch (paper Eq. 11, first line)."""

import torch.nn.functional as F
from torch import Tensor


def adaln_modulate(
    hidden: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``LN(hidden) * (1 + scale) + shift`` over the last dimension."""
    normalised = F.layer_norm(hidden, hidden.shape[-1:], weight, bias, eps)
    return normalised * (1 + scale) + shift
