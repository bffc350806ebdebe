"""Index of the public operations; each is defined, with its checks and errors, in ``ops/*/functional*.py``."""

from ear_kernels.ops.decoding.functional import guided_norm, predicted_rows, write_rows, write_tokens
from ear_kernels.ops.diffusion.functional import denoise_step
from ear_kernels.ops.energy_loss.functional import (
    check_energy_loss_options,
    check_kernel_score_options,
    energy_loss,
    kernel_score_loss,
)
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
from ear_kernels.ops.transformer.functional_block import Block, BlockOptions, transformer_block
from ear_kernels.ops.transformer.functional_inference import (
    attention,
    attention_cached,
    attention_rows,
    quantise_e4m3,
    residual_norm,
)
from ear_kernels.ops.transformer.functional_linear import linear_gelu, linear_inference

__all__ = [
    "Block",
    "BlockOptions",
    "adaln_modulate",
    "attention",
    "attention_cached",
    "attention_rows",
    "check_energy_loss_options",
    "check_kernel_score_options",
    "denoise_step",
    "dropout_add_layer_norm",
    "energy_loss",
    "gated_silu_ffn",
    "gelu_mlp",
    "generator_blocks",
    "generator_chain",
    "generator_few_rows",
    "generator_modulations",
    "guided_norm",
    "kernel_score_loss",
    "linear_gelu",
    "linear_inference",
    "norm_gelu_mlp",
    "norm_self_attention",
    "predicted_rows",
    "project",
    "qkv_heads",
    "quantise_e4m3",
    "residual_norm",
    "self_attention",
    "transformer_block",
    "write_rows",
    "write_tokens",
]
