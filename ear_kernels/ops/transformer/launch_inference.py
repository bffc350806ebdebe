"""Launches of the block's inference kernels, with their static tables. Imports Triton."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ear_kernels.ops.transformer import kernels_attention_inference as kernels_attention
from ear_kernels.ops.transformer import kernels_inference as kernels
from ear_kernels.runtime.launching import (
    ceil_div,
    dependent_launch,
    launch,
    next_power_of_two,
    processor,
)


@dataclass(frozen=True)
class NormConfig:
    """Columns of a chunk, warps."""

    chunk: int
    warps: int


@dataclass(frozen=True)
class AttentionConfig:
    """Queries and keys of a tile, stages of the loop over the keys, warps."""

    queries: int
    keys: int
    stages: int
    warps: int


CACHED_BYTES = 16384
"""Of keys that a program looks at together, 64 rows at most; as much of values."""


def may_depend(tensor: Tensor, dependent: bool) -> bool:
    """Whether to launch before the kernel before has ended: where it is wanted and the GPU can."""
    return dependent and processor(tensor).major >= 9


def norm_config(rows: int, width: int) -> NormConfig:
    """Within 3 % of the fastest of 12 to 26 launches on an H200 at 640 to 81,920 rows of 768, 1,024 and 1,280."""
    if width > 4096:
        return NormConfig(1024, 8)
    widest = 1024 if rows <= 2048 and width <= 1024 else 512
    chunk = min(widest, max(8, next_power_of_two(width)))
    return NormConfig(chunk, max(1, chunk // 128))


def attention_config(dim: int, heads: int, queries: int) -> AttentionConfig:
    """For this many heads of all sequences together.

    On an H200, 320 keys: of few queries within 1 % of the fastest of 6 to 9 launches (3 queries, 2 to 128 sequences);
    of all of heads of 64 features within 3 % and of 80 within 2 % of the fastest of 30 to 40 (2, 16, 128 sequences).
    """
    if queries <= 16:
        return AttentionConfig(16, 64, 3, 2)
    if dim > 64:
        return AttentionConfig(64, 32, 3, 2)
    if heads > 768:
        return AttentionConfig(64, 64, 3, 2)
    return AttentionConfig(64, 64, 3 if heads <= 66 else 2, 4)


def residual_norm(
    stream: Tensor,
    branches: Sequence[tuple[Tensor, Tensor | None]],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_stream: Tensor | None,
    out: Tensor,
    out_scale: Tensor | None,
    dependent: bool,
) -> None:
    """All contiguous; ``stream``, at most two branches, ``out_stream`` (or ``stream``) and ``out``: ``[R, W]``."""
    rows, width = stream.shape
    if not rows:
        return
    config = norm_config(rows, width)
    dependent = may_depend(stream, dependent)
    added = [tensor for branch in branches for tensor in branch] + [None] * (4 - 2 * len(branches))
    launch(
        kernels.residual_norm_kernel, (rows,), *added, stream, weight, bias, out_scale, out_stream, out, eps,
        on=stream, WIDTH=width, CHUNK=config.chunk, CHUNKS=ceil_div(width, config.chunk),
        DEPENDENT=dependent, num_warps=config.warps, **dependent_launch(dependent),
    )  # fmt: skip


def attention(query: Tensor, kv: Tensor, heads: int, out: Tensor, out_scale: Tensor | None, dependent: bool) -> None:
    """Contiguous ``query [G, M, W]`` and ``kv [G, N, 2W]``, or both the same ``[G, N, 3W]`` -> ``out [G, M, W]``."""
    groups, queries, width = out.shape
    if not out.numel():
        return
    dim, keys = width // heads, kv.shape[1]
    config = attention_config(dim, groups * heads, queries)
    kernel = kernels_attention.attention_kernel if config.warps <= 2 else kernels_attention.attention_carried_kernel
    dependent = may_depend(query, dependent)
    launch(
        kernel, (ceil_div(queries, config.queries), groups * heads),
        query, kv, out_scale, out, queries, keys, heads, math.log2(math.e) / math.sqrt(dim), on=query,
        DIM=dim, BLOCK_D=64 if dim > 64 else max(16, next_power_of_two(dim)), BM=config.queries, BN=config.keys,
        EVEN_M=queries % config.queries == 0, EVEN_N=keys % config.keys == 0, PACKED=query is kv,
        STAGES=config.stages, DEPENDENT=dependent, num_warps=config.warps, **dependent_launch(dependent),
    )  # fmt: skip


def attention_cached(qkv: Tensor, cache: Tensor, place: Tensor, heads: int, out: Tensor, dependent: bool) -> None:
    """Contiguous ``qkv [G, 3W]``, ``cache [2, G, N, W]`` -> ``out [G, W]``."""
    groups, width = out.shape
    if not groups:
        return
    dim, dependent = width // heads, may_depend(qkv, dependent)
    block = next_power_of_two(dim)
    rows = max(1, min(64, CACHED_BYTES // (block * qkv.itemsize)))
    launch(
        kernels_attention.attention_cached_kernel, (groups * heads,), qkv, cache, place, out, cache.shape[2], heads,
        math.log2(math.e) / math.sqrt(dim), on=qkv, DIM=dim, BLOCK_D=block, BN=rows, STAGES=3,
        DEPENDENT=dependent, num_warps=4, **dependent_launch(dependent),
    )  # fmt: skip
