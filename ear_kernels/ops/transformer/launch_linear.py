"""Launches of the linears for inference, and the tables that choose between them and cuBLAS. Imports Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ear_kernels.ops.transformer import kernels_linear as kernels
from ear_kernels.ops.transformer.kernels import gelu_dropout_fwd_kernel
from ear_kernels.ops.transformer.launch import COLUMNS, GELU_PROGRAMS
from ear_kernels.runtime.gemm import linear as cublas_linear
from ear_kernels.runtime.launching import (
    ceil_div,
    dependent_launch,
    is_on_hopper,
    launch,
    next_power_of_two,
    processor,
    row_grid,
    row_warps,
)


@dataclass(frozen=True)
class LinearConfig:
    """Tile and launch options of the kernels.

    Args:
        bm, bn, bk: the tile; ``bk`` in 16-bit elements, of e4m3 twice as many.
        stages, warps: of the pipeline over K, and of a program.
        split: 2 stores half a tile at a time.
        programs: of a multiprocessor, each with one pipeline over all its tiles; 0: a program a tile. Of two one has
            the tensor cores while the other finishes its tile.
    """

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int
    split: int = 1
    programs: int = 0


@dataclass(frozen=True)
class Scales:
    """Float32 ``[1]``: an e4m3 operand is to be multiplied with its own, an e4m3 result was divided by its own."""

    x: Tensor | None = None
    weight: Tensor | None = None
    out: Tensor | None = None


NO_SCALES = Scales()

# (64 x 64 tiles of the result up to, rows up to, config): the first that fits. The fastest or within 3 % of it on an
# H200 at 16 to 81,920 rows of EAR-B, L and H, in 16 bit and in e4m3; but for the last, which is for 16 bit.
ANY = 2**62
TILES: tuple[tuple[int, int, LinearConfig], ...] = (
    (132, ANY, LinearConfig(64, 64, 128, 4, 4)),
    (264, ANY, LinearConfig(64, 128, 64, 4, 4)),
    (480, 1024, LinearConfig(128, 64, 64, 4, 4)),
    (3600, ANY, LinearConfig(128, 128, 64, 3, 4, split=2)),
    (ANY, ANY, LinearConfig(128, 256, 64, 3, 8, split=2, programs=1)),
)
# For e4m3: 193 us against 203 at 40,960 x 768 x 3,072 with the GELU, on an H200; 324 against 319 in 16 bit.
MANY_TILES_E4M3 = LinearConfig(128, 128, 64, 3, 4, split=2, programs=2)

# (K, whether N > K) -> rows up to which a linear without the GELU is no slower than cuBLAS there, in 16 bit and in
# e4m3; none for others. With the GELU the kernels are at most 3 % slower than cuBLAS and the GELU's kernel, and up to
# 40 % faster.
MOST_ROWS: dict[tuple[int, bool], tuple[int, int]] = {
    (768, True): (1024, 1280),
    (768, False): (2560, 5120),
    (3072, False): (640, 5120),
    (1024, True): (2560, 5120),
    (1024, False): (640, 1280),
    (4096, False): (128, 128),
    (1280, True): (0, 128),
    (1280, False): (2560, 5120),
    (5120, False): (0, 128),
}


def launch_linear(
    config: LinearConfig,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    scales: Scales = NO_SCALES,
    *,
    gelu: bool,
    dependent: bool = False,
) -> Tensor:
    """Write ``f(x @ weight^T + bias)``, f the GELU or nothing, to ``out [R, N]``, which is returned.

    ``dependent``: see :func:`ear_kernels.runtime.launching.dependent_launch`.
    """
    rows, n = out.shape
    bk = config.bk * 2 // x.element_size()
    tiles = ceil_div(rows, config.bm), ceil_div(n, config.bn)
    operands = TensorDescriptor.from_tensor(x, [config.bm, bk]), TensorDescriptor.from_tensor(weight, [config.bn, bk])
    arguments = (
        bias, scales.x, scales.weight, scales.out,
        TensorDescriptor.from_tensor(out, [config.bm, config.bn // config.split]),
    )  # fmt: skip
    options = {
        "BM": config.bm, "BN": config.bn, "BK": bk, "SPLIT": config.split, "GELU": gelu, "DEPENDENT": dependent,
        "num_stages": config.stages, "num_warps": config.warps, **dependent_launch(dependent),
    }  # fmt: skip
    if config.programs:
        programs = min(tiles[0] * tiles[1], config.programs * processor(x).count)
        launch(
            kernels.linear_many_rows_kernel, (programs,), *operands, *arguments, rows, n, x.shape[1], on=x, **options
        )
    else:
        prefetched = weight if dependent and weight.is_contiguous() else None
        launch(
            kernels.linear_few_rows_kernel, tiles, *operands, prefetched, *arguments, n, x.shape[1], on=x,
            LINE=128 // weight.element_size(), **options,
        )  # fmt: skip
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    dtype: torch.dtype,
    scales: Scales,
    gelu: bool,
    dependent: bool,
) -> Tensor:
    """``f(x @ weight^T + bias)``, f the GELU or nothing, ``[R, N]`` in ``dtype``; written to ``out`` if given."""
    rows, n = x.shape[0], weight.shape[0]
    if rows * n == 0:
        return x.new_empty((rows, n), dtype=dtype) if out is None else out
    if is_on_hopper(x) and (gelu or _kernels_are_faster(x, n, bias, dtype)):
        out = x.new_empty((rows, n), dtype=dtype) if out is None else out
        config = config_for(rows, n, x.element_size() == 1)
        return launch_linear(config, x, weight, bias, out, scales, gelu=gelu, dependent=dependent)
    if scales.x is not None and scales.weight is not None:
        given = {} if out is None else {"out": out}
        factors = scales.x, scales.weight
        return torch._scaled_mm(x, weight.t(), *factors, bias, out_dtype=dtype, use_fast_accum=True, **given)
    out = cublas_linear(x, weight, bias, out)
    return _gelu_in_place(out) if gelu else out


def config_for(rows: int, n: int, narrow: bool) -> LinearConfig:
    """The config of a kernel for a result ``[R, N]``; ``narrow``: of e4m3 operands."""
    tiles = ceil_div(rows, 64) * ceil_div(n, 64)
    config = next(config for most, most_rows, config in TILES if tiles <= most and rows <= most_rows)
    return MANY_TILES_E4M3 if narrow and config is TILES[-1][2] else config


def _kernels_are_faster(x: Tensor, n: int, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Than cuBLAS at a linear without the GELU; also if cuBLAS has no such call."""
    rows, k = x.shape
    narrow = x.element_size() == 1
    if dtype.itemsize != 2 or (narrow and bias is not None and bias.dtype != dtype):
        return True
    return rows <= MOST_ROWS.get((k, n > k), (0, 0))[narrow]


def _gelu_in_place(pre: Tensor) -> Tensor:
    rows, width = pre.shape
    programs, rows_per_program = row_grid(rows, GELU_PROGRAMS)
    block = max(8, min(COLUMNS, next_power_of_two(width)))
    launch(
        gelu_dropout_fwd_kernel, (programs, ceil_div(width, block)), pre, None, pre, rows, rows_per_program, 0, 1.0,
        on=pre, WIDTH=width, BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip
    return pre
