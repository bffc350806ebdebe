"""Launches of the energy-loss kernels: tensors in, loss and gradients out. No autograd here.

Suffixes as in reference.py. "Gradients" are those of the returned loss (for the reduction "none": of its sum), in the
dtype of :func:`gradient_dtype`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ear_kernels.ops.energy_loss import kernels, kernels_field
from ear_kernels.ops.energy_loss.kernels_pairs import GAUSSIAN, LAPLACE
from ear_kernels.ops.energy_loss.reference import working_dtype
from ear_kernels.runtime.launching import ceil_div, launch, next_power_of_two, processor

MAX_ROW_DIMS = 3
# The largest tile (samples x features, float32) that one program holds; larger rows are split over programs.
MAX_TILE = 4096
KERNEL_MODES = {"gaussian": GAUSSIAN.value, "laplace": LAPLACE.value}
MANY_TARGETS = 16
"""More targets than this are summed at two levels."""


class Options(NamedTuple):
    """alpha, eps and reduction of :func:`ear_kernels.energy_loss`, and tau as of :func:`reference.fair_tau`.

    Of :func:`ear_kernels.kernel_score_loss`, whose ``kernel`` it then names, alpha is 1 / bandwidth, tau 1 and eps 0.
    """

    alpha: float
    tau: float
    eps: float
    reduction: str
    kernel: str = ""

    @property
    def mode(self) -> int:
        """What stands in the place of the distance (kernels_pairs.py): 1 or 2 for those alphas, 0 for any other."""
        return KERNEL_MODES[self.kernel] if self.kernel else {1.0: 1, 2.0: 2}.get(self.alpha, 0)


@dataclass(frozen=True)
class TileConfig:
    """Sizes of one program: rows, samples and features (powers of two), its warps, and how far a loop is unrolled."""

    block_r: int
    block_n: int
    block_d: int
    num_warps: int
    unroll: int = 1


@lru_cache(maxsize=1024)
def rows_config(n: int, features: int, double: bool = False) -> TileConfig | None:
    """Configuration of the one-pass energy-loss kernel, or None if a row does not fit into a program.

    Small rows share a program of 128 threads with 8 elements each, or one of 32 threads with 16 each where a row has
    a single feature (64 and 8 in float64); a row of 1,024 elements or more has its own program with 32 elements a
    thread.
    """
    block_n, block_d = next_power_of_two(n), next_power_of_two(features)
    tile = block_n * block_d
    if tile * (2 if double else 1) > MAX_TILE:
        return None
    if tile >= 1024:
        # Larger tiles get 16 elements a thread, because they also hold many samples' sums.
        size = tile * (2 if double else 1)
        return TileConfig(1, block_n, block_d, size // (512 if double or size >= 2048 else 1024))
    if features == 1:
        return TileConfig(max(1, min(128, 512 // tile)), block_n, block_d, 2 if double else 1)
    return TileConfig(max(1, min(128, 1024 // tile)), block_n, block_d, 4)


def field_config(n: int, features: int, double: bool = False) -> TileConfig:
    """Configuration of the kernels that split the features: 8 warps, 64 elements a thread (16 in float64, and of one
    sample, whose 64 spill), at least 64 features."""
    block_n = next_power_of_two(n)
    elements = 4096 if double or n == 1 else 16384
    return TileConfig(1, block_n, max(64, min(next_power_of_two(features), elements // block_n)), 8)


def all_registers(tensor: Tensor, wanted: bool, warps: int) -> dict[str, int]:
    """A launch option where ``wanted``: left alone, ptxas stops at 128 or 168 registers and spills the rest."""
    return {"maxnreg": 255} if wanted and 1 < warps <= 8 and processor(tensor).major > 0 else {}


def gradient_dtype(dtype: torch.dtype, reduction: str) -> torch.dtype:
    """Dtype in which the forward pass saves gradients of an input of ``dtype``.

    The input's own dtype, because they are normally handed on as they are. Not so for float16, where the mean over
    many rows would underflow before a gradient scaler's factor arrives, nor for halves that are multiplied by a
    gradient per row, where rounding twice would cost accuracy.
    """
    if dtype == torch.float16 or (dtype == torch.bfloat16 and reduction == "none"):
        return torch.float32
    return dtype


def gradient_like(tensor: Tensor, wanted: bool, reduction: str) -> Tensor | None:
    """Room for a gradient, dense and in the memory order of ``tensor``; None if it is not wanted."""
    return torch.empty_like(tensor, dtype=gradient_dtype(tensor.dtype, reduction)) if wanted else None


def collapse_rows(
    sizes: Sequence[int], strides: Sequence[Sequence[int]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]] | None:
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
        return (1,), [(0,) for _ in strides]
    if len(merged_sizes) > MAX_ROW_DIMS:
        return None
    return tuple(merged_sizes), [tuple(tensor) for tensor in merged]


class Layout(NamedTuple):
    """Where the rows of several tensors ``[rows, ..., D]`` lie."""

    row_sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...] | None, ...]
    """Of each tensor (None for one that is not there): along the rows, then the last two dimensions."""


def layout_of(tensors: Sequence[Tensor | None]) -> Layout | None:
    """The layout that tensors alike in their leading dimensions have in common; None if one has to be copied."""
    first = tensors[0]
    assert first is not None
    if first.ndim == 3:
        return Layout((first.shape[0],), tuple(None if tensor is None else tensor.stride() for tensor in tensors))
    present = [tensor for tensor in tensors if tensor is not None]
    collapsed = collapse_rows(first.shape[:-2], [tensor.stride()[:-2] for tensor in present])
    if collapsed is None:
        return None
    strides = iter((*rows, *tensor.stride()[-2:]) for rows, tensor in zip(collapsed[1], present, strict=True))
    return Layout(collapsed[0], tuple(None if tensor is None else next(strides) for tensor in tensors))


class RowTerms(NamedTuple):
    """What multiplies the losses of the rows, as the kernels want it."""

    mask: Tensor | None
    weights: Tensor | None
    denominator: Tensor | None
    """Number of unmasked rows or sum of their weights, on the device; None if the host knows it."""
    scale: float


def row_terms(
    rows: torch.Size, mask: Tensor | None, weights: Tensor | None, reduction: str, dtype: torch.dtype
) -> RowTerms:
    """Mask and weights as contiguous vectors of one number a row, and what the reduction divides by."""
    if mask is None and weights is None:
        return RowTerms(None, None, None, 1.0 / max(1, rows.numel()) if reduction == "mean" else 1.0)
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask != 0).expand(rows).contiguous()
    if weights is not None:
        weights = (weights if weights.is_floating_point() else weights.to(dtype)).expand(rows).contiguous()
    if reduction != "mean":
        return RowTerms(mask, weights, None, 1.0)
    if weights is None:
        assert mask is not None
        return RowTerms(mask, None, mask.sum(dtype=dtype), 1.0)
    counted = weights.to(dtype)
    return RowTerms(mask, weights, (counted if mask is None else torch.where(mask, counted, 0.0)).sum(), 1.0)


def coefficients(options: Options, n: int, m: int) -> tuple[float, float]:
    """(of a target pair, of a pair of samples) in the loss."""
    return 2.0 / (n * m), 2.0 * options.tau / max(1, n * (n - 1))


def energy_loss_forward(
    samples_RnD: Tensor,
    targets_RmD: Tensor,
    mask_R: Tensor | None,
    weights_R: Tensor | None,
    feature_weights_D: Tensor | None,
    options: Options,
    sample_gradient: bool,
    target_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss, gradient of the samples, gradient of the targets (None where not wanted).

    Samples and targets may have any strides. They are copied only if their leading dimensions do not collapse to
    three, e.g. four of them permuted.
    """
    rows = samples_RnD.shape[:-2]
    n, features = samples_RnD.shape[-2:]
    m = targets_RmD.shape[-2]
    dtype = working_dtype(samples_RnD, targets_RmD)
    gx = gradient_like(samples_RnD, sample_gradient, options.reduction)
    gy = gradient_like(targets_RmD, target_gradient, options.reduction)
    count = rows.numel()
    if count == 0:
        return samples_RnD.new_zeros(rows if options.reduction == "none" else (), dtype=dtype), gx, gy
    layout = layout_of((samples_RnD, targets_RmD, gx, gy))
    if layout is None:
        loss, gx_copy, gy_copy = energy_loss_forward(
            samples_RnD.contiguous(), targets_RmD.contiguous(), mask_R, weights_R, feature_weights_D, options,
            sample_gradient, target_gradient,
        )  # fmt: skip
        for gradient, copy in ((gx, gx_copy), (gy, gy_copy)):
            if gradient is not None and copy is not None:
                gradient.copy_(copy)
        return loss, gx, gy
    terms = row_terms(rows, mask_R, weights_R, options.reduction, dtype)
    root = None if feature_weights_D is None else feature_weights_D.to(dtype).contiguous()
    double = dtype == torch.float64
    config = rows_config(n, features, double)
    if config is None:
        loss = _field((samples_RnD, targets_RmD, gx, gy), layout, terms, root, options, dtype)
        return loss, gx, gy
    programs = ceil_div(count, config.block_r)
    reduce = options.reduction != "none"
    loss = samples_RnD.new_empty((programs,) if reduce else rows, dtype=dtype)
    launch(
        kernels.energy_rows_kernel,
        (programs,),
        samples_RnD, targets_RmD, terms.mask, terms.weights, root, terms.denominator, loss, gx, gy,
        count, m, features, layout.row_sizes, *layout.strides,
        options.alpha, options.eps, *coefficients(options, n, m), terms.scale,
        on=samples_RnD,
        N=n,
        MODE=options.mode,
        HAS_EPS=options.eps > 0,
        REDUCE=reduce,
        MANY=m > MANY_TARGETS,
        ROW_DIMS=len(layout.row_sizes),
        BLOCK_R=config.block_r,
        BLOCK_N=config.block_n,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
        **all_registers(samples_RnD, double, config.num_warps),
    )  # fmt: skip
    return sum_partials(loss) if reduce else loss, gx, gy


def _field(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    layout: Layout,
    terms: RowTerms,
    root: Tensor | None,
    options: Options,
    dtype: torch.dtype,
) -> Tensor:
    """The loss by the three phases for rows that do not fit into one program; writes the gradients."""
    samples, targets, gx, gy = tensors
    n, features = samples.shape[-2:]
    m, count = targets.shape[-2], samples.shape[:-2].numel()
    double = dtype == torch.float64
    config = field_config(n, features, double)
    blocks = ceil_div(features, config.block_d)
    partners = m + n
    block_c = max(1, min(next_power_of_two(partners), 1024 // config.block_n))
    partner_blocks = ceil_div(partners, block_c)
    norms = samples.new_empty(count * blocks * partners * n, dtype=dtype)
    inverse, slope = samples.new_empty((2, count * partners * n), dtype=dtype).unbind(0)
    partial = samples.new_empty((count, partner_blocks), dtype=dtype)
    sizes = {
        "N": n, "ROW_DIMS": len(layout.row_sizes), "BLOCK_N": config.block_n, "BLOCK_D": config.block_d,
        "num_warps": config.num_warps, **all_registers(samples, double, config.num_warps),
    }  # fmt: skip
    launch(
        kernels_field.field_norms_kernel, (count * blocks,), samples, targets, terms.mask, root, norms,
        m, features, blocks, layout.row_sizes, *layout.strides[:2], on=samples, **sizes,
    )  # fmt: skip
    launch(
        kernels_field.field_combine_kernel, (count * partner_blocks,), norms, terms.mask, terms.weights,
        terms.denominator, partial, inverse, slope, m, blocks, partner_blocks,
        options.alpha, options.eps, *coefficients(options, n, m), terms.scale, on=samples,
        N=n, MODE=options.mode, HAS_EPS=options.eps > 0, BLOCK_N=config.block_n, BLOCK_C=block_c,
        num_warps=4,
    )  # fmt: skip
    if gx is not None or gy is not None:
        launch(
            kernels_field.field_gradients_kernel, (count * blocks,), samples, targets, terms.mask, root, inverse,
            slope, gx, gy, m, features, blocks, layout.row_sizes, *layout.strides, on=samples, **sizes,
        )  # fmt: skip
    return partial.sum(dim=1).view(samples.shape[:-2]) if options.reduction == "none" else partial.sum()


def sum_partials(partial: Tensor) -> Tensor:
    """The sum of the programs' losses in a fixed order, a scalar: half the time of torch's reduction."""
    count = partial.shape[0]
    if count == 1:
        return partial.view(())
    loss = partial.new_empty(())
    block = min(16384, next_power_of_two(count))
    launch(
        kernels.sum_partials_kernel, (1,), partial, loss, count, on=partial, BLOCK=block,
        num_warps=max(1, min(16, block // 256)),
    )  # fmt: skip
    return loss


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply a dense ``gradient`` in place by the scalar ``factor`` on the device; no traffic if it is 1."""
    elements = gradient.numel()
    if elements:
        grid = (min(ceil_div(elements, 4096), 2112),)
        launch(
            kernels.scale_gradient_kernel, grid, gradient, factor, elements, on=gradient, BLOCK=1024,
            num_warps=4,
        )  # fmt: skip
