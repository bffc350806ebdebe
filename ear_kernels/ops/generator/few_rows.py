"""The generator for few rows: one persistent kernel, weights read where they lie, fit for a CUDA graph.

No copy of a weight is made: a captured graph reads the parameters as they are at replay, and weights of
another dtype (float32 under autocast) are rounded as they are loaded.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ear_kernels.ops.generator import kernels_few_rows as kernels
from ear_kernels.ops.generator.reference import BLOCK_PARAMETERS, FINAL_PARAMETERS
from ear_kernels.runtime.launching import dense_rows, next_power_of_two, processor

MOST_ROWS = 64
"""Above this the launchers of ``ops/generator/passes.py`` run: one tile holds all rows."""

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
    warps: int = 4
    parts: int = 1
    ahead: int = 32


# (Rows up to, width up to) -> config for 16-bit weights, and for float32 ones, which need more registers. Tiles are
# the fastest on an H200 (results/few_rows_sweep_h200_2026-11-22.txt, then sweep_rows_h200_2026-11-24.json).
TABLE: tuple[tuple[int, int, FewConfig, FewConfig], ...] = (
    (16, 1024, FewConfig(16, 8, 256, 4, 32, 128, 6, parts=4, ahead=0), FewConfig(16, 8, 128, 3, 32, 128, 2)),
    (16, MOST_WIDTH, FewConfig(16, 16, 256, 4, 64, 128, 4, parts=4, ahead=0), FewConfig(16, 16, 128, 3, 32, 128, 2)),
    (MOST_ROWS, 1024, FewConfig(64, 8, 64, 8, 64, 64, 6, ahead=0), FewConfig(64, 8, 128, 2, 32, 64, 2)),
    (MOST_ROWS, MOST_WIDTH, FewConfig(64, 16, 128, 5, 64, 128, 4, ahead=0), FewConfig(64, 16, 128, 2, 32, 64, 2)),
)

_TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_MOST_TABLES = 64
_tables: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()


def config_for(rows: int, width: int, weights: torch.dtype = torch.bfloat16) -> FewConfig:
    """The static table's entry for this many rows of this width and weights of this dtype."""
    half, single = next((half, single) for most, widest, half, single in TABLE if rows <= most and width <= widest)
    return single if weights == torch.float32 else half


def addresses(tensors: list[Tensor]) -> Tensor:
    """int64 ``[len(tensors)]`` on the tensors' device: where they lie. Kept by address, so it cannot go
    stale."""
    key = (tensors[0].device, *(tensor.data_ptr() for tensor in tensors))
    table = _tables.get(key)
    if table is None:
        if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the generator's first few-rows call cannot be inside a CUDA graph capture; call it once before, "
                "as for any captured function"
            )
        table = torch.tensor(key[1:], dtype=torch.int64, device=tensors[0].device)
        _tables[key] = table
        if len(_tables) > _MOST_TABLES:
            _tables.popitem(last=False)
    return table


def applies(
    rows: int, z: Tensor, noise: Tensor, inputs: list[Tensor], parameters: list[Tensor], compute: torch.dtype
) -> bool:
    """Whether the few-rows kernel takes this call."""
    floats = set(_TRITON_TYPES)
    norms: set[torch.dtype] = set()
    weights = {tensor.dtype for tensor in inputs}
    for position, parameter in enumerate(parameters):
        is_norm = position % BLOCK_PARAMETERS < 2 and position < len(parameters) - FINAL_PARAMETERS
        (norms if is_norm else weights).add(parameter.dtype)
    return (
        0 < rows <= MOST_ROWS
        # Untested on AMD, where it spills.
        and torch.version.hip is None
        and compute in floats
        and z.dtype in floats
        and noise.dtype in floats
        and len(weights) == 1
        and len(norms) == 1
        and weights | norms <= floats
        and all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in (*inputs, *parameters))
        and parameters[0].shape[-1] <= MOST_WIDTH
    )


def _few_rows(
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
    layers = len(parameters) // BLOCK_PARAMETERS + 1
    output_dim = parameters[-2].shape[0]
    final_mod, final_mod_bias, final_weight, final_bias = parameters[-FINAL_PARAMETERS:]
    # The final layer's row of the table: no norm parameters (addresses that are never read), no second linear.
    final_row = [final_mod, final_mod, final_weight, final_bias, final_mod, final_mod, final_mod, final_mod_bias]
    table = addresses([*parameters[:-FINAL_PARAMETERS], *final_row, *inputs])
    weights, norms = inputs[0].dtype, parameters[0].dtype
    config = config_for(rows, width, weights)
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    cuda = z.is_cuda
    line = 128 // weights.itemsize

    def new(*shape: int) -> Tensor:
        return z.new_empty(shape, dtype=dtype)

    out = new(rows, output_dim)
    scratch = [new(rows, width), new(rows, width), new(layers, rows, 3 * width), new(2, rows, width)]
    counter = torch.zeros(1, dtype=torch.int32, device=z.device)
    phases = 2 + 3 * layers - 1
    spans = [(0, phases)] if cuda else [(phase, phase + 1) for phase in range(phases)]
    for first, last in spans:
        kernels.generator_kernel[(processor(z).count,)](
            noise,
            z,
            table,
            *scratch,
            out,
            counter,
            rows,
            output_dim,
            noise.shape[1],
            z.shape[1],
            samples,
            layers,
            noise.stride(0),
            z.stride(0),
            first,
            last,
            eps,
            temperature,
            W=width,
            WEIGHT=_TRITON_TYPES[weights],
            NORM=_TRITON_TYPES[norms],
            COMPUTE=_TRITON_TYPES[dtype],
            PRECISION="ieee" if exact else "tf32",
            BARRIERS=cuda,
            BM=config.bm,
            BN=config.bn,
            BK=config.bk,
            PARTS=config.parts,
            BN_MOD=config.bn_mod,
            BK_MOD=config.bk_mod,
            STAGES=config.stages,
            STAGES_MOD=config.stages_mod,
            AHEAD=config.ahead,
            BLOCK=next_power_of_two(width),
            LINES=triton.next_power_of_2(triton.cdiv(width, line)),
            LINE=line,
            num_warps=config.warps,
            **({"launch_cooperative_grid": True} if cuda else {}),
        )
    return out


def _few_rows_fake(
    z: Tensor,
    noise: Tensor,
    inputs: list[Tensor],
    parameters: list[Tensor],
    samples: int,
    temperature: float,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    return z.new_empty((noise.shape[0], parameters[-2].shape[0]), dtype=dtype)


LIBRARY = torch.library.Library("ear_kernels", "FRAGMENT")
LIBRARY.define(
    "generator_few_rows(Tensor z, Tensor noise, Tensor[] inputs, Tensor[] parameters, int samples, "
    "float temperature, float eps, ScalarType dtype) -> Tensor"
)
LIBRARY.impl("generator_few_rows", _few_rows, "CompositeExplicitAutograd")
torch.library.register_fake("ear_kernels::generator_few_rows", _few_rows_fake, lib=LIBRARY)


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
    """The whole generator without gradients; see :func:`_few_rows`."""
    run = torch.ops.ear_kernels.generator_few_rows if torch.compiler.is_compiling() else _few_rows
    with torch.autocast(z.device.type, enabled=False):
        return run(z, noise, inputs, parameters, samples, temperature, eps, dtype)
