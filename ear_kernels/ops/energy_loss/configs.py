"""Static launch configurations of the energy-loss kernels, and the strides of their rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ear_kernels.runtime.launching import ceil_div, next_power_of_two  # noqa: F401

MAX_ROW_DIMS = 3


@dataclass(frozen=True)
class TileConfig:
    """Sizes of one program: rows, samples and features (powers of two), its warps, how far a loop is unrolled, and
    the most registers of a thread (None: what ptxas thinks best)."""

    block_r: int
    block_n: int
    block_d: int
    num_warps: int
    unroll: int = 1
    registers: int | None = None


def launch_options(num_warps: int, registers: int | None, tensor: torch.Tensor) -> dict[str, int]:
    """Keyword options of a launch; the limit of registers is for NVIDIA only."""
    limited = registers is not None and tensor.is_cuda and torch.version.hip is None
    return {"num_warps": num_warps, **({"maxnreg": registers} if limited and registers is not None else {})}


# The largest tile (samples x features) that one program holds; larger rows are split over programs.
MAX_TILE = 4096


def energy_rows_config(n: int, features: int, double: bool = False) -> TileConfig | None:
    """Configuration of the one-pass energy-loss kernel, or None if a row does not fit into a program.

    Small rows share a program of 128 threads with 8 elements each, or one of 32 threads with 16 each where a row has
    a single feature; a row of 1,024 elements or more has its own program with 32 elements a thread.
    """
    block_n, block_d = next_power_of_two(n), next_power_of_two(features)
    tile = block_n * block_d
    if tile * (2 if double else 1) > MAX_TILE:
        return None
    if tile >= 1024:
        # The largest tiles get 16 elements a thread, because they also hold many samples' sums.
        size = tile * (2 if double else 1)
        return TileConfig(1, block_n, block_d, size // (512 if double or size > 2048 else 1024))
    if features == 1:
        return TileConfig(max(1, min(128, 512 // tile)), block_n, block_d, 1)
    return TileConfig(max(1, min(128, 1024 // tile)), block_n, block_d, 4)


def energy_gaussian_config(n: int, features: int, double: bool = False, general: bool = False) -> TileConfig | None:
    """Configuration of the kernel that draws its targets, or None if a row does not fit into a program.

    One warp a row as long as it holds the tile, so that no target is drawn by two warps. ``general`` is for an
    alpha other than 1 and 2 and for gradients of the targets, which need registers: more warps, and one target at a
    time.
    """
    block_n, block_d = next_power_of_two(n), next_power_of_two(features)
    tile = block_n * block_d * (2 if double else 1)
    if tile > MAX_TILE:
        return None
    warps = max(1, tile // (512 if general or tile > 2048 else 1024))
    if tile >= 256:
        # Left alone, ptxas stops at 168 registers of its own accord and spills the rest.
        registers = 255 if general and warps > 1 else None
        return TileConfig(1, block_n, block_d, warps, 1 if general or warps > 1 else 4, registers)
    return TileConfig(max(1, 512 // tile), block_n, block_d, 1, 1)


def energy_field_config(n: int, features: int, double: bool = False) -> TileConfig:
    """Configuration of the kernels that split the features: 8 warps, 64 elements a thread, at least 64 features."""
    block_n = next_power_of_two(n)
    elements = 8192 if double else 16384
    return TileConfig(1, block_n, max(64, min(next_power_of_two(features), elements // block_n)), 8)


@dataclass(frozen=True)
class PairwiseConfig:
    """Sizes of one tile of pairs: points of either set, features of a step (or how far their loop is unrolled)."""

    block_m: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int


PAIRWISE_EXACT = PairwiseConfig(64, 64, 1, 4, 3)
PAIRWISE_PRODUCT = PairwiseConfig(128, 64, 32, 4, 2)
# The powers of a general alpha need registers that 4 warps do not have.
PAIRWISE_PRODUCT_GENERAL = PairwiseConfig(128, 64, 32, 8, 2)
# Programs of the pairwise kernels, the number of partial sums: fixed, so that a result is the same on every GPU.
PAIRWISE_PROGRAMS = 1056
# From this many features on, tensor cores beat differences.
PAIRWISE_PRODUCT_FEATURES = 16


def collapse_rows(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]] | None:
    """Leading dimensions as few as possible, merged alike for several tensors.

    Args:
        sizes: the leading dimensions.
        strides: the strides of each tensor along them.

    Returns:
        Sizes and a list of strides a tensor, of equal length from 1 to ``MAX_ROW_DIMS``; None if more dimensions are
        left, in which case a tensor has to be copied.
    """
    merged_sizes: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(sizes):
        if size == 1:
            continue
        here = [tensor[dim] for tensor in strides]
        if merged_sizes and all(old[-1] == new * size for old, new in zip(merged, here, strict=True)):
            merged_sizes[-1] *= size
            for old, new in zip(merged, here, strict=True):
                old[-1] = new
        else:
            merged_sizes.append(size)
            for old, new in zip(merged, here, strict=True):
                old.append(new)
    if not merged_sizes:
        return [1], [[0] for _ in strides]
    if len(merged_sizes) > MAX_ROW_DIMS:
        return None
    return merged_sizes, merged


def padded(values: Sequence[int]) -> tuple[int, int, int]:
    """``values`` (1 to 3 of them) with zeros up to three: the kernels' row strides."""
    return (values[0], values[1] if len(values) > 1 else 0, values[2] if len(values) > 2 else 0)


class on_device:
    """Make the device of ``tensor`` the current CUDA device: Triton launches on the current one."""

    def __init__(self, tensor: torch.Tensor) -> None:
        index = tensor.device.index if tensor.is_cuda else None
        differs = index is not None and index != torch.cuda.current_device()
        self._guard = torch.cuda.device(index) if differs else None

    def __enter__(self) -> None:
        if self._guard is not None:
            self._guard.__enter__()

    def __exit__(self, *error: object) -> None:
        if self._guard is not None:
            self._guard.__exit__(*error)
