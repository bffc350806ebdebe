"""Launches of the energy-loss kernels: shapes and strides in, loss and gradients out. No autograd here.

Suffixes as in reference.py. "Gradients" are those of the returned loss (for the reduction "none": of its sum), in the
dtype of :func:`gradient_dtype`.
"""

from typing import Any

import torch
from torch import Tensor

from ear_kernels.ops.energy_loss import configs as launch
from ear_kernels.ops.energy_loss import kernels, kernels_field, kernels_gaussian
from ear_kernels.ops.energy_loss.reference import working_dtype

# Philox4x32-7 passes BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, table 2).
PHILOX_ROUNDS = 7


def gradient_dtype(dtype: torch.dtype, reduction: str) -> torch.dtype:
    """Dtype in which the forward pass saves gradients of an input of ``dtype``.

    The input's own dtype, because they are normally handed on as they are. Not so for float16, where the mean over
    many rows would underflow before a gradient scaler's factor arrives, nor for halves that are multiplied by a
    gradient per row, where rounding twice would cost accuracy.
    """
    if dtype == torch.float16 or (dtype == torch.bfloat16 and reduction == "none"):
        return torch.float32
    return dtype


def _mode(alpha: float) -> int:
    return {1.0: 1, 2.0: 2}.get(alpha, 0)


def _row_vector(tensor: Tensor | None, rows: torch.Size) -> Tensor | None:
    """A contiguous vector of one number a row; copies only what has to be broadcast."""
    return None if tensor is None else tensor.expand(rows).contiguous()


def _denominator(mask: Tensor | None, weights: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Number of unmasked rows, or sum of their weights, as a scalar on the device; None if the host knows it."""
    if weights is None:
        return None if mask is None else mask.sum(dtype=dtype)
    weights = weights.to(dtype)
    return (weights if mask is None else torch.where(mask, weights, 0.0)).sum()


def gradient_like(tensor: Tensor, wanted: bool, reduction: str) -> Tensor:
    """Room for a gradient, dense and in the memory order of ``tensor``; an empty tensor if it is not wanted."""
    dtype = gradient_dtype(tensor.dtype, reduction)
    return torch.empty_like(tensor, dtype=dtype) if wanted else tensor.new_empty(0, dtype=dtype)


def _prepare(
    samples: Tensor, mask: Tensor | None, weights: Tensor | None, reduction: str, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None, float]:
    """(mask [R], weights [R], denominator, host scale) as the kernels want them."""
    rows = samples.shape[:-2]
    if mask is not None:
        mask = _row_vector(mask if mask.dtype == torch.bool else mask != 0, rows)
    if weights is not None and not weights.is_floating_point():
        weights = weights.to(dtype)
    weights = _row_vector(weights, rows)
    if reduction != "mean":
        return mask, weights, None, 1.0
    denominator = _denominator(mask, weights, dtype)
    return mask, weights, denominator, 1.0 if denominator is not None else 1.0 / rows.numel()


def _collapsed(tensors: list[Tensor], row_dims: int) -> tuple[list[int], list[list[int]]] | None:
    if row_dims == 1:
        return [tensors[0].shape[0]], [[tensor.stride(0)] for tensor in tensors]
    return launch.collapse_rows(tensors[0].shape[:row_dims], [tensor.stride()[:row_dims] for tensor in tensors])


def _finish(partial: Tensor, rows: torch.Size, reduction: str) -> Tensor:
    """The loss from what the kernels wrote: partial sums (summed in a fixed order) or the rows."""
    if reduction == "none":
        return (partial.sum(dim=1) if partial.ndim == 2 else partial).view(rows)
    return partial.sum()


def _empty_result(rows: torch.Size, like: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    return like.new_zeros(rows if reduction == "none" else (), dtype=dtype)


Prepared = tuple[tuple[int, ...], tuple, dict[str, Any], dict[str, int]]


def rows_launch(
    tensors: list[Tensor],
    needs: tuple[bool, bool],
    options: dict[str, Any],
    present: tuple[bool, bool, bool, bool] = (False, False, False, False),
) -> Prepared | None:
    """Grid, scalars, constexprs and launch options of ``energy_rows_kernel``: all that depends on no pointer.

    Args:
        tensors: samples ``[..., n, D]``, targets ``[..., m, D]`` and their gradients; only those wanted count.
        needs: which gradients are wanted.
        options: alpha, tau, eps, reduction.
        present: whether there are a mask, row weights, feature weights, and a denominator on the device.

    Returns:
        None if the leading dimensions do not collapse or a row does not fit into one program.
    """
    samples, targets, gx, gy = tensors
    tensors = [samples, targets, gx if needs[0] else samples, gy if needs[1] else targets]
    (n, features), m = samples.shape[-2:], targets.shape[-2]
    double = working_dtype(samples, targets) == torch.float64
    config = launch.energy_rows_config(n, features, double)
    collapsed = _collapsed(tensors, samples.ndim - 2)
    if config is None or collapsed is None:
        return None
    sizes, strides = collapsed
    row_sizes = launch.padded(sizes)
    rows = samples.shape[:-2].numel()
    has_mask, has_weight, has_root, has_denominator = present
    alpha, eps, reduction = options["alpha"], options["eps"], options["reduction"]
    host_mean = reduction == "mean" and not has_denominator
    layout = [
        number
        for tensor, stride in zip(tensors, strides, strict=True)
        for number in (*launch.padded(stride), *tensor.stride()[-2:])
    ]
    scalars = (
        rows, row_sizes[1], row_sizes[2], m, features, *layout,
        alpha, eps, 2.0 / (n * m), 2.0 * options["tau"] / (n * (n - 1)), 1.0 / rows if host_mean else 1.0,
    )  # fmt: skip
    constexprs = {
        "N": n,
        "MODE": _mode(alpha),
        "SINGLE": features == 1,
        "HAS_EPS": eps > 0,
        "HAS_ROOT": has_root,
        "HAS_MASK": has_mask,
        "HAS_WEIGHT": has_weight,
        "HAS_DENOMINATOR": has_denominator,
        "REDUCE": reduction != "none",
        "REFINE": not double,
        "SAMPLE_GRADIENT": needs[0],
        "TARGET_GRADIENT": needs[1],
        "MANY": m > 16,
        "ROW_DIMS": len(sizes),
        "DOUBLE": double,
        "BLOCK_R": config.block_r,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d,
    }
    options_of_launch = launch.launch_options(config.num_warps, config.registers, samples)
    return (launch.ceil_div(rows, config.block_r),), scalars, constexprs, options_of_launch


def energy_loss_forward(
    samples_RnD: Tensor,
    targets_RmD: Tensor,
    mask_R: Tensor | None,
    weights_R: Tensor | None,
    feature_weights_D: Tensor | None,
    alpha: float,
    tau: float,
    eps: float,
    reduction: str,
    sample_gradient: bool,
    target_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient of the samples, gradient of the targets (empty where not wanted).

    Samples and targets may have any strides. They are copied only if their leading dimensions do not collapse to
    three, e.g. four of them permuted.
    """
    rows_shape = samples_RnD.shape[:-2]
    row_dims = len(rows_shape)
    n, m = samples_RnD.shape[-2], targets_RmD.shape[-2]
    dtype = working_dtype(samples_RnD, targets_RmD)
    rows = rows_shape.numel()
    gx = gradient_like(samples_RnD, sample_gradient, reduction)
    gy = gradient_like(targets_RmD, target_gradient, reduction)
    if rows == 0:
        return _empty_result(rows_shape, samples_RnD, reduction, dtype), gx, gy
    mask, weights, denominator, scale = _prepare(samples_RnD, mask_R, weights_R, reduction, dtype)

    # An absent gradient is passed as the tensor itself, whose strides it then shares; the kernel does not touch it.
    tensors = [
        samples_RnD,
        targets_RmD,
        gx if sample_gradient else samples_RnD,
        gy if target_gradient else targets_RmD,
    ]
    collapsed = _collapsed(tensors, row_dims)
    if collapsed is None:
        samples_RnD, targets_RmD = samples_RnD.contiguous(), targets_RmD.contiguous()
        loss, gx_copy, gy_copy = energy_loss_forward(
            samples_RnD, targets_RmD, mask_R, weights_R, feature_weights_D, alpha, tau, eps, reduction,
            sample_gradient, target_gradient,
        )  # fmt: skip
        return (
            loss,
            gx.copy_(gx_copy) if sample_gradient else gx,
            gy.copy_(gy_copy) if target_gradient else gy,
        )
    fw = None if feature_weights_D is None else feature_weights_D.contiguous()
    needs = (sample_gradient, target_gradient)
    options = {"alpha": alpha, "tau": tau, "eps": eps, "reduction": reduction}
    present = (mask is not None, weights is not None, fw is not None, denominator is not None)
    prepared = rows_launch(tensors, needs, options, present)
    with launch.on_device(samples_RnD):
        if prepared is None:
            sizes, strides = collapsed
            row_sizes = launch.padded(sizes)
            row_strides = [launch.padded(tensor) for tensor in strides]
            feature_strides = [tensor.stride()[-2:] for tensor in tensors]
            partial = _field(
                tensors, mask, weights, fw, denominator, row_sizes, row_strides, feature_strides, len(sizes),
                rows, alpha, eps, 2.0 / (n * m), 2.0 * tau / (n * (n - 1)), scale, dtype, sample_gradient,
                target_gradient,
            )  # fmt: skip
        else:
            grid, scalars, constexprs, launching = prepared
            count = rows if reduction == "none" else grid[0]
            partial = torch.empty(count, dtype=dtype, device=samples_RnD.device)
            kernels.energy_rows_kernel[grid](
                samples_RnD, targets_RmD, mask, weights, fw, denominator, partial, tensors[2], tensors[3],
                *scalars, **constexprs, **launching,
            )  # fmt: skip
    return _finish(partial, rows_shape, reduction), gx, gy


def _field(
    tensors, mask, weights, fw, denominator, row_sizes, row_strides, feature_strides, row_dims, rows, alpha, eps,
    target_coefficient, pair_coefficient, scale, dtype, sample_gradient, target_gradient,
):  # fmt: skip
    """The three phases for rows that do not fit into one program; returns partial losses [rows, partner blocks]."""
    samples, targets, gx, gy = tensors
    n, features = samples.shape[-2:]
    m = targets.shape[-2]
    double = dtype == torch.float64
    config = launch.energy_field_config(n, features, double)
    blocks = launch.ceil_div(features, config.block_d)
    partners = m + n
    block_c = max(1, min(launch.next_power_of_two(partners), 1024 // config.block_n))
    partner_blocks = launch.ceil_div(partners, block_c)
    device = samples.device
    norms = torch.empty(rows * blocks * partners * n, dtype=dtype, device=device)
    inverse, slope = torch.empty(2, rows * partners * n, dtype=dtype, device=device).unbind(0)
    partial = torch.empty(rows, partner_blocks, dtype=dtype, device=device)
    sizes = {"BLOCK_N": config.block_n, "BLOCK_D": config.block_d, "num_warps": config.num_warps}
    common = {"N": n, "HAS_ROOT": fw is not None, "HAS_MASK": mask is not None, "ROW_DIMS": row_dims}
    kernels_field.field_norms_kernel[(rows * blocks,)](
        samples, targets, mask, fw, norms, row_sizes[1], row_sizes[2], m, features, blocks,
        *row_strides[0], *feature_strides[0], *row_strides[1], *feature_strides[1],
        DOUBLE=double, **common, **sizes,
    )  # fmt: skip
    kernels_field.field_combine_kernel[(rows * partner_blocks,)](
        norms, mask, weights, denominator, partial, inverse, slope, m, blocks, partner_blocks,
        alpha, eps, target_coefficient, pair_coefficient, scale,
        N=n, MODE=_mode(alpha), HAS_EPS=eps > 0, HAS_MASK=mask is not None, HAS_WEIGHT=weights is not None,
        HAS_DENOMINATOR=denominator is not None, DOUBLE=double, BLOCK_N=config.block_n, BLOCK_C=block_c,
        num_warps=4,
    )  # fmt: skip
    if sample_gradient or target_gradient:
        kernels_field.field_gradients_kernel[(rows * blocks,)](
            samples, targets, mask, fw, inverse, slope, gx, gy, row_sizes[1], row_sizes[2], m, features, blocks,
            *row_strides[0], *feature_strides[0], *row_strides[1], *feature_strides[1],
            *row_strides[2], *feature_strides[2], *row_strides[3], *feature_strides[3],
            SAMPLE_GRADIENT=sample_gradient, TARGET_GRADIENT=target_gradient, DOUBLE=double, **common, **sizes,
        )  # fmt: skip
    return partial


def gaussian_launch(
    tensors: list[Tensor],
    mean: Tensor,
    log_std: Tensor,
    num_targets: int,
    needs: tuple[bool, bool, bool],
    options: dict[str, Any],
    present: tuple[bool, bool, bool, bool] = (False, False, False, False),
) -> Prepared | None:
    """As :func:`rows_launch` for ``energy_gaussian_kernel``.

    Args:
        tensors: samples ``[..., n, D]`` and their gradient.
        mean, log_std: ``[..., D]``.
        num_targets: m.
        needs: whether gradients of samples, mean and log_std are wanted.
    """
    samples, gx = tensors
    tensors = [samples, gx if needs[0] else samples]
    n, features = samples.shape[-2:]
    double = working_dtype(samples, mean, log_std) == torch.float64
    alpha, eps, reduction = options["alpha"], options["eps"], options["reduction"]
    parameter_gradient = needs[1] or needs[2]
    config = launch.energy_gaussian_config(n, features, double, _mode(alpha) == 0 or parameter_gradient)
    collapsed = _collapsed(tensors, samples.ndim - 2)
    matrices = [_row_stride(tensor) for tensor in (mean, log_std)]
    if config is None or collapsed is None or None in matrices:
        return None
    sizes, strides = collapsed
    row_sizes = launch.padded(sizes)
    rows = samples.shape[:-2].numel()
    has_mask, has_weight, has_root, has_denominator = present
    host_mean = reduction == "mean" and not has_denominator
    layout = [
        number
        for tensor, stride in zip(tensors, strides, strict=True)
        for number in (*launch.padded(stride), *tensor.stride()[-2:])
    ]
    scalars = (
        rows, row_sizes[1], row_sizes[2], num_targets, features, *layout, *matrices,
        alpha, eps, 2.0 / (n * num_targets), 2.0 * options["tau"] / (n * (n - 1)), 1.0 / rows if host_mean else 1.0,
    )  # fmt: skip
    constexprs = {
        "N": n,
        "MODE": _mode(alpha),
        "SINGLE": features == 1,
        "HAS_EPS": eps > 0,
        "HAS_ROOT": has_root,
        "HAS_MASK": has_mask,
        "HAS_WEIGHT": has_weight,
        "HAS_DENOMINATOR": has_denominator,
        "REDUCE": reduction != "none",
        # The relative error of the fast root, 2^-23, drowns in the gradient of the samples, but not in that of
        # log_std, where the draws cancel.
        "REFINE": parameter_gradient and not double,
        "SAMPLE_GRADIENT": needs[0],
        "PARAMETER_GRADIENT": parameter_gradient,
        "ROW_DIMS": len(sizes),
        "DOUBLE": double,
        "ROUNDS": PHILOX_ROUNDS,
        "UNROLL": config.unroll,
        "BLOCK_R": config.block_r,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d,
    }
    options_of_launch = launch.launch_options(config.num_warps, config.registers, samples)
    return (launch.ceil_div(rows, config.block_r),), scalars, constexprs, options_of_launch


def energy_gaussian_forward(
    samples_RnD: Tensor,
    mean_RD: Tensor,
    log_std_RD: Tensor,
    seed: Tensor,
    num_targets: int,
    mask_R: Tensor | None,
    weights_R: Tensor | None,
    feature_weights_D: Tensor | None,
    alpha: float,
    tau: float,
    eps: float,
    reduction: str,
    sample_gradient: bool,
    parameter_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and gradients of samples, mean and log_std, against ``num_targets`` targets drawn in the kernel.

    Args:
        seed: ``[1]``, int64, on the device: the key of the draws, so that a CUDA graph can replace it.

    Raises:
        ValueError: a row that does not fit into one program (see ``launch.energy_gaussian_config``).
    """
    rows_shape = samples_RnD.shape[:-2]
    n, features = samples_RnD.shape[-2:]
    dtype = working_dtype(samples_RnD, mean_RD, log_std_RD)
    double = dtype == torch.float64
    rows = rows_shape.numel()
    config = launch.energy_gaussian_config(n, features, double, _mode(alpha) == 0 or parameter_gradient)
    if config is None:
        raise ValueError(f"{n} samples of {features} features do not fit into one program of the Gaussian kernel")
    gx = gradient_like(samples_RnD, sample_gradient, reduction)
    shape = (*rows_shape, features) if parameter_gradient else (0,)
    gmean = mean_RD.new_empty(shape, dtype=gradient_dtype(mean_RD.dtype, reduction))
    glog_std = log_std_RD.new_empty(shape, dtype=gradient_dtype(log_std_RD.dtype, reduction))
    if rows == 0:
        return _empty_result(rows_shape, samples_RnD, reduction, dtype), gx, gmean, glog_std
    mask, weights, denominator, _ = _prepare(samples_RnD, mask_R, weights_R, reduction, dtype)
    fw = None if feature_weights_D is None else feature_weights_D.contiguous()
    mean, log_std = _row_matrix(mean_RD)[0], _row_matrix(log_std_RD)[0]
    needs = (sample_gradient, parameter_gradient, parameter_gradient)
    options = {"alpha": alpha, "tau": tau, "eps": eps, "reduction": reduction}
    present = (mask is not None, weights is not None, fw is not None, denominator is not None)
    prepared = gaussian_launch([samples_RnD, gx], mean, log_std, num_targets, needs, options, present)
    if prepared is None:
        loss, copy, gmean, glog_std = energy_gaussian_forward(
            samples_RnD.contiguous(), mean_RD, log_std_RD, seed, num_targets, mask_R, weights_R,
            feature_weights_D, alpha, tau, eps, reduction, sample_gradient, parameter_gradient,
        )  # fmt: skip
        return loss, gx.copy_(copy) if sample_gradient else gx, gmean, glog_std
    grid, scalars, constexprs, launching = prepared
    partial = torch.empty(rows if reduction == "none" else grid[0], dtype=dtype, device=samples_RnD.device)
    with launch.on_device(samples_RnD):
        kernels_gaussian.energy_gaussian_kernel[grid](
            samples_RnD, mean, log_std, seed, mask, weights, fw, denominator, partial,
            gx if sample_gradient else samples_RnD, gmean, glog_std, *scalars, **constexprs, **launching,
        )  # fmt: skip
    return _finish(partial, rows_shape, reduction), gx, gmean, glog_std


def _row_stride(tensor: Tensor) -> int | None:
    """The one stride between the rows of ``[..., D]`` (0 where all are the same row); None without such a view."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        return None
    collapsed = launch.collapse_rows(tensor.shape[:-1], [tensor.stride()[:-1]])
    return None if collapsed is None or len(collapsed[0]) > 1 else collapsed[1][0][0]


def _row_matrix(tensor: Tensor) -> tuple[Tensor, int]:
    """``[..., D]`` as rows with one stride; copies what has no such view."""
    stride = _row_stride(tensor)
    return (tensor.contiguous(), tensor.shape[-1]) if stride is None else (tensor, stride)


def gaussian_normals(seed: Tensor, rows: int, num_targets: int, features: int, dtype: torch.dtype) -> Tensor:
    """The standard normals ``[rows, m, D]`` that the Gaussian kernel draws for ``seed``.

    For tests, and for rows that do not fit into one program. The draws have the resolution of float32.
    """
    normals = torch.empty(rows, num_targets, features, dtype=dtype, device=seed.device)
    if normals.numel() == 0:
        return normals
    block_d = min(1024, launch.next_power_of_two(features))
    grid = (rows, launch.ceil_div(num_targets, 4), launch.ceil_div(features, block_d))
    with launch.on_device(seed):
        kernels_gaussian.gaussian_normals_kernel[grid](
            normals, seed, num_targets, features, ROUNDS=PHILOX_ROUNDS, BLOCK_D=block_d, num_warps=4
        )
    return normals


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """Multiply a dense ``gradient`` in place by the scalar ``factor`` on the device; no traffic if it is 1."""
    elements = gradient.numel()
    if elements == 0:
        return
    double = gradient.dtype == torch.float64
    grid = (min(launch.ceil_div(elements, 4096), 2112),)
    with launch.on_device(gradient):
        kernels.scale_gradient_kernel[grid](gradient, factor, elements, DOUBLE=double, BLOCK=1024, num_warps=4)
