"""Launches of the linears for inference, and the static table that chooses between them and cuBLAS. Imports Triton."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ear_kernels.ops.transformer import kernels_linear as kernels
from ear_kernels.runtime.launching import ceil_div, dependent_launch, launch, processor


@dataclass(frozen=True)
class LinearConfig:
    """Tile and launch options of ``linear_inference_kernel``.

    Args:
        bm, bn, bk: the tile; ``bk`` in 16-bit elements, of e4m3 twice as many.
        stages, warps: of the pipeline over K, and of a program.
        split: 2 finishes half a tile at a time.
        flatten: one pipeline over all tiles of a program.
        resident: programs a multiprocessor; 0 for one program a tile.
        group: tiles of rows that consecutive programs share.
        parts: of K, whose products are stored apart.
    """

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int
    split: int = 1
    flatten: bool = False
    resident: int = 0
    group: int = 8
    parts: int = 1


@dataclass(frozen=True)
class Scales:
    """Float32 ``[1]``: of an e4m3 operand what it is to be multiplied with, of an e4m3 result by what it was divided."""

    x: Tensor | None = None
    weight: Tensor | None = None
    out: Tensor | None = None


def launch_linear(
    config: LinearConfig,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    scales: Scales = Scales(),
    gelu: bool = False,
    stream: Tensor | None = None,
    dependent: bool = False,
    prefetch: bool = True,
) -> Tensor:
    """Write ``f(x @ weight^T + bias)`` to ``out [R, N]``, f the GELU or nothing, plus ``stream [R, N]`` if given.

    With ``config.parts`` > 1 ``out`` is ``[parts, R, N]``, of which the sum over parts is the product.

    ``dependent``: see :func:`ear_kernels.runtime.launching.dependent_launch`.
    """
    rows, n = out.shape[-2:]
    k = x.shape[1]
    bk = config.bk * 2 // x.element_size()
    tiles = ceil_div(rows, config.bm) * ceil_div(n, config.bn) * config.parts
    programs = min(tiles, processor(x).count * config.resident) if config.resident else tiles
    prefetches = dependent and prefetch and weight.is_contiguous()
    launch(
        kernels.linear_inference_kernel, (programs,),
        TensorDescriptor.from_tensor(x, [config.bm, bk]),
        TensorDescriptor.from_tensor(weight, [config.bn, bk]),
        weight if prefetches else None, bias, scales.x, scales.weight, scales.out,
        stream, TensorDescriptor.from_tensor(out, [1] * (out.ndim - 2) + [config.bm, config.bn // config.split]), rows, n, k, on=x,
        BM=config.bm, BN=config.bn, BK=bk, GROUP_M=config.group, SPLIT=config.split, FLATTEN=config.flatten,
        GELU=gelu, PARTS=config.parts, DEPENDENT=dependent,
        LINE=128 // weight.element_size(),
        num_stages=config.stages, num_warps=config.warps, **dependent_launch(dependent),
    )  # fmt: skip
    return out
