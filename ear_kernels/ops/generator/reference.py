"""The generator's operations in plain PyTorch (paper Eq. 11; docs/model.md, section Generator)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Block(NamedTuple):
    """Parameters of a residual block, in the order of all lists of them."""

    norm_weight: Tensor
    norm_bias: Tensor
    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    bias_out: Tensor
    weight_mod: Tensor
    bias_mod: Tensor


class FinalLayer(NamedTuple):
    """Parameters of the final layer, which follow those of the blocks."""

    weight_mod: Tensor
    bias_mod: Tensor
    weight_out: Tensor
    bias_out: Tensor


BLOCK_PARAMETERS = 8
FINAL_PARAMETERS = 4


def split_parameters(parameters: list[Tensor]) -> tuple[list[Block], FinalLayer]:
    """Parameters of each block, and of the final layer."""
    *blocks, final = (
        parameters[start : start + BLOCK_PARAMETERS] for start in range(0, len(parameters), BLOCK_PARAMETERS)
    )
    return [Block(*block) for block in blocks], FinalLayer(*final)


def is_norm_parameter(position: int, count: int) -> bool:
    """Whether the parameter at ``position`` of ``count`` belongs to a norm, which may keep a dtype of its own."""
    return position % BLOCK_PARAMETERS < 2 and position < count - FINAL_PARAMETERS


def modulation_columns(parameters: list[Tensor]) -> int:
    """Columns of the modulations of all layers: shift, scale and gate of every block, shift and scale of the last."""
    return parameters[0].shape[-1] * (3 * (len(parameters) // BLOCK_PARAMETERS) + 2)


def modulation_linears(parameters: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Weight and bias of every layer's modulation linear."""
    blocks, final = split_parameters(parameters)
    return [(block.weight_mod, block.bias_mod) for block in blocks] + [(final.weight_mod, final.bias_mod)]


def adaln_modulate(
    hidden: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``LN(hidden) * (1 + scale) + shift``."""
    return F.layer_norm(hidden, hidden.shape[-1:], weight, bias, eps) * (1 + scale) + shift


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
    blocks, final = split_parameters(parameters)
    for block in blocks:
        shift, scale, gate = per_row(F.linear(activated, block.weight_mod, block.bias_mod)).chunk(3, -1)
        modulated = adaln_modulate(hidden, shift * temperature, scale, block.norm_weight, block.norm_bias, eps)
        hidden = gated_silu_ffn(
            hidden, modulated, gate, block.weight_in, block.bias_in, block.weight_out, block.bias_out
        )
    shift, scale = per_row(F.linear(activated, final.weight_mod, final.bias_mod)).chunk(2, -1)
    return F.linear(adaln_modulate(hidden, shift, scale, None, None, eps), final.weight_out, final.bias_out)


def generator_modulations(
    noise: Tensor, inputs: list[Tensor], parameters: list[Tensor], temperature: float, out: Tensor
) -> None:
    """Modulations of all layers; see :func:`ear_kernels.functional.generator_modulations`."""
    activated = F.silu(F.linear(noise, *inputs[:2]) if inputs else noise)
    weights, biases = zip(*modulation_linears(parameters), strict=True)
    out.copy_(F.linear(activated, torch.cat(weights), torch.cat(biases)))
    scale_shifts(out, parameters[0].shape[-1], temperature)


def scale_shifts(modulations: Tensor, width: int, temperature: float) -> None:
    """Multiply the shifts of the residual blocks, in place."""
    if temperature != 1:
        blocks = modulations[:, : -2 * width].unflatten(1, (-1, 3, width))
        blocks[:, :, 0].mul_(temperature)


def generator_chain(
    z: Tensor, modulations: Tensor, inputs: list[Tensor], parameters: list[Tensor], eps: float
) -> Tensor:
    """The generator with given modulations; see :func:`ear_kernels.functional.generator_chain`."""
    hidden = F.linear(z, *inputs[-2:])
    width = hidden.shape[-1]
    blocks, final = split_parameters(parameters)
    for layer, block in enumerate(blocks):
        shift, scale, gate = modulations[:, 3 * width * layer : 3 * width * (layer + 1)].chunk(3, -1)
        modulated = adaln_modulate(hidden, shift, scale, block.norm_weight, block.norm_bias, eps)
        hidden = gated_silu_ffn(
            hidden, modulated, gate, block.weight_in, block.bias_in, block.weight_out, block.bias_out
        )
    shift, scale = modulations[:, -2 * width :].chunk(2, -1)
    return F.linear(adaln_modulate(hidden, shift, scale, None, None, eps), final.weight_out, final.bias_out)
