"""The Triton energy loss under autograd: library operators, fakes and the autograd functions.

Gradients are computed in the forward pass and saved; backward scales them by the incoming gradient. For a scalar loss
the scaling is one tiny kernel that returns at once if the incoming gradient is 1, as in ``loss.backward()``, so the
gradients travel through memory once. It works in place on the saved buffer, which is then handed on; with
``retain_graph=True`` the buffer must survive, and a product is returned instead.

Eager calls go to the launchers directly. Under torch.compile, or any mode that watches operators, the same launchers
are reached through ``torch.ops.ear_kernels``.
"""

import torch
from torch import Tensor

from ear_kernels.ops.energy_loss import launchers
from ear_kernels.ops.energy_loss.launchers import gradient_dtype
from ear_kernels.ops.energy_loss.reference import working_dtype

_library = torch.library.Library("ear_kernels", "FRAGMENT")
_library.define(
    "energy_loss_forward(Tensor samples, Tensor targets, Tensor? mask, Tensor? weights, Tensor? feature_weights, "
    "float alpha, float tau, float eps, str reduction, bool sample_gradient, bool target_gradient) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "energy_gaussian_forward(Tensor samples, Tensor mean, Tensor log_std, Tensor seed, int num_targets, "
    "Tensor? mask, Tensor? weights, Tensor? feature_weights, float alpha, float tau, float eps, str reduction, "
    "bool sample_gradient, bool parameter_gradient) -> (Tensor, Tensor, Tensor, Tensor)"
)
for _key in ("CPU", "CUDA"):
    _library.impl("energy_loss_forward", launchers.energy_loss_forward, _key)
    _library.impl("energy_gaussian_forward", launchers.energy_gaussian_forward, _key)


def _fake_gradient(tensor: Tensor, wanted: bool, reduction: str) -> Tensor:
    dtype = gradient_dtype(tensor.dtype, reduction)
    return torch.empty_like(tensor, dtype=dtype) if wanted else tensor.new_empty(0, dtype=dtype)


@torch.library.register_fake("ear_kernels::energy_loss_forward", lib=_library)
def _fake_energy_loss_forward(
    samples,
    targets,
    mask,
    weights,
    feature_weights,
    alpha,
    tau,
    eps,
    reduction,
    sample_gradient,
    target_gradient,
):
    rows = samples.shape[:-2] if reduction == "none" else ()
    return (
        samples.new_empty(rows, dtype=working_dtype(samples, targets)),
        _fake_gradient(samples, sample_gradient, reduction),
        _fake_gradient(targets, target_gradient, reduction),
    )


@torch.library.register_fake("ear_kernels::energy_gaussian_forward", lib=_library)
def _fake_energy_gaussian_forward(
    samples, mean, log_std, seed, num_targets, mask, weights, feature_weights, alpha, tau, eps, reduction,
    sample_gradient, parameter_gradient,
):  # fmt: skip
    rows = samples.shape[:-2] if reduction == "none" else ()
    shape = (*samples.shape[:-2], samples.shape[-1]) if parameter_gradient else (0,)
    return (
        samples.new_empty(rows, dtype=working_dtype(samples, mean, log_std)),
        _fake_gradient(samples, sample_gradient, reduction),
        mean.new_empty(shape, dtype=gradient_dtype(mean.dtype, reduction)),
        log_std.new_empty(shape, dtype=gradient_dtype(log_std.dtype, reduction)),
    )


def _watched(tensor: Tensor) -> bool:
    """True where the operators must be visible: compilation, fake tensors, dispatch modes."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


def graph_is_kept() -> bool:
    """Whether the running backward pass keeps its graph, so that a saved buffer may be needed again."""
    probe = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if probe is None else probe()


def refuse_second_order() -> None:
    # once_differentiable would not raise here: with a scalar loss the second-order gradient would be silently wrong.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the Triton energy loss has no second-order gradients (create_graph=True); "
            "set EAR_KERNELS_BACKEND=eager for them"
        )


def scaled(gradient: Tensor, incoming: Tensor, dtype: torch.dtype, trailing: int, watched: bool) -> Tensor:
    """``gradient * incoming`` in ``dtype``; ``incoming`` is a scalar or has ``trailing`` dimensions fewer."""
    scalar = incoming.ndim == 0
    if not scalar:
        incoming = incoming[(...,) + (None,) * trailing]
    if watched:
        return (gradient * incoming).to(dtype)
    if gradient.dtype == dtype and not graph_is_kept():
        if scalar:
            launchers.scale_gradient_(gradient, incoming)
            return gradient
        return gradient.mul_(incoming)
    return torch.mul(gradient, incoming, out=torch.empty_like(gradient, dtype=dtype))


class _EnergyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, samples, targets, mask, weights, feature_weights, alpha, tau, eps, reduction):
        needs_samples, needs_targets = ctx.needs_input_grad[:2]
        watched = _watched(samples)
        forward = torch.ops.ear_kernels.energy_loss_forward if watched else launchers.energy_loss_forward
        loss, gx, gy = forward(
            samples,
            targets,
            mask,
            weights,
            feature_weights,
            alpha,
            tau,
            eps,
            reduction,
            needs_samples,
            needs_targets,
        )
        ctx.save_for_backward(gx, gy)
        ctx.dtypes, ctx.watched = (samples.dtype, targets.dtype), watched
        return loss

    @staticmethod
    def backward(ctx, incoming):
        refuse_second_order()
        gx, gy = ctx.saved_tensors
        needs_samples, needs_targets = ctx.needs_input_grad[:2]
        watched = ctx.watched or torch.compiler.is_compiling()
        gx = scaled(gx, incoming, ctx.dtypes[0], 2, watched) if needs_samples else None
        gy = scaled(gy, incoming, ctx.dtypes[1], 2, watched) if needs_targets else None
        return gx, gy, None, None, None, None, None, None, None


class _GaussianEnergyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        samples,
        mean,
        log_std,
        seed,
        num_targets,
        mask,
        weights,
        feature_weights,
        alpha,
        tau,
        eps,
        reduction,
    ):
        needs_samples, needs_mean, needs_log_std = ctx.needs_input_grad[:3]
        watched = _watched(samples)
        forward = torch.ops.ear_kernels.energy_gaussian_forward if watched else launchers.energy_gaussian_forward
        loss, gx, gmean, glog_std = forward(
            samples, mean, log_std, seed, num_targets, mask, weights, feature_weights, alpha, tau, eps, reduction,
            needs_samples, needs_mean or needs_log_std,
        )  # fmt: skip
        ctx.save_for_backward(gx, gmean, glog_std)
        ctx.dtypes, ctx.watched = (samples.dtype, mean.dtype, log_std.dtype), watched
        return loss

    @staticmethod
    def backward(ctx, incoming):
        refuse_second_order()
        watched = ctx.watched or torch.compiler.is_compiling()
        gradients = [
            scaled(gradient, incoming, dtype, trailing, watched) if needed else None
            for gradient, dtype, trailing, needed in zip(
                ctx.saved_tensors, ctx.dtypes, (2, 1, 1), ctx.needs_input_grad[:3], strict=True
            )
        ]
        return (*gradients, None, None, None, None, None, None, None, None, None)


def energy_loss(
    samples_RnD: Tensor,
    targets_RmD: Tensor,
    mask_R: Tensor | None,
    weights_R: Tensor | None,
    feature_weights_D: Tensor | None,
    *,
    alpha: float,
    tau: float,
    eps: float,
    reduction: str,
) -> Tensor:
    """The reduced energy loss by Triton; arguments and result as in :func:`reference.energy_loss`."""
    return _EnergyLoss.apply(
        samples_RnD, targets_RmD, mask_R, weights_R, feature_weights_D, alpha, tau, eps, reduction
    )


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
    *,
    alpha: float,
    tau: float,
    eps: float,
    reduction: str,
    seed: Tensor | None = None,
) -> Tensor:
    """The energy loss against ``num_targets`` draws a row of N(mean, exp(log_std)^2), made inside the kernel.

    ``mean`` and ``log_std`` are ``[..., D]`` (expanded views are fine). Rows that do not fit into one program get
    their draws from memory instead.
    """
    seed = draw_seed(samples_RnD.device) if seed is None else seed
    n, features = samples_RnD.shape[-2:]
    dtype = working_dtype(samples_RnD, mean_RD, log_std_RD)
    if launchers.launch.energy_gaussian_config(n, features, dtype == torch.float64) is None:
        rows = samples_RnD.shape[:-2]
        normals = launchers.gaussian_normals(seed, rows.numel(), num_targets, features, dtype)
        targets = mean_RD.to(dtype).unsqueeze(-2) + log_std_RD.to(dtype).exp().unsqueeze(-2) * normals.view(
            *rows, num_targets, features
        )
        return energy_loss(
            samples_RnD, targets, mask_R, weights_R, feature_weights_D,
            alpha=alpha, tau=tau, eps=eps, reduction=reduction,
        )  # fmt: skip
    return _GaussianEnergyLoss.apply(
        samples_RnD, mean_RD, log_std_RD, seed, num_targets, mask_R, weights_R, feature_weights_D,
        alpha, tau, eps, reduction,
    )  # fmt: skip
