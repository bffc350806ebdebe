"""The generator without gradients in two halves, for few rows: modulations of the noise, then the chain.

Weights are read where they lie: a captured graph reads them as they are at replay, and weights of another dtype
(float32 under autocast) are rounded as they are loaded. Imports Triton.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ear_kernels.ops.generator import kernels_chain as kernels
from ear_kernels.ops.generator.launch_few_rows import (
    MOST_ROWS,
    TRITON_TYPES,
    fits,
    matmul_precision,
    parameter_table,
)
from ear_kernels.ops.generator.reference import modulation_columns, split_parameters
from ear_kernels.runtime.launching import ceil_div, dense_rows, launch, next_power_of_two, processor


@dataclass(frozen=True)
class ChainConfig:
    """Tiles of the chain: groups of ``bm`` rows and ``bn`` columns a program; each of ``parts`` warps takes a part of
    a row."""

    bm: int
    bn: int
    parts: int = 8


@dataclass(frozen=True)
class ModulationConfig:
    """Tiles of the modulations: ``bm`` rows, all of them, and ``bn`` columns, in steps of ``bk`` with ``stages`` of
    them in flight."""

    bm: int
    bn: int
    bk: int
    stages: int


# (Rows up to, width up to) -> config for 16-bit weights, and for float32 ones. What none takes is launch_inference's.
CHAIN: tuple[tuple[int, int, ChainConfig | None, ChainConfig | None], ...] = (
    (8, 1024, ChainConfig(8, 8), ChainConfig(8, 8)),
    (8, 2048, ChainConfig(8, 16), ChainConfig(8, 16)),
    (16, 1024, ChainConfig(16, 8), ChainConfig(16, 8)),
    # Of float32 weights it would spill.
    (MOST_ROWS, 1024, ChainConfig(16, 32), None),
)
# Rows up to -> config for 16-bit weights, and for float32 ones.
MODULATIONS: tuple[tuple[int, ModulationConfig, ModulationConfig], ...] = (
    (16, ModulationConfig(16, 64, 128, 4), ModulationConfig(16, 32, 128, 2)),
    (MOST_ROWS, ModulationConfig(64, 128, 64, 5), ModulationConfig(64, 32, 64, 2)),
)
WHOLE_ROWS = 16
"""Up to this the whole generator, of 16-bit weights, is faster in two halves than in one kernel."""


def chain_config(rows: int, width: int, weights: torch.dtype) -> ChainConfig | None:
    """The static table's entry for this many rows of this width and weights of this dtype, if there is one."""
    for most, widest, half, single in CHAIN:
        if rows <= most and width <= widest:
            return single if weights == torch.float32 else half
    return None


def modulation_config(rows: int, weights: torch.dtype) -> ModulationConfig:
    """The static table's entry for this many rows and weights of this dtype."""
    half, single = next((half, single) for most, half, single in MODULATIONS if rows <= most)
    return single if weights == torch.float32 else half


def chain_fits(
    rows: int, inputs: list[Tensor], parameters: list[Tensor], compute: torch.dtype, *others: Tensor
) -> bool:
    """Whether :func:`chain` takes this call; see :func:`launch_few_rows.fits`."""
    width = inputs[0].shape[0]
    return (
        fits(rows, inputs, parameters, compute, *others)
        and compute != torch.float32
        # Rows of whole 16-byte vectors.
        and width % 8 == 0
        and chain_config(rows, width, inputs[0].dtype) is not None
    )


def modulations(
    noise: Tensor, inputs: list[Tensor], parameters: list[Tensor], temperature: float, out: Tensor
) -> None:
    """``noise [R, noise_dim]`` -> ``out [R, (3 * blocks + 2) W]`` (dense rows), computed in its dtype."""
    noise = dense_rows(noise)
    rows, width, layers = noise.shape[0], inputs[0].shape[0], len(split_parameters(parameters)[0]) + 1
    config = modulation_config(rows, inputs[0].dtype)
    activated = noise.new_empty((rows, width), dtype=out.dtype)
    compute, precision = TRITON_TYPES[out.dtype], matmul_precision(out.dtype)
    launch(
        kernels.embed_kernel, (ceil_div(width, 16), ceil_div(rows, 8)),
        noise, inputs[0], inputs[1], activated, rows, noise.shape[1], noise.stride(0), on=noise,
        W=width, COMPUTE=compute, PRECISION=precision, BM=8, BN=16, num_warps=1,
    )  # fmt: skip
    launch(
        kernels.modulations_kernel, (layers * ceil_div(3 * width, config.bn),),
        activated, parameter_table(inputs, parameters), out, rows, layers, out.stride(0), temperature, on=noise,
        W=width, WEIGHT=TRITON_TYPES[inputs[0].dtype], COMPUTE=compute, PRECISION=precision, BM=config.bm,
        BN=config.bn, BK=config.bk, STAGES=config.stages, num_warps=4,
    )  # fmt: skip


def chain(
    z: Tensor, modulations: Tensor, inputs: list[Tensor], parameters: list[Tensor], samples: int, eps: float
) -> Tensor:
    """``z [R / samples, C]``, ``modulations [R, (3 * blocks + 2) W]`` (dense rows) -> ``[R, D]`` in its dtype."""
    z, dtype = dense_rows(z), modulations.dtype
    rows, width = modulations.shape[0], inputs[0].shape[0]
    blocks, final = split_parameters(parameters)
    layers, output_dim = len(blocks) + 1, final.weight_out.shape[0]
    weights, norms = inputs[0].dtype, blocks[0].norm_weight.dtype
    config = chain_config(rows, width, weights)
    assert config is not None
    groups = ceil_div(rows, config.bm)
    # Of narrow rows still what a product of every part takes.
    block = max(next_power_of_two(width), 16 * config.parts)
    phases = 3 * layers
    line = 128 // weights.itemsize
    out = modulations.new_empty((rows, output_dim))
    streams = modulations.new_empty((phases - 1, rows, width))
    streams.view(torch.int16).fill_(-1)
    table = parameter_table(inputs, parameters)
    # The interpreter runs programs one after another: none can wait, so there is a launch a phase.
    poll = z.device.type != "cpu"
    for first, last in [(0, phases)] if poll else [(phase, phase + 1) for phase in range(phases)]:
        launch(
            kernels.chain_kernel, (processor(z).count // groups * groups,),
            z, modulations, table, streams, out, rows, output_dim, z.shape[1], samples, layers, z.stride(0),
            modulations.stride(0), first, last, eps, on=z,
            W=width, WEIGHT=TRITON_TYPES[weights], NORM=TRITON_TYPES[norms], COMPUTE=TRITON_TYPES[dtype],
            POLL=poll, BM=config.bm, BN=config.bn, PARTS=config.parts, BLOCK=block,
            LINES=next_power_of_two(ceil_div(width, line)), LINE=line, num_warps=config.parts,
            **({"launch_cooperative_grid": True} if poll else {}),
        )  # fmt: skip
    return out


def whole(
    z: Tensor,
    noise: Tensor,
    inputs: list[Tensor],
    parameters: list[Tensor],
    samples: int,
    temperature: float,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Both halves: ``z [T, C]``, ``noise [T * samples, noise_dim]`` -> ``[T * samples, D]``."""
    mod = noise.new_empty((noise.shape[0], modulation_columns(parameters)), dtype=dtype)
    modulations(noise, inputs, parameters, temperature, mod)
    return chain(z, mod, inputs, parameters, samples, eps)
