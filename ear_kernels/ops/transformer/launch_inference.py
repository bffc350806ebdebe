"""Launches of the block's inference kernels, with their static tables. Imports Triton."""

import math
from dataclasses import dataclass

from torch import Tensor

from ear_kernels.ops.transformer import kernels_attention_inference as attention_kernels
from ear_kernels.ops.transformer import kernels_inference as kernels
from ear_kernels.ops.transformer.kernels_attention_inference import DIRECT, SWAPPED, TRANSPOSED
from ear_kernels.runtime.launching import (
    ceil_div,
    dependent_launch,
    launch,
    next_power_of_two,
    processor,
    row_warps,
)


@dataclass(frozen=True)
class NormConfig:
    """Rows at a time, most programs, warps, and stages of the loop over a program's rows."""

    rows: int
    programs: int
    warps: int
    stages: int = 1


@dataclass(frozen=True)
class GeluConfig:
    """Elements at a time, most programs, warps."""

    block: int
    programs: int
    warps: int


@dataclass(frozen=True)
class AttentionConfig:
    """Form, queries and keys of a tile, stages of the loop over the keys, warps."""

    form: int
    queries: int
    keys: int
    stages: int
    warps: int


def may_depend(tensor: Tensor, dependent: bool) -> bool:
    """Whether to launch before the kernel before has ended: where it is wanted and the GPU can."""
    return dependent and processor(tensor).major >= 9


def norm_config(rows: int, width: int) -> NormConfig:
    return NormConfig(1, rows, 4 if 1024 < width <= 2048 else row_warps(width))


def gelu_config(count: int) -> GeluConfig:
    return GeluConfig(1024, 8448, 4)


def attention_config(dim: int, heads: int, queries: int) -> AttentionConfig:
    """For this many heads of all sequences together."""
    if queries <= 16:
        return AttentionConfig(SWAPPED.value, 16, 64, 3, 4)
    if dim > 64:
        return AttentionConfig(DIRECT.value, 64, 32, 3, 2)
    return AttentionConfig(TRANSPOSED.value, 64, 64, 3, 4)


def residual_norm(
    branch: Tensor | None,
    branch_bias: Tensor | None,
    stream: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_stream: Tensor,
    out: Tensor,
    out_scale: Tensor | None,
    dependent: bool,
) -> None:
    """All contiguous; ``stream``, ``branch``, ``out_stream`` (may be ``stream``) and ``out`` are ``[R, W]``."""
    rows, width = stream.shape
    if not rows:
        return
    config = norm_config(rows, width)
    per_program = config.rows * ceil_div(rows, config.rows * config.programs)
    dependent = may_depend(stream, dependent)
    launch(
        kernels.residual_norm_kernel, (ceil_div(rows, per_program),),
        branch, branch_bias, stream, weight, bias, out_scale, out_stream, out, rows, per_program, eps, on=stream,
        WIDTH=width, BLOCK=max(8, next_power_of_two(width)), ROWS=config.rows, STAGES=config.stages,
        DEPENDENT=dependent, num_warps=config.warps, **dependent_launch(dependent),
    )  # fmt: skip


def gelu(pre: Tensor, out: Tensor, out_scale: Tensor | None, dependent: bool) -> None:
    """Contiguous ``pre`` and ``out`` of one shape."""
    count = pre.numel()
    if not count:
        return
    config = gelu_config(count)
    per_program = ceil_div(count, config.block * config.programs)
    dependent = may_depend(pre, dependent)
    launch(
        kernels.gelu_kernel, (ceil_div(count, config.block * per_program),),
        pre, out_scale, out, count, per_program, on=pre,
        BLOCK=config.block, DEPENDENT=dependent, num_warps=config.warps, **dependent_launch(dependent),
    )  # fmt: skip


def attention(query: Tensor, kv: Tensor, heads: int, out: Tensor, out_scale: Tensor | None, dependent: bool) -> None:
    """Contiguous ``query [G, M, W]`` and ``kv [G, N, 2W]``, or both the same ``[G, N, 3W]`` -> ``out [G, M, W]``."""
    groups, queries, width = out.shape
    if not out.numel():
        return
    dim, keys = width // heads, kv.shape[1]
    config = attention_config(dim, groups * heads, queries)
    block = next_power_of_two(dim)
    if config.form == DIRECT.value:
        block = min(64, block)
    dependent = may_depend(query, dependent)
    launch(
        attention_kernels.attention_kernel, (ceil_div(queries, config.queries), groups * heads),
        query, kv, out_scale, out, queries, keys, heads, math.log2(math.e) / math.sqrt(dim), on=query,
        DIM=dim, BLOCK_D=max(16, block), BM=config.queries, BN=config.keys, EVEN_M=queries % config.queries == 0,
        EVEN_N=keys % config.keys == 0, PACKED=query is kv, FORM=config.form, STAGES=config.stages,
        DEPENDENT=dependent, num_warps=config.warps, **dependent_launch(dependent),
    )  # fmt: skip
