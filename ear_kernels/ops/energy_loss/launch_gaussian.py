"""Launches of the energy loss whose Gaussian targets are drawn in the kernel. Suffixes as in reference.py."""

from functools import lru_cache

import torch
from torch import Tensor

from ear_kernels.ops.energy_loss import kernels_gaussian
from ear_kernels.ops.energy_loss.launch import (
    MAX_TILE,
    Options,
    TileConfig,
    all_registers,
    coefficients,
    gradient_dtype,
    gradient_like,
    layout_of,
    row_terms,
    sum_partials,
)
from ear_kernels.ops.energy_loss.reference import working_dtype
from ear_kernels.runtime.launching import ceil_div, launch, next_power_of_two

# Philox4x32-7 passes BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, table 2).
PHILOX_ROUNDS = 7


def fits_one_program(n: int, features: int, double: bool) -> bool:
    """Whether the Gaussian kernel takes rows of this size."""
    return next_power_of_two(n) * next_power_of_two(features) * (2 if double else 1) <= MAX_TILE


@lru_cache(maxsize=1024)
def gaussian_config(n: int, features: int, double: bool = False, general: bool = False) -> TileConfig | None:
    """Configuration of the kernel that draws its targets, or None if a row does not fit into a program.

    One warp a row as long as it holds the tile, so that no target is drawn by two warps. ``general`` is for an
    alpha other than 1 and 2 and for gradients of the targets, which need registers, as float64 does: more warps, and
    one target at a time.
    """
    block_n, block_d = next_power_of_two(n), next_power_of_two(features)
    tile = block_n * block_d * (2 if double else 1)
    if not fits_one_program(n, features, double):
        return None
    if tile < 256:
        return TileConfig(max(1, 512 // tile), block_n, block_d, 2 if double else 1)
    warps = max(1, tile // (512 if general or double or tile >= 2048 else 1024))
    return TileConfig(1, block_n, block_d, warps, 1 if general or warps > 1 else 4)


def energy_gaussian_forward(
    samples_RnD: Tensor,
    mean_RD: Tensor,
    log_std_RD: Tensor,
    seed: Tensor,
    num_targets: int,
    mask_R: Tensor | None,
    weights_R: Tensor | None,
    feature_weights_D: Tensor | None,
    options: Options,
    sample_gradient: bool,
    parameter_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Loss and gradients of samples, mean and log_std, against ``num_targets`` targets drawn in the kernel.

    Args:
        seed: ``[1]``, int64, on the device: the key of the draws, so that a CUDA graph can replace it.

    Raises:
        ValueError: a row that does not fit into one program (see :func:`gaussian_config`).
    """
    rows = samples_RnD.shape[:-2]
    n, features = samples_RnD.shape[-2:]
    dtype = working_dtype(samples_RnD, mean_RD, log_std_RD)
    double, general = dtype == torch.float64, options.mode == 0 or parameter_gradient
    config = gaussian_config(n, features, double, general)
    if config is None:
        raise ValueError(f"{n} samples of {features} features do not fit into one program of the Gaussian kernel")
    gx = gradient_like(samples_RnD, sample_gradient, options.reduction)
    gmean = glog_std = None
    if parameter_gradient:
        gmean, glog_std = (
            tensor.new_empty((*rows, features), dtype=gradient_dtype(tensor.dtype, options.reduction))
            for tensor in (mean_RD, log_std_RD)
        )
    count = rows.numel()
    if count == 0:
        loss = samples_RnD.new_zeros(rows if options.reduction == "none" else (), dtype=dtype)
        return loss, gx, gmean, glog_std
    layout = layout_of((samples_RnD, gx))
    if layout is None:
        loss, copy, gmean, glog_std = energy_gaussian_forward(
            samples_RnD.contiguous(), mean_RD, log_std_RD, seed, num_targets, mask_R, weights_R,
            feature_weights_D, options, sample_gradient, parameter_gradient,
        )  # fmt: skip
        return loss, None if gx is None or copy is None else gx.copy_(copy), gmean, glog_std
    terms = row_terms(rows, mask_R, weights_R, options.reduction, dtype)
    root = None if feature_weights_D is None else feature_weights_D.to(dtype).contiguous()
    (mean, stride_mean), (log_std, stride_log_std) = _as_rows(mean_RD), _as_rows(log_std_RD)
    programs = ceil_div(count, config.block_r)
    reduce = options.reduction != "none"
    loss = samples_RnD.new_empty((programs,) if reduce else rows, dtype=dtype)
    launch(
        kernels_gaussian.energy_gaussian_kernel,
        (programs,),
        samples_RnD, mean, log_std, seed, terms.mask, terms.weights, root, terms.denominator, loss,
        gx, gmean, glog_std,
        count, num_targets, features, layout.row_sizes, *layout.strides, stride_mean, stride_log_std,
        options.alpha, options.eps, *coefficients(options, n, num_targets), terms.scale,
        on=samples_RnD,
        N=n,
        MODE=options.mode,
        HAS_EPS=options.eps > 0,
        REDUCE=reduce,
        ROW_DIMS=len(layout.row_sizes),
        ROUNDS=PHILOX_ROUNDS,
        UNROLL=config.unroll,
        BLOCK_R=config.block_r,
        BLOCK_N=config.block_n,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
        **all_registers(samples_RnD, general or double, config.num_warps),
    )  # fmt: skip
    return sum_partials(loss) if reduce else loss, gx, gmean, glog_std


def _as_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """``[..., D]`` as rows with one stride (0 where all are the same row); copies what has no such view."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        if tensor.ndim == 2:
            return tensor, tensor.stride(0)
        layout = layout_of((tensor.unsqueeze(-2),))
        if layout is not None and len(layout.row_sizes) == 1:
            assert layout.strides[0] is not None
            return tensor, layout.strides[0][0]
    return tensor.contiguous(), tensor.shape[-1]


def gaussian_normals(seed: Tensor, rows: int, num_targets: int, features: int, dtype: torch.dtype) -> Tensor:
    """The standard normals ``[rows, m, D]`` that the Gaussian kernel draws for ``seed``.

    For tests, and for rows that do not fit into one program. The draws have the resolution of float32.
    """
    normals = torch.empty(rows, num_targets, features, dtype=dtype, device=seed.device)
    if normals.numel():
        block_d = min(1024, next_power_of_two(features))
        launch(
            kernels_gaussian.gaussian_normals_kernel,
            (rows, ceil_div(num_targets, 4), ceil_div(features, block_d)),
            normals, seed, num_targets, features,
            on=seed, ROUNDS=PHILOX_ROUNDS, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return normals
