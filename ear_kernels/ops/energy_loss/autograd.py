"""The Triton energy loss and kernel score under autograd: library operators, fakes and the autograd functions.

Gradients are computed in the forward pass and saved; backward scales them by the incoming gradient. For a scalar loss
the scaling is one tiny kernel that returns at once if the incoming gradient is 1, as in ``loss.backward()``, so the
gradients travel through memory once. It works in place on the saved buffer, which is then handed on; with
``retain_graph=True`` the buffer must survive, and a product is returned instead.

Eager calls go to the launch functions directly. Under torch.compile, or any mode that watches operators, the same
functions are reached through ``torch.ops.ear_kernels``.
"""

from typing import Any

import torch
from torch import Tensor

from ear_kernels.ops.energy_loss import launch, launch_gaussian
from ear_kernels.ops.energy_loss.launch import Options, gradient_dtype
from ear_kernels.ops.energy_loss.reference import working_dtype
from ear_kernels.runtime.autograd import graph_is_kept, is_watched, refuse_double_backward

_library = torch.library.Library("ear_kernels", "FRAGMENT")
_library.define(
    "energy_loss_forward(Tensor samples, Tensor targets, Tensor? mask, Tensor? weights, Tensor? feature_weights, "
    "float alpha, float tau, float eps, str reduction, str kernel, bool sample_gradient, bool target_gradient) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "energy_gaussian_forward(Tensor samples, Tensor mean, Tensor log_std, Tensor seed, int num_targets, "
    "Tensor? mask, Tensor? weights, Tensor? feature_weights, float alpha, float tau, float eps, str reduction, "
    "bool sample_gradient, bool parameter_gradient) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _present(results: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """An operator's outputs are tensors: empty ones in the place of None."""
    return tuple(like.new_empty(0) if result is None else result for result in results)


def _energy_loss_operator(
    samples, targets, mask, weights, feature_weights, alpha, tau, eps, reduction, kernel, *wanted
):
    options = Options(alpha, tau, eps, reduction, kernel)
    results = launch.energy_loss_forward(samples, targets, mask, weights, feature_weights, options, *wanted)
    return _present(results, samples)


def _energy_gaussian_operator(
    samples, mean, log_std, seed, num_targets, mask, weights, feature_weights, alpha, tau, eps, reduction, *wanted
):
    options = Options(alpha, tau, eps, reduction)
    results = launch_gaussian.energy_gaussian_forward(
        samples, mean, log_std, seed, num_targets, mask, weights, feature_weights, options, *wanted
    )
    return _present(results, samples)


for _key in ("CPU", "CUDA"):
    _library.impl("energy_loss_forward", _energy_loss_operator, _key)
    _library.impl("energy_gaussian_forward", _energy_gaussian_operator, _key)


def _fake_loss(samples: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    return samples.new_empty(samples.shape[:-2] if reduction == "none" else (), dtype=dtype)


@torch.library.register_fake("ear_kernels::energy_loss_forward", lib=_library)
def _fake_energy_loss(samples, targets, mask, weights, feature_weights, alpha, tau, eps, reduction, kernel, *wanted):
    gradients = (
        launch.gradient_like(tensor, want, reduction) for tensor, want in zip((samples, targets), wanted, strict=True)
    )
    loss = _fake_loss(samples, reduction, working_dtype(samples, targets))
    return _present((loss, *gradients), samples)


@torch.library.register_fake("ear_kernels::energy_gaussian_forward", lib=_library)
def _fake_energy_gaussian(
    samples, mean, log_std, seed, num_targets, mask, weights, feature_weights, alpha, tau, eps, reduction,
    sample_gradient, parameter_gradient,
):  # fmt: skip
    shape = (*samples.shape[:-2], samples.shape[-1])
    parameters = (
        tensor.new_empty(shape, dtype=gradient_dtype(tensor.dtype, reduction)) if parameter_gradient else None
        for tensor in (mean, log_std)
    )
    gx = launch.gradient_like(samples, sample_gradient, reduction)
    return _present((_fake_loss(samples, reduction, working_dtype(samples, mean, log_std)), gx, *parameters), samples)


def scaled(gradient: Tensor, incoming: Tensor, dtype: torch.dtype, trailing: int, watched: bool) -> Tensor:
    """``gradient * incoming`` in ``dtype``; ``incoming`` is a scalar or has ``trailing`` dimensions fewer."""
    scalar = incoming.ndim == 0
    if not scalar:
        incoming = incoming[(...,) + (None,) * trailing]
    if watched:
        return (gradient * incoming).to(dtype)
    if gradient.dtype == dtype and not graph_is_kept():
        if scalar:
            launch.scale_gradient_(gradient, incoming)
            return gradient
        return gradient.mul_(incoming)
    return torch.mul(gradient, incoming, out=torch.empty_like(gradient, dtype=dtype))


def _scaled_gradients(ctx: Any, incoming: Tensor, trailing: tuple[int, ...]) -> tuple[Tensor | None, ...]:
    """Gradients of the leading inputs from those that forward saved."""
    refuse_double_backward(ctx.operation)
    watched = ctx.watched or torch.compiler.is_compiling()
    return tuple(
        scaled(gradient, incoming, dtype, dimensions, watched) if needed else None
        for gradient, dtype, dimensions, needed in zip(
            ctx.saved_tensors, ctx.dtypes, trailing, ctx.needs_input_grad, strict=False
        )
    )


class _EnergyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, samples, targets, mask, weights, feature_weights, alpha, tau, eps, reduction, kernel):
        ctx.operation = "kernel_score_loss" if kernel else "energy_loss"
        wanted = ctx.needs_input_grad[:2]
        ctx.watched = is_watched(samples)
        if ctx.watched:
            loss, *gradients = torch.ops.ear_kernels.energy_loss_forward(
                samples, targets, mask, weights, feature_weights, alpha, tau, eps, reduction, kernel, *wanted
            )
        else:
            options = Options(alpha, tau, eps, reduction, kernel)
            loss, *gradients = launch.energy_loss_forward(
                samples, targets, mask, weights, feature_weights, options, *wanted
            )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = samples.dtype, targets.dtype
        return loss

    @staticmethod
    def backward(ctx, incoming):
        return (*_scaled_gradients(ctx, incoming, (2, 2)), *(None,) * 8)


class _GaussianEnergyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, samples, mean, log_std, seed, num_targets, mask, weights, feature_weights, alpha, tau, eps, reduction
    ):
        ctx.operation = "energy_loss"
        needs_samples, needs_mean, needs_log_std = ctx.needs_input_grad[:3]
        wanted = needs_samples, needs_mean or needs_log_std
        tensors = samples, mean, log_std, seed, num_targets, mask, weights, feature_weights
        ctx.watched = is_watched(samples)
        if ctx.watched:
            loss, *gradients = torch.ops.ear_kernels.energy_gaussian_forward(
                *tensors, alpha, tau, eps, reduction, *wanted
            )
        else:
            options = Options(alpha, tau, eps, reduction)
            loss, *gradients = launch_gaussian.energy_gaussian_forward(*tensors, options, *wanted)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = samples.dtype, mean.dtype, log_std.dtype
        return loss

    @staticmethod
    def backward(ctx, incoming):
        return (*_scaled_gradients(ctx, incoming, (2, 1, 1)), *(None,) * 9)


def energy_loss(
    samples_RnD: Tensor,
    targets_RmD: Tensor,
    mask_R: Tensor | None,
    weights_R: Tensor | None,
    feature_weights_D: Tensor | None,
    options: Options,
) -> Tensor:
    """The reduced energy loss by Triton, or the kernel score where the options name a kernel.

    Arguments and result as in :func:`reference.energy_loss`.
    """
    return _EnergyLoss.apply(samples_RnD, targets_RmD, mask_R, weights_R, feature_weights_D, *options)


def draw_seed(device: torch.device) -> Tensor:
    """A seed ``[1]`` (int64) on ``device`` from torch's generator.

    Drawn on the device: ``torch.manual_seed`` reproduces it, and a CUDA graph draws a new one at every replay.
    """
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


def energy_loss_gaussian(
    samples_RnD: Tensor,
    mean_RD: Tensor,
    log_std_RD: Tensor,
    num_targets: int,
    mask_R: Tensor | None,
    weights_R: Tensor | None,
    feature_weights_D: Tensor | None,
    options: Options,
    seed: Tensor | None = None,
) -> Tensor:
    """The energy loss against ``num_targets`` draws a row of N(mean, exp(log_std)^2), made inside the kernel.

    ``mean`` and ``log_std`` are ``[..., D]`` (expanded views are fine). Rows that do not fit into one program get
    their draws from memory instead.
    """
    seed = draw_seed(samples_RnD.device) if seed is None else seed
    n, features = samples_RnD.shape[-2:]
    dtype = working_dtype(samples_RnD, mean_RD, log_std_RD)
    if not launch_gaussian.fits_one_program(n, features, dtype == torch.float64):
        rows = samples_RnD.shape[:-2]
        normals = launch_gaussian.gaussian_normals(seed, rows.numel(), num_targets, features, dtype)
        deviation = log_std_RD.to(dtype).exp().unsqueeze(-2)
        targets = mean_RD.to(dtype).unsqueeze(-2) + deviation * normals.view(*rows, num_targets, features)
        return energy_loss(samples_RnD, targets, mask_R, weights_R, feature_weights_D, options)
    return _GaussianEnergyLoss.apply(
        samples_RnD, mean_RD, log_std_RD, seed, num_targets, mask_R, weights_R, feature_weights_D,
        options.alpha, options.tau, options.eps, options.reduction,
    )  # fmt: skip
