"""Fused operations for models trained with the energy loss. Importing this needs no GPU and no Triton."""

from ear_kernels.evaluation import energy_distance, energy_score
from ear_kernels.functional import (
    adaln_modulate,
    dropout_add_layer_norm,
    energy_loss,
    gated_silu_ffn,
    gelu_mlp,
    kernel_score_loss,
    norm_gelu_mlp,
    norm_self_attention,
    qkv_heads,
    self_attention,
)
from ear_kernels.modules import FusedAdaLNBlock, FusedEnergyLoss, FusedMLPGenerator
from ear_kernels.optimizer import FusedAdamW
from ear_kernels.public_models import accelerate
from ear_kernels.runtime.copies import LowCopies
from ear_kernels.targets import GaussianTarget

__version__ = "0.1.0"

__all__ = [
    "FusedAdaLNBlock",
    "FusedAdamW",
    "FusedEnergyLoss",
    "FusedMLPGenerator",
    "GaussianTarget",
    "LowCopies",
    "accelerate",
    "adaln_modulate",
    "dropout_add_layer_norm",
    "energy_distance",
    "energy_loss",
    "energy_score",
    "gated_silu_ffn",
    "gelu_mlp",
    "kernel_score_loss",
    "norm_gelu_mlp",
    "norm_self_attention",
    "qkv_heads",
    "self_attention",
]
