"""Fused operations for models trained with the energy loss. Importing this needs no GPU and no Triton."""

from ear_kernels.functional import adaln_modulate, energy_loss, gated_silu_ffn
from ear_kernels.modules import FusedAdaLNBlock, FusedEnergyLoss, FusedMLPGenerator
from ear_kernels.patch import accelerate

__version__ = "0.1.0"

__all__ = [
    "FusedAdaLNBlock",
    "FusedEnergyLoss",
    "FusedMLPGenerator",
    "accelerate",
    "adaln_modulate",
    "energy_loss",
    "gated_silu_ffn",
]
