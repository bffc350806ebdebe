"""Launches of the linears for inference, and the table that chooses between them and cuBLAS. Imports Triton."""

from __future__ import annotations

from dataclasses import dataclass

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
        resident: programs a multiprocessor of the persistent kernel; 0: a program a tile.
        flatten: one pipeline over all tiles of a persistent program.
    """

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int
    split: int = 1
    resident: int = 0
    flatten: bool = False


@dataclass(frozen=True)
class Scales:
    """Float32 ``[1]``: an e4m3 operand is to be multiplied with its own, an e4m3 result was divided by its own."""

    x: Tensor | None = None
    weight: Tensor | None = None
    out: Tensor | None = None


NO_SCALES = Scales()


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
    early: bool = False,
) -> Tensor:
    """Write ``f(x @ weight^T + bias)``, f the GELU or nothing, to ``out [R, N]``, which is returned.

    An ``out [parts, R, N]`` gets the products over as many parts of K, whose sum is the whole.
    ``dependent``: see :func:`ear_kernels.runtime.launching.dependent_launch`.
    """
    rows, n = out.shape[-2:]
    parts = out.shape[0] if out.ndim == 3 else 1
    bk = config.bk * 2 // x.element_size()
    tiles = ceil_div(rows, config.bm), ceil_div(n, config.bn)
    descriptors = (
        TensorDescriptor.from_tensor(x, [config.bm, bk]),
        TensorDescriptor.from_tensor(weight, [config.bn, bk]),
        TensorDescriptor.from_tensor(out, [1] * (out.ndim - 2) + [config.bm, config.bn // config.split]),
    )
    arguments = (bias, scales.x, scales.weight, scales.out, descriptors[2])
    options = {
        "BM": config.bm, "BN": config.bn, "BK": bk, "SPLIT": config.split, "GELU": gelu, "DEPENDENT": dependent,
        "num_stages": config.stages, "num_warps": config.warps, **dependent_launch(dependent),
    }  # fmt: skip
    if config.resident:
        programs = min(tiles[0] * tiles[1], processor(x).count * config.resident)
        launch(
            kernels.linear_many_rows_kernel, (programs,), *descriptors[:2], *arguments, rows, n, x.shape[1], on=x,
            FLATTEN=config.flatten, EARLY=early, **options,
        )  # fmt: skip
    else:
        prefetched = weight if dependent and weight.is_contiguous() else None
        launch(
            kernels.linear_few_rows_kernel, (*tiles, parts), *descriptors[:2], prefetched, *arguments, n, x.shape[1],
            on=x, PARTS=parts, LINE=128 // weight.element_size(), **options,
        )  # fmt: skip
    return out


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, scales: Scales, gelu: bool, dependent: bool
) -> Tensor:
    """Write ``f(x @ weight^T + bias)``, f the GELU or nothing, to ``out [R, N]``, which is returned."""
    rows, n = out.shape
    if rows == 0:
        return out
    config = config_for(x, n, gelu)
    if config is not None:
        return launch_linear(config, x, weight, bias, out, scales, gelu=gelu, dependent=dependent)
    cublas_linear(x, weight, bias, out)
    if gelu:
        programs, rows_per_program = row_grid(rows, GELU_PROGRAMS)
        block = max(8, min(COLUMNS, next_power_of_two(n)))
        launch(
            gelu_dropout_fwd_kernel, (programs, ceil_div(n, block)), out, None, out, rows, rows_per_program, 0, 1.0,
            on=out, WIDTH=n, BLOCK=block, num_warps=row_warps(block),
        )  # fmt: skip
    return out


def config_for(x: Tensor, n: int, gelu: bool) -> LinearConfig | None:
    """The config for ``x [R, K]`` and N columns; None for cuBLAS and, after it, the GELU's kernel."""
    if not is_on_hopper(x):
        return None
    rows = x.shape[0]
    if rows >= 1536:
        return LinearConfig(128, 256, 64, 3, 8, 2, 1, True) if gelu or x.element_size() == 1 else None
    return LinearConfig(64, 128, 64, 4, 4)
