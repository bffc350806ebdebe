"""The generator for few rows: one persistent kernel, weights read where they lie, fit for a CUDA graph.

No copy of a weight is made: a captured graph reads the parameters as they are at replay, and weights of
another dtype (float32 under autocast) are rounded as they are loaded. Imports Triton.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from ear_kernels.ops.generator import kernels_few_rows as kernels
from ear_kernels.ops.generator.reference import is_norm_parameter, split_parameters
from ear_kernels.runtime.launching import ceil_div, dense_rows, launch, next_power_of_two, processor

MOST_ROWS = 64
"""Above this :mod:`launch_inference` runs: one tile holds all rows."""

MOST_WIDTH = 2048
"""Wider rows likewise: the norm holds a row and what it is modulated with in registers."""


@dataclass(frozen=True)
class FewConfig:
    """Tiles of the persistent kernel: ``bm`` rows; ``bn`` columns in steps of ``bk`` with ``stages`` of them in
    flight, each cut into ``parts`` for as many warps; the same for the modulation, which has 3W columns a layer; and
    ``ahead``, the rows of the next modulation's weight that a program prefetches (0: none)."""

    bm: int
    bn: int
    bk: int
    stages: int
    bn_mod: int
    bk_mod: int
    stages_mod: int
    parts: int = 1
    ahead: int = 32


# (Rows up to, width up to) -> config for 16-bit weights, and for float32 ones, which need more registers. Tiles are
# the fastest on an H200 of what `python -m benchmarks.sweep few` times.
TABLE: tuple[tuple[int, int, FewConfig, FewConfig], ...] = (
    (16, 1024, FewConfig(16, 8, 256, 4, 32, 128, 6, parts=4, ahead=0), FewConfig(16, 8, 128, 3, 32, 128, 2)),
    (16, MOST_WIDTH, FewConfig(16, 16, 256, 4, 64, 128, 4, parts=4, ahead=0), FewConfig(16, 16, 128, 3, 32, 128, 2)),
    (MOST_ROWS, 1024, FewConfig(64, 8, 64, 8, 64, 64, 6, ahead=0), FewConfig(64, 8, 128, 2, 32, 64, 2)),
    (MOST_ROWS, MOST_WIDTH, FewConfig(64, 16, 128, 5, 64, 128, 4, ahead=0), FewConfig(64, 16, 128, 2, 32, 64, 2)),
)
WARPS = 4

TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def config_for(rows: int, width: int, weights: torch.dtype = torch.bfloat16) -> FewConfig:
    """The static table's entry for this many rows of this width and weights of this dtype."""
    half, single = next((half, single) for most, widest, half, single in TABLE if rows <= most and width <= widest)
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
    """The kernel's ``table``: where the parameters lie; ``inputs`` may lack the noise's."""
    blocks, final = split_parameters(parameters)
    final_row = (None, None, final.weight_out, final.bias_out, None, None, final.weight_mod, final.bias_mod)
    noise_row = () if len(inputs) == 4 else (None, None)
    rows = [*(tensor for block in blocks for tensor in block), *final_row, *noise_row, *inputs]
    addresses = tuple(0 if tensor is None else tensor.data_ptr() for tensor in rows)
    return _address_table(inputs[0].device, addresses)


def fits(rows: int, inputs: list[Tensor], parameters: list[Tensor], compute: torch.dtype, *others: Tensor) -> bool:
    """Whether the few-rows kernels take this call; ``others`` are its other tensors."""
    floats = set(TRITON_TYPES)
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


def matmul_precision(dtype: torch.dtype) -> str:
    """Of a kernel's products, as torch's setting has it."""
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"


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
    z, noise = dense_rows(z), dense_rows(noise)
    rows, width = noise.shape[0], inputs[0].shape[0]
    blocks, final = split_parameters(parameters)
    layers, output_dim = len(blocks) + 1, final.weight_out.shape[0]
    weights, norms = inputs[0].dtype, blocks[0].norm_weight.dtype
    config = config_for(rows, width, weights)
    if config.bm >= 64:
        # A WGMMA takes its left operand from registers where that was cast there, and ptxas 12.8 may use those again
        # too early.
        z, noise = z.to(dtype), noise.to(dtype)
    line = 128 // weights.itemsize
    # The interpreter runs programs one after another: no barriers, a launch a phase.
    barriers = z.device.type != "cpu"

    def new(*shape: int) -> Tensor:
        return z.new_empty(shape, dtype=dtype)

    out = new(rows, output_dim)
    scratch = [new(rows, width), new(rows, width), new(layers, rows, 3 * width), new(2, rows, width)]
    table = parameter_table(inputs, parameters)
    counter = torch.zeros(1, dtype=torch.int32, device=z.device)
    phases = 3 * layers + 1
    for first, last in [(0, phases)] if barriers else [(phase, phase + 1) for phase in range(phases)]:
        launch(
            kernels.generator_kernel, (processor(z).count,),
            noise, z, table, *scratch, out, counter, rows, output_dim, noise.shape[1], z.shape[1], samples, layers,
            noise.stride(0), z.stride(0), first, last, eps, temperature, on=z,
            W=width, WEIGHT=TRITON_TYPES[weights], NORM=TRITON_TYPES[norms], COMPUTE=TRITON_TYPES[dtype],
            PRECISION=matmul_precision(dtype), BARRIERS=barriers, BM=config.bm, BN=config.bn, BK=config.bk,
            PARTS=config.parts, BN_MOD=config.bn_mod, BK_MOD=config.bk_mod, STAGES=config.stages,
            STAGES_MOD=config.stages_mod, AHEAD=config.ahead, BLOCK=next_power_of_two(width),
            LINES=next_power_of_two(ceil_div(width, line)), LINE=line, num_warps=WARPS,
            **({"launch_cooperative_grid": True} if barriers else {}),
        )  # fmt: skip
    return out
