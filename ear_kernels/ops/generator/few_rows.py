"""The generator for few rows: 3 + 2 * depth launches, weights read where they lie, fit for a CUDA graph.

No copy of a weight is made: a captured graph reads the parameters as they are at replay, and weights of
another dtype (float32 under autocast) are rounded as they are loaded.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ear_kernels.ops.adaln import autograd as adaln
from ear_kernels.ops.generator import kernels
from ear_kernels.ops.generator.reference import BLOCK_PARAMETERS

MOST_ROWS = 64
"""Above this, and above ``MOST_ROWS_WIDE`` where the width exceeds ``WIDE``, the launchers of
``ops/generator/autograd.py`` run: tiles of 16 or 32 rows re-read the weights."""

WIDE = 1024
MOST_ROWS_WIDE = 16
"""On an H200 the few-rows kernels beat eager in a CUDA graph at 4 and 64 rows of 6 x 1024 (0.121 against 0.250 ms and
0.163 against 0.226) and at 4 rows of 12 x 1536 (0.314 against 0.474), not at its 64 rows (0.488 against 0.475)."""


@dataclass(frozen=True)
class FewConfig:
    """Tiles of the few-rows kernels; ``bn_mod`` is that of the modulation, which has 3W (depth + 1) columns.

    ``bk_norm`` and ``bk_norm_fp32`` are the K steps of the linears behind a norm, for 16-bit and for float32 weights
    (None: ``bk``): the norm's operands need registers, and larger steps spill.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    bn_mod: int
    bk_mod: int
    bk_norm: int | None = None
    bk_norm_fp32: int | None = None

    def norm_step(self, weights: torch.dtype) -> int:
        """K step of the linears behind a norm, for weights of this dtype."""
        return (self.bk_norm_fp32 if weights == torch.float32 else self.bk_norm) or self.bk


# Rows up to -> config.
TABLE: tuple[tuple[int, FewConfig], ...] = (
    (16, FewConfig(16, 16, 512, 4, 2, 64, 256, bk_norm=256, bk_norm_fp32=256)),
    (MOST_ROWS, FewConfig(32, 16, 256, 4, 2, 64, 64, bk_norm_fp32=128)),
)

_TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_MOST_TABLES = 64
_tables: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()


def config_for(rows: int) -> FewConfig:
    """The static table's entry for this many rows."""
    return next(config for most, config in TABLE if rows <= most)


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


def applies(rows: int, z: Tensor, noise: Tensor, parameters: list[Tensor], compute: torch.dtype) -> bool:
    """Whether the few-rows kernels take this call."""
    floats = set(_TRITON_TYPES)
    width = parameters[0].shape[-1]
    return (
        0 < rows <= (MOST_ROWS if width <= WIDE else MOST_ROWS_WIDE)
        and compute in floats
        and z.dtype in floats
        and noise.dtype in floats
        and all(parameter.dtype in floats and parameter.is_contiguous() for parameter in parameters)
        and len({parameter.dtype for parameter in parameters[BLOCK_PARAMETERS - 2 :: BLOCK_PARAMETERS]}) == 1
        and width <= adaln.MAX_WIDTH
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
    z, noise = adaln.as_rows(z), adaln.as_rows(noise)
    weight_noise, bias_noise, weight_z, bias_z = inputs
    rows, width = noise.shape[0], weight_noise.shape[0]
    *blocks, final = (
        parameters[start : start + BLOCK_PARAMETERS] for start in range(0, len(parameters), BLOCK_PARAMETERS)
    )
    layers = len(blocks) + 1
    config = config_for(rows)
    tiles_m = triton.cdiv(rows, config.bm)
    tiles_n = triton.cdiv(width, config.bn)
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    precision = "ieee" if exact else "tf32"
    compute = _TRITON_TYPES[dtype]

    def new(*shape: int) -> Tensor:
        return z.new_empty(shape, dtype=dtype)

    tile = {
        "COMPUTE": compute,
        "PRECISION": precision,
        "BM": config.bm,
        "BN": config.bn,
        "BK": config.bk,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    activated, hidden = new(rows, width), new(rows, width)
    kernels.embed_kernel[(tiles_n, tiles_m, 2)](
        noise,
        weight_noise,
        bias_noise,
        z,
        weight_z,
        bias_z,
        activated,
        hidden,
        rows,
        width,
        noise.shape[1],
        z.shape[1],
        samples,
        noise.stride(0),
        z.stride(0),
        **{**tile, "BK": min(config.bk, 64)},
    )
    modulations = [(block[6], block[7]) for block in blocks] + [(final[0], final[1])]
    mod = new(layers, rows, 3 * width)
    tiles = triton.cdiv(3 * width, config.bn_mod)
    kernels.modulation_kernel[(layers * tiles, tiles_m)](
        activated,
        addresses([weight for weight, _ in modulations]),
        addresses([bias for _, bias in modulations]),
        mod,
        rows,
        width,
        layers,
        tiles,
        WEIGHT=_TRITON_TYPES[final[0].dtype],
        **{**tile, "BN": config.bn_mod, "BK": config.bk_mod},
    )

    def norm_linear(layer: int, norm: list[Tensor] | None, weight: Tensor, bias: Tensor, factor: float) -> Tensor:
        n = weight.shape[0]
        out = new(rows, n)
        kernels.norm_linear_kernel[(triton.cdiv(n, config.bn), tiles_m)](
            hidden,
            mod[layer],
            norm[0] if norm else hidden,
            norm[1] if norm else hidden,
            weight,
            bias,
            out,
            rows,
            n,
            3 * width,
            eps,
            factor,
            K=width,
            AFFINE=norm is not None,
            SILU=norm is not None,
            BLOCK_STATS=min(8192 // config.bm, adaln.block_of(width)),
            **{**tile, "BK": config.norm_step(weight.dtype)},
        )
        return out

    for layer, (norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, _, _) in enumerate(blocks):
        active = norm_linear(layer, [norm_weight, norm_bias], weight_in, bias_in, temperature)
        following = new(rows, width)
        kernels.gate_linear_kernel[(tiles_n, tiles_m)](
            active,
            weight_out,
            bias_out,
            hidden,
            mod[layer, :, 2 * width :],
            following,
            rows,
            width,
            width,
            3 * width,
            **tile,
        )
        hidden = following
    return norm_linear(layers - 1, None, final[2], final[3], 1.0)


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
