"""The public operations: shapes, dtypes, checks and errors. The maths is in ``ops/*/reference.py``."""

from typing import Any

import torch
from torch import Tensor

from ear_kernels.ops.adaln import reference as adaln_reference
from ear_kernels.ops.energy_loss import reference as energy_loss_reference
from ear_kernels.ops.generator import reference as generator_reference
from ear_kernels.ops.silu_ffn import reference as silu_ffn_reference
from ear_kernels.ops.transformer.functional import (  # noqa: F401
    dropout_add_layer_norm,
    gelu_mlp,
    norm_gelu_mlp,
    norm_self_attention,
    project,
    qkv_heads,
    self_attention,
)
from ear_kernels.runtime.backend import applies, choose_backend, functional_transform_is_active
from ear_kernels.runtime.checks import check_broadcast, check_device, check_floating, compute_dtype, dimension
from ear_kernels.targets import GaussianTarget

REDUCTIONS = ("mean", "sum", "none")


def check_energy_loss_options(alpha: float, tau: float, eps: float, reduction: str) -> None:
    """Raise ValueError or TypeError unless the options of :func:`energy_loss` are usable."""
    for name, value in (("alpha", alpha), ("tau", tau), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} is {value!r} ({type(value).__name__}); it must be a number")
    if not 0 < alpha <= 2:
        raise ValueError(f"alpha is {alpha}; it must be in (0, 2]")
    if not 0 < tau <= 1:
        raise ValueError(f"tau is {tau}; it must be in (0, 1]")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps is {eps}; it must be 0 or a positive finite number")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {', '.join(REDUCTIONS)}")


def _triton_refusal(weights: Tensor | None, feature_weights: Tensor | None) -> str:
    """Why the Triton kernels cannot do a call of the energy loss that the reference can; "" if they can."""
    if torch.is_grad_enabled():
        for name, tensor in (("weights", weights), ("feature_weights", feature_weights)):
            if tensor is not None and tensor.requires_grad:
                return f"the kernels give no gradients of {name}"
    if not torch.compiler.is_compiling() and functional_transform_is_active():
        return "torch.func transforms need the reference"
    return ""


# ear_kernels.ops.energy_loss.plans, once a call has gone to Triton; until then importing it would import Triton.
_plans: Any = None


def _load_plans() -> None:
    global _plans
    if _plans is None:
        from ear_kernels.ops.energy_loss import plans

        _plans = plans


def energy_loss(
    samples: Tensor,
    target: Tensor | GaussianTarget,
    mask: Tensor | None = None,
    *,
    alpha: float = 1.0,
    tau: float = 1.0,
    sample_dim: int = -2,
    target_dim: int = -2,
    weights: Tensor | None = None,
    feature_weights: Tensor | None = None,
    eps: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Energy loss of n samples against m targets a row (paper Eq. 10; general form in docs/energy_loss.md).

    ``2 mean_{i,k} |x_i - y_k|^alpha - tau mean_{i != j} |x_i - x_j|^alpha``

    With n = 2, m = 1 this is Eq. 10 to the letter; with tau = 1 it is twice the fair (U-statistic) energy score.
    All differences, squares and sums are in float32, or in float64 if an input is float64. The gradient of a
    distance at coincident points is 0 for every alpha.

    Args:
        samples: ``[..., n, D]``, n >= 2, floating point; the n samples are along ``sample_dim``.
        target: ``[..., D]`` (one target a row) or ``[..., m, D]`` (as many dimensions as ``samples``; the m targets
            are along ``target_dim``), or a :class:`GaussianTarget`, whose m targets are drawn in the kernel.
        mask: broadcastable to the rows ``[...]``, bool or number; rows where it is 0 contribute nothing and get
            zero gradient, whatever they hold (NaN and Inf included).
        alpha: exponent of the distances, in (0, 2]. Strictly proper below 2.
        tau: weight of the diversity term, in (0, 1].
        sample_dim: the dimension of the samples in ``samples``; 0 for the samples-first layout. Strided views are
            not copied.
        target_dim: the dimension of the targets where ``target`` has one.
        weights: row weights, broadcastable to ``[...]``, non-negative.
        feature_weights: ``[D]``, non-negative, inside the norm: ``|v|^2 = sum_d w_d v_d^2``.
        eps: smoothing of the distance, ``(|v|^2 + eps^2)^(alpha/2)``; keeps gradients bounded for alpha < 1.
        reduction: "mean" (over unmasked rows; over the weights where given; 0 if there are none), "sum", or
            "none" (weighted rows, masked ones 0).

    Returns:
        A scalar, or ``[...]`` for "none"; float32 (float64 if an input is float64).

    Raises:
        ValueError: an option out of range, fewer than 2 samples, shapes or devices that do not fit.
        TypeError: an argument that is no floating-point tensor.
    """
    key = None
    if _plans is not None and mask is None and weights is None and feature_weights is None:
        key = _plans.key_of(samples, target, (alpha, tau, sample_dim, target_dim, eps, reduction))
        plan = None if key is None else _plans.PLANS.get(key)
        if plan is not None:
            return plan.run(samples, target)
    check_energy_loss_options(alpha, tau, eps, reduction)
    check_floating("samples", samples)
    gaussian = target if isinstance(target, GaussianTarget) else None
    given = target.mean if isinstance(target, GaussianTarget) else target
    name = "target" if gaussian is None else "target.mean"
    check_floating(name, given)
    check_device(name, given, samples, "samples")
    if samples.ndim < 2:
        raise ValueError(f"samples have shape {tuple(samples.shape)}; they must be [..., n, D]")
    samples_RnD = samples.movedim(dimension("sample_dim", sample_dim, samples.ndim), -2)
    rows, (n, features) = tuple(samples_RnD.shape[:-2]), samples_RnD.shape[-2:]
    if n < 2:
        raise ValueError(
            f"samples have {n} sample(s) along dimension {sample_dim} of {tuple(samples.shape)}; "
            "the energy loss needs at least 2"
        )
    if features < 1:
        raise ValueError(f"samples have shape {tuple(samples.shape)}; the last dimension must hold >= 1 feature")
    targets_RmD = None
    if gaussian is None and given.ndim == samples.ndim:
        targets_RmD = given.movedim(dimension("target_dim", target_dim, given.ndim), -2)
    elif given.ndim == samples.ndim - 1:
        targets_RmD = given.unsqueeze(-2)
    if (
        targets_RmD is None
        or tuple(targets_RmD.shape[:-2]) != rows
        or targets_RmD.shape[-1] != features
        or targets_RmD.shape[-2] < 1
    ):
        several = f" or, with m targets a row along dimension {target_dim}, {(*rows, 'm', features)}"
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}; for samples of shape {tuple(samples.shape)} it must be "
            f"{(*rows, features)}{several if gaussian is None else ''}"
        )
    for name, tensor in (("mask", mask), ("weights", weights)):
        if tensor is not None:
            check_device(name, tensor, samples, "samples")
            check_broadcast(name, tensor, rows)
    if feature_weights is not None:
        check_floating("feature_weights", feature_weights)
        check_device("feature_weights", feature_weights, samples, "samples")
        if tuple(feature_weights.shape) != (features,):
            raise ValueError(f"feature_weights have shape {tuple(feature_weights.shape)}; they must be [{features}]")
    options: dict[str, Any] = {"alpha": float(alpha), "tau": float(tau), "eps": float(eps), "reduction": reduction}
    backend = choose_backend("energy_loss", samples, _triton_refusal(weights, feature_weights))
    if backend == "triton":
        # Imported here, so that importing ear_kernels needs no Triton.
        from ear_kernels.ops.energy_loss import autograd as energy_loss_triton

        _load_plans()
        if key is not None:
            plan = _plans.make(samples, target, (sample_dim, target_dim), options)
            if plan is not None:
                _plans.remember(key, plan)
                return plan.run(samples, target)
        if gaussian is not None:
            return energy_loss_triton.energy_loss_gaussian(
                samples_RnD,
                gaussian.mean,
                gaussian.log_std.expand_as(gaussian.mean),
                gaussian.num_targets,
                mask,
                weights,
                feature_weights,
                **options,
            )
        return energy_loss_triton.energy_loss(samples_RnD, targets_RmD, mask, weights, feature_weights, **options)
    if gaussian is not None:
        targets_RmD = energy_loss_reference.draw_gaussian_targets(
            samples_RnD, gaussian.mean, gaussian.log_std, gaussian.num_targets
        )
    return energy_loss_reference.energy_loss(samples_RnD, targets_RmD, mask, weights, feature_weights, **options)


def adaln_modulate(
    hidden: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
) -> Tensor:
    """``LN(hidden) * (1 + scale) + shift`` over the last dimension (paper Eq. 11, first line).

    Args:
        hidden: ``[..., W]``, floating point.
        shift, scale: broadcastable to ``hidden``; one of them a row, or one for several rows.
        weight, bias: the LayerNorm's affine parameters, ``[W]``; None for a norm without them.
        eps: added to the variance.

    Returns:
        ``[..., W]`` in the promoted dtype of hidden, shift and scale. The Triton path computes in float32 and, under
        autocast, returns the autocast dtype (the linear that follows would cast to it).

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: integer tensors.
    """
    check_floating("hidden", hidden)
    if hidden.ndim < 1:
        raise ValueError("hidden is a scalar; it must be [..., W]")
    for name, tensor in (("shift", shift), ("scale", scale)):
        check_floating(name, tensor)
        check_device(name, tensor, hidden, "hidden")
        check_broadcast(name, tensor, tuple(hidden.shape))
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_device(name, parameter, hidden, "hidden")
            if tuple(parameter.shape) != (hidden.shape[-1],):
                raise ValueError(f"{name} has shape {tuple(parameter.shape)}; it must be [{hidden.shape[-1]}]")
    # A single feature less its mean is 0 in eager arithmetic. On a GPU the kernel's division leaves a rounding error,
    # which 1/sqrt(eps) makes large; there is nothing to gain at that width, so it stays with the reference.
    if choose_backend("adaln_modulate", hidden) == "triton" and hidden.shape[-1] > 1:
        from ear_kernels.ops.adaln import autograd as adaln

        tensors = (shift, scale, weight, bias)
        if applies("adaln_modulate", hidden, adaln.supported(hidden, *tensors)):
            return adaln.adaln_modulate(hidden, *tensors, eps, compute_dtype(hidden, shift, scale))
    return adaln_reference.adaln_modulate(hidden, shift, scale, weight, bias, eps)


def gated_silu_ffn(
    hidden: Tensor,
    modulated: Tensor,
    gate: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
) -> Tensor:
    """``hidden + gate * FFN(modulated)``, FFN = Linear, SiLU, Linear (paper Eq. 11, second line).

    Args:
        hidden: the residual stream, ``[..., W]``.
        modulated: the FFN's input, ``[..., U]``, with the leading dimensions of ``hidden``.
        gate: broadcastable to ``hidden``.
        weight_in, bias_in: ``[V, U]`` and ``[V]`` or None.
        weight_out, bias_out: ``[W, V]`` and ``[W]`` or None.

    Returns:
        ``[..., W]`` in the promoted dtype; in the autocast dtype under autocast. The Triton path rounds ``hidden``
        and ``gate`` to that dtype as well.

    Raises:
        ValueError: shapes or devices that do not fit. TypeError: integer tensors.
    """
    named = (("hidden", hidden), ("modulated", modulated), ("gate", gate), ("weight_in", weight_in))
    for name, tensor in (*named, ("weight_out", weight_out)):
        check_floating(name, tensor)
        check_device(name, tensor, hidden, "hidden")
    if modulated.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"modulated has shape {tuple(modulated.shape)}; its leading dimensions must be those of hidden, "
            f"{tuple(hidden.shape)}"
        )
    check_broadcast("gate", gate, tuple(hidden.shape))
    if weight_in.ndim != 2 or weight_in.shape[1] != modulated.shape[-1]:
        raise ValueError(f"weight_in has shape {tuple(weight_in.shape)}; it must be [V, {modulated.shape[-1]}]")
    inner = weight_in.shape[0]
    if tuple(weight_out.shape) != (hidden.shape[-1], inner):
        raise ValueError(f"weight_out has shape {tuple(weight_out.shape)}; it must be [{hidden.shape[-1]}, {inner}]")
    for name, bias, size in (("bias_in", bias_in, inner), ("bias_out", bias_out, hidden.shape[-1])):
        if bias is not None and tuple(bias.shape) != (size,):
            raise ValueError(f"{name} has shape {tuple(bias.shape)}; it must be [{size}]")
    if choose_backend("gated_silu_ffn", hidden) == "triton":
        from ear_kernels.ops.adaln import autograd as adaln
        from ear_kernels.ops.silu_ffn import autograd as silu_ffn

        tensors = (hidden, modulated, gate, weight_in, bias_in, weight_out, bias_out)
        reason = adaln.supported(*tensors) or adaln.supported(weight_in.t())
        if applies("gated_silu_ffn", hidden, reason):
            return silu_ffn.gated_silu_ffn(*tensors, compute_dtype(*tensors))
    return silu_ffn_reference.gated_silu_ffn(hidden, modulated, gate, weight_in, bias_in, weight_out, bias_out)


def generator_blocks(
    hidden: Tensor,
    conditioning: Tensor,
    parameters: list[Tensor],
    *,
    index: Tensor | None = None,
    inverse: Tensor | None = None,
    group: int = 1,
    temperature: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """All residual blocks and the final layer of the MLP generator (paper Eq. 11) as one operation.

    Legend: T tokens, R = E * group rows, E conditioning vectors, W width, D size of a token.

    Args:
        hidden: ``[T, W]``: the projected hidden state of each token.
        conditioning: ``[E, W]``: the embedded noise c, before its SiLU; rows ``e * group`` to ``(e + 1) * group - 1``
            share vector e.
        parameters: 8 a block (norm weight and bias, first linear, second linear, modulation linear), then 4 of
            the final layer (modulation linear, output linear); each linear's weight before its bias.
        index: ``[R]`` int32, the token of each row; None if rows are tokens. Every token has the same number of rows
            in ``inverse``.
        inverse: ``[T * n]``: the row of sample s of token t at ``t * n + s``; None if rows are in that order.
            Rows that it does not name are padding and get no gradient from ``hidden``.
        group: rows a conditioning vector.
        temperature: multiplies the shift of the residual blocks. Other than 1 only without gradients.
        eps: of every norm.

    Returns:
        ``[R, D]`` in row order, in the dtype of ``conditioning``.

    Raises:
        ValueError: shapes that do not fit, or a temperature with gradients.
    """
    check_floating("hidden", hidden)
    check_floating("conditioning", conditioning)
    check_device("conditioning", conditioning, hidden, "hidden")
    block, final = generator_reference.BLOCK_PARAMETERS, generator_reference.FINAL_PARAMETERS
    if len(parameters) < block + final or len(parameters) % block != final:
        raise ValueError(f"{len(parameters)} parameters were given; there must be {block} a block and {final} more")
    rows = conditioning.shape[0] * group
    have = hidden.shape[0] if index is None else index.shape[0]
    if hidden.ndim != 2 or conditioning.ndim != 2 or hidden.shape[1] != conditioning.shape[1] or have != rows:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, conditioning {tuple(conditioning.shape)}, group {group}, "
            f"index {None if index is None else tuple(index.shape)} do not fit; they must be [T, W], [E, W] and "
            "[E * group]"
        )
    if choose_backend("mlp_generator", hidden) == "triton":
        from ear_kernels.ops.adaln import autograd as adaln
        from ear_kernels.ops.generator import autograd as generator

        reason = adaln.supported(hidden, conditioning, *parameters)
        if hidden.dtype != conditioning.dtype:
            reason = f"hidden in {hidden.dtype} and conditioning in {conditioning.dtype}"
        if temperature != 1 and torch.is_grad_enabled():
            reason = f"temperature {temperature} with gradients enabled"
        if applies("mlp_generator", hidden, reason):
            return generator.generator_blocks(
                hidden, conditioning, parameters, index, inverse, group, temperature, eps
            )
    return generator_reference.generator_blocks(hidden, conditioning, parameters, index, group, temperature, eps)


def generator_few_rows(
    z: Tensor,
    noise: Tensor,
    inputs: list[Tensor],
    parameters: list[Tensor],
    *,
    samples: int = 1,
    temperature: float = 1.0,
    eps: float = 1e-6,
) -> Tensor | None:
    """The whole generator for few rows and without gradients, or None where that path does not apply.

    Args:
        z: ``[T, C]``. noise: ``[T * samples, noise_dim]``.
        inputs: weight and bias of ``noise_embed``, weight and bias of ``input_proj``.
        parameters, temperature, eps: as in :func:`generator_blocks`.

    Returns:
        ``[T * samples, D]`` in the autocast dtype, or in the parameters' dtype without autocast.
    """
    if torch.is_grad_enabled() or not applies("mlp_generator", z, None):
        return None
    from ear_kernels.ops.generator import few_rows

    dtype = compute_dtype(*inputs)
    if not torch.is_autocast_enabled(z.device.type) and (z.dtype != dtype or noise.dtype != dtype):
        return None
    if not few_rows.applies(noise.shape[0], z, noise, inputs, parameters, dtype):
        return None
    return few_rows.few_rows(z, noise, inputs, parameters, samples, temperature, eps, dtype)
