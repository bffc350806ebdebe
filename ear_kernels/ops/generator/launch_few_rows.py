"""The generator for few rows: weights read where they lie, a persistent kernel for the chain, fit for a CUDA graph.

No copy of a weight is made: a captured graph reads the parameters as they are at replay, and weights of
another dtype (float32 under autocast) are rounded as they are loaded. Imports Triton.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from ear_kernels.ops.generator import kernels_few_rows as kernels
from ear_kernels.ops.generator.reference import is_norm_parameter, modulation_columns, split_parameters
from ear_kernels.runtime.launching import ceil_div, dense_rows, launch, next_power_of_two, processor

MOST_ROWS = 64
"""Above this :mod:`launch_inference` runs: one tile of the modulations holds all rows."""

MOST_WIDTH = 2048
"""Wider rows likewise."""

GROUP_ROWS = 16
"""Rows of the chain that share phases: the least of a tensor core's product."""


@dataclass(frozen=True)
class ChainConfig:
    """Tiles of the chain: ``bn`` columns in steps of ``bk``, each cut into ``parts`` for as many warps, with
    ``stages`` of them in flight."""

    bn: int
    bk: int
    stages: int
    parts: int = 4


@dataclass(frozen=True)
class ModulationConfig:
    """Tiles of the modulations: ``bm`` rows, all of them, and ``bn`` columns, in steps of ``bk`` with ``stages`` of
    them in flight."""

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int = 4


# (Rows up to, width up to) -> config for 16-bit weights, and for float32 ones, which need more registers.
CHAIN: tuple[tuple[int, int, ChainConfig, ChainConfig], ...] = (
    (16, 1024, ChainConfig(8, 512, 2, 8), ChainConfig(8, 128, 3)),
    (16, MOST_WIDTH, ChainConfig(16, 256, 3, 8), ChainConfig(16, 128, 2)),
    (32, MOST_WIDTH, ChainConfig(16, 256, 2, 8), ChainConfig(16, 128, 2)),
    (MOST_ROWS, 1024, ChainConfig(32, 256, 2, 8), ChainConfig(32, 128, 2)),
    (MOST_ROWS, MOST_WIDTH, ChainConfig(32, 128, 3, 8), ChainConfig(32, 128, 2)),
)
MODULATIONS: tuple[tuple[int, ModulationConfig, ModulationConfig], ...] = (
    (16, ModulationConfig(16, 32, 128, 6), ModulationConfig(16, 32, 128, 2)),
    (MOST_ROWS, ModulationConfig(64, 64, 64, 6), ModulationConfig(64, 32, 64, 2)),
)

_TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def chain_config(rows: int, width: int, weights: torch.dtype = torch.bfloat16) -> ChainConfig:
    """The static table's entry for this many rows of this width and weights of this dtype."""
    half, single = next((half, single) for most, widest, half, single in CHAIN if rows <= most and width <= widest)
    return single if weights == torch.float32 else half


def modulation_config(rows: int, weights: torch.dtype = torch.bfloat16) -> ModulationConfig:
    """Likewise of the modulations."""
    half, single = next((half, single) for most, half, single in MODULATIONS if rows <= most)
    return single if weights == torch.float32 else half


@lru_cache(maxsize=64)
def _address_table(device: torch.device, addresses: tuple[int, ...]) -> Tensor:
    """The addresses as int64 on the device: uploaded once, as a call takes less time than an upload.

    It holds what it is looked up by, so it cannot go stale.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "the generator's first few-rows call cannot be inside a CUDA graph capture; call it once before, "
            "as for any captured function"
        )
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def parameter_table(inputs: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """The kernels' ``table``: where the parameters lie."""
    blocks, final = split_parameters(parameters)
    final_row = (None, None, final.weight_out, final.bias_out, None, None, final.weight_mod, final.bias_mod)
    rows = [*(tensor for block in blocks for tensor in block), *final_row, *inputs]
    addresses = tuple(0 if tensor is None else tensor.data_ptr() for tensor in rows)
    return _address_table(inputs[0].device, addresses)


def fits(rows: int, inputs: list[Tensor], parameters: list[Tensor], compute: torch.dtype, *others: Tensor) -> bool:
    """Whether the few-rows kernels take this call; ``others`` are its other tensors."""
    floats = set(_TRITON_TYPES)
    norms: set[torch.dtype] = set()
    weights = {tensor.dtype for tensor in inputs}
    for position, parameter in enumerate(parameters):
        (norms if is_norm_parameter(position, len(parameters)) else weights).add(parameter.dtype)
    return (
        0 < rows <= MOST_ROWS
        # Untested on AMD, where it spills.
        and not processor(inputs[0]).is_amd
        and {compute, *(tensor.dtype for tensor in others)} <= floats
        and len(weights) == 1
        and len(norms) == 1
        and weights | norms <= floats
        and all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in (*inputs, *parameters))
        and parameters[0].shape[-1] <= MOST_WIDTH
    )


def _precision(dtype: torch.dtype) -> str:
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


def modulations(
    noise: Tensor, inputs: list[Tensor], parameters: list[Tensor], temperature: float, out: Tensor
) -> None:
    """``noise [R, noise_dim]`` -> ``out [R, (3 * blocks + 2) W]`` (dense rows), computed in its dtype."""
    noise = dense_rows(noise)
    rows, width, layers = noise.shape[0], inputs[0].shape[0], len(split_parameters(parameters)[0]) + 1
    config = modulation_config(rows, inputs[0].dtype)
    activated = noise.new_empty((rows, width), dtype=out.dtype)
    compute, precision = _TRITON_TYPES[out.dtype], _precision(out.dtype)
    launch(
        kernels.embed_kernel, (ceil_div(width, 16), ceil_div(rows, GROUP_ROWS)),
        noise, inputs[0], inputs[1], activated, rows, noise.shape[1], noise.stride(0), on=noise,
        W=width, COMPUTE=compute, PRECISION=precision, BM=GROUP_ROWS, BN=16, num_warps=1,
    )  # fmt: skip
    launch(
        kernels.modulations_kernel, (layers * ceil_div(3 * width, config.bn),),
        activated, parameter_table(inputs, parameters), out, rows, layers, out.stride(0), temperature, on=noise,
        W=width, WEIGHT=_TRITON_TYPES[inputs[0].dtype], COMPUTE=compute, PRECISION=precision, BM=config.bm,
        BN=config.bn, BK=config.bk, STAGES=config.stages, num_warps=config.warps,
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
    groups = ceil_div(rows, GROUP_ROWS)
    line = 128 // weights.itemsize
    out = modulations.new_empty((rows, output_dim))
    streams = modulations.new_empty((2 * layers - 1, rows, width))
    table = parameter_table(inputs, parameters)
    counter = torch.zeros((groups, kernels.COUNTERS.value), dtype=torch.int32, device=z.device)
    phases = 2 * layers
    # The interpreter runs programs one after another: no barriers, a launch a phase.
    barriers = z.device.type != "cpu"
    for first, last in [(0, phases)] if barriers else [(phase, phase + 1) for phase in range(phases)]:
        launch(
            kernels.chain_kernel, (processor(z).count // groups * groups,),
            z, modulations, table, streams, out, counter, rows, output_dim, z.shape[1], samples, layers, z.stride(0),
            modulations.stride(0), first, last, eps, on=z,
            W=width, WEIGHT=_TRITON_TYPES[weights], NORM=_TRITON_TYPES[norms], COMPUTE=_TRITON_TYPES[dtype],
            PRECISION=_precision(dtype), BARRIERS=barriers, BM=GROUP_ROWS, BN=config.bn, BK=config.bk,
            STAGES=config.stages, PARTS=config.parts, LINES=next_power_of_two(ceil_div(width, line)), LINE=line,
            num_warps=config.parts, **({"launch_cooperative_grid": True} if barriers else {}),
        )  # fmt: skip
    return out


def few_rows(
    z: Tensor,
    noise: Tensor,
    inputs: list[Tensor],
    parameters: list[Tensor],
    samples: int,
    temperature: float,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """``z [T, C]``, ``noise [T * samples, noise_dim]`` -> ``[T * samples, D]``.

    ``inputs``: noise_embed weight, bias, input_proj weight, bias.
    """
    mod = noise.new_empty((noise.shape[0], modulation_columns(parameters)), dtype=dtype)
    modulations(noise, inputs, parameters, temperature, mod)
    return chain(z, mod, inputs, parameters, samples, eps)
