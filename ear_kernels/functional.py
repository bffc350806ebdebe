"""Index of the public operations; each is defined, with its checks and errors, in ``ops/*/functional.py``."""

from ear_kernels.ops.energy_loss.functional import check_energy_loss_options, energy_loss
from ear_kernels.ops.generator.functional import (
    adaln_modulate,
    gated_silu_ffn,
    generator_blocks,
    generator_chain,
    generator_few_rows,
    generator_modulations,
)
from ear_kernels.ops.transformer.functional import (
    dropout_add_layer_norm,
    gelu_mlp,
    norm_gelu_mlp,
    norm_self_attention,
    project,
    qkv_heads,
    self_attention,
)

__all__ = [
    "adaln_modulate",
    "check_energy_loss_options",
    "dropout_add_layer_norm",
    "energy_loss",
    "gated_silu_ffn",
    "gelu_mlp",
    "generator_blocks",
    "generator_chain",
    "generator_few_rows",
    "generator_modulations",
    "norm_gelu_mlp",
    "norm_self_attention",
    "project",
    "qkv_heads",
    "self_attention",
]
