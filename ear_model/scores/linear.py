"""The linear head of a score whose loss needs more digits than autocast keeps."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class FullPrecisionLinear(nn.Linear):
    """A linear layer in float32 under autocast and with 16-bit weights; float64 stays float64."""

    def forward(self, hidden_RC: Tensor) -> Tensor:
        """``[R, out_features]`` in float32 or float64."""
        weight, bias = (each if each.dtype == torch.float64 else each.float() for each in (self.weight, self.bias))
        with torch.autocast(hidden_RC.device.type, enabled=False):
            return functional.linear(hidden_RC.to(weight.dtype), weight, bias)
