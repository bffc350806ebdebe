"""The residual blocks and final layer of the generator in plain PyTorch (paper Eq. 11; spec 2)."""

import torch.nn.functional as F
from torch import Tensor

from ear_kernels.ops.adaln.reference import adaln_modulate
from ear_kernels.ops.silu_ffn.reference import gated_silu_ffn

BLOCK_PARAMETERS = 8
"""Parameters of one block, in this order: norm weight, bias; first linear weight, bias; second linear weight,
bias; modulation weight, bias."""

FINAL_PARAMETERS = 4
"""Parameters of the final layer: modulation weight, bias; output linear weight, bias."""


def generator_blocks(
    hidden: Tensor,
    conditioning: Tensor,
    parameters: list[Tensor],
    index: Tensor | None,
    group: int,
    temperature: float,
    eps: float,
) -> Tensor:
    """Blocks and final layer; see :func:`ear_kernels.functional.generator_blocks`."""
    rows = conditioning.shape[0] * group
    if index is not None:
        hidden = hidden[index]

    def per_row(modulation: Tensor) -> Tensor:
        return modulation.repeat_interleave(group, 0, output_size=rows) if group > 1 else modulation

    activated = F.silu(conditioning)
    *blocks, final = (
        parameters[start : start + BLOCK_PARAMETERS] for start in range(0, len(parameters), BLOCK_PARAMETERS)
    )
    for norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, weight_mod, bias_mod in blocks:
        shift, scale, gate = per_row(F.linear(activated, weight_mod, bias_mod)).chunk(3, -1)
        modulated = adaln_modulate(hidden, shift * temperature, scale, norm_weight, norm_bias, eps)
        hidden = gated_silu_ffn(hidden, modulated, gate, weight_in, bias_in, weight_out, bias_out)
    weight_mod, bias_mod, weight_last, bias_last = final
    shift, scale = per_row(F.linear(activated, weight_mod, bias_mod)).chunk(2, -1)
    return F.linear(adaln_modulate(hidden, shift, scale, None, None, eps), weight_last, bias_last)
