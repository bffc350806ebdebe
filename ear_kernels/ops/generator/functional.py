"""Shapes, dtypes, checks and errors of the generator's operations, and the choice of their backend."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ear_kernels.ops.generator import reference
from ear_kernels.runtime.backend import applies
from ear_kernels.runtime.checks import (
    check_broadcast,
    check_device,
    check_floating,
    compute_dtype,
    kernel_refusal,
    takes_tensors,
)

MAX_WIDTH = 8192
"""Widest row of the kernels: one program holds a row and its column sums in registers."""


def _rows_an_entry(rows: tuple[int, ...], leading: tuple[int, ...]) -> int | None:
    """Rows per entry when ``leading`` (a broadcastable shape) holds one entry for a run of consecutive rows.

    None if the shapes broadcast in any other way, and then the caller must expand.
    """
    leading = (1,) * (len(rows) - len(leading)) + leading
    split = 0
    while split < len(rows) and leading[split] == rows[split]:
        split += 1
    return math.prod(rows[split:]) if all(size == 1 for size in leading[split:]) else None


def _modulation_rows(hidden: Tensor, *tensors: Tensor) -> tuple[int, list[Tensor]]:
    """(group, the tensors as ``[R / group, W]``) for tensors that broadcast to ``hidden [..., W]``."""
    rows, width = tuple(hidden.shape[:-1]), hidden.shape[-1]
    groups = {
        _rows_an_entry(rows, tuple(tensor.shape[:-1])) if tensor.ndim and tensor.shape[-1] == width else None
        for tensor in tensors
    }
    group = groups.pop() if len(groups) == 1 else None
    if not group:
        return 1, [tensor.expand(hidden.shape).reshape(-1, width) for tensor in tensors]
    return group, [tensor.reshape(-1, width) for tensor in tensors]


def _check_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {list(shape)}")


@takes_tensors
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
            _check_shape(name, parameter, hidden.shape[-1])
    # A single feature less its mean is 0 in eager arithmetic. On a GPU the kernel's division leaves a rounding error,
    # which 1/sqrt(eps) makes large; there is nothing to gain at that width, so it stays with the reference.
    refusal = kernel_refusal(hidden, shift, scale, weight, bias, widest=MAX_WIDTH)
    if hidden.shape[-1] > 1 and applies("adaln_modulate", hidden, refusal):
        from ear_kernels.ops.generator.autograd import AdaLNModulate

        dtype = compute_dtype(hidden, shift, scale)
        group, (shift, scale) = _modulation_rows(hidden, shift, scale)
        rows = hidden.reshape(-1, hidden.shape[-1])
        return AdaLNModulate.apply(rows, shift, scale, weight, bias, group, eps, dtype).view(hidden.shape)
    return reference.adaln_modulate(hidden, shift, scale, weight, bias, eps)


@takes_tensors
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
    _check_shape("weight_out", weight_out, hidden.shape[-1], weight_in.shape[0])
    _check_shape("bias_in", bias_in, weight_in.shape[0])
    _check_shape("bias_out", bias_out, hidden.shape[-1])
    weights = (weight_in, bias_in, weight_out, bias_out)
    refusal = kernel_refusal(hidden, modulated, gate, *weights, widest=MAX_WIDTH)
    refusal = refusal or kernel_refusal(weight_in.t(), widest=MAX_WIDTH)
    if applies("gated_silu_ffn", hidden, refusal):
        from ear_kernels.ops.generator import autograd

        group, (gate_rows,) = _modulation_rows(hidden, gate)
        rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (hidden, modulated)]
        dtype = compute_dtype(hidden, modulated, gate, *weights)
        return autograd.gated_silu_ffn([*rows, gate_rows, *weights], group, dtype).view(hidden.shape)
    return reference.gated_silu_ffn(hidden, modulated, gate, *weights)


@takes_tensors
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
    block, final = reference.BLOCK_PARAMETERS, reference.FINAL_PARAMETERS
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
    refusal = kernel_refusal(hidden, conditioning, *parameters, widest=MAX_WIDTH)
    if hidden.dtype != conditioning.dtype:
        refusal = f"hidden in {hidden.dtype} and conditioning in {conditioning.dtype}"
    if temperature != 1 and torch.is_grad_enabled():
        refusal = f"temperature {temperature} with gradients enabled"
    if applies("mlp_generator", hidden, refusal):
        from ear_kernels.ops.generator import autograd

        return autograd.generator_blocks(hidden, conditioning, parameters, index, inverse, group, temperature, eps)
    return reference.generator_blocks(hidden, conditioning, parameters, index, group, temperature, eps)


@takes_tensors
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
    from ear_kernels.ops.generator import autograd, launch_few_rows

    dtype = compute_dtype(*inputs)
    # Without autocast, eager arithmetic refuses inputs of another dtype.
    if not compute_dtype(z) == compute_dtype(noise) == dtype:
        return None
    inputs, parameters = autograd.held(inputs, parameters, dtype)
    if not launch_few_rows.fits(noise.shape[0], inputs, parameters, dtype, z, noise):
        return None
    return autograd.few_rows(z, noise, inputs, parameters, samples, temperature, eps, dtype)


def _check_generator(
    name: str,
    rows: Tensor,
    counts: tuple[int, int],
    inputs: list[Tensor],
    parameters: list[Tensor],
    size: Callable[[], int],
    *others: Tensor,
) -> None:
    """Of an operation without gradients: ``rows`` of ``size()`` features, one of these ``counts`` of inputs, and all
    parameters."""
    check_floating(name, rows)
    block, final = reference.BLOCK_PARAMETERS, reference.FINAL_PARAMETERS
    if len(inputs) not in counts or len(parameters) < block + final or len(parameters) % block != final:
        raise ValueError(
            f"{len(inputs)} inputs and {len(parameters)} parameters were given; there must be "
            f"{' or '.join(map(str, counts))}, and {block} a block and {final} more"
        )
    if rows.ndim != 2 or rows.shape[1] != size():
        raise ValueError(f"{name} has shape {tuple(rows.shape)}; it must be [R, {size()}]")
    for tensor in (*inputs, *parameters):
        check_device("a parameter", tensor, rows, name)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (rows, *inputs, *parameters, *others)):
        raise ValueError("gradients are wanted of an operation that has none; call it under torch.no_grad()")


@takes_tensors
def generator_modulations(
    noise: Tensor,
    inputs: list[Tensor],
    parameters: list[Tensor],
    *,
    temperature: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """What the MLP generator computes of the noise alone: the modulations of all its layers, as one product.

    With :func:`generator_chain` it is the generator without gradients: a sampler that knows all its noise calls this
    once, before its loop. MAR's denoising MLP has the same layers over another conditioning, which is then given.

    Args:
        noise: ``[R, noise_dim]``; without ``inputs`` the conditioning c itself, ``[R, W]``, before its SiLU.
        inputs: weight and bias of ``noise_embed``, weight and bias of ``input_proj``; or an empty list.
        parameters: as in :func:`generator_blocks`.
        temperature: multiplies the shifts of the residual blocks, not the final layer's.
        out: memory for the result, of its shape, dtype and device, with dense rows.

    Returns:
        ``[R, (3 * blocks + 2) * W]``: shift, scale and gate of every block, then shift and scale of the final layer,
        ``[R, W]`` each; in the autocast dtype, or in the parameters' dtype without autocast. For more than a few rows
        the weights of all modulations are copied beside each other for the call.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or gradients that are wanted.
        TypeError: integer tensors.
    """
    _check_generator("noise", noise, (4, 0), inputs, parameters, lambda: (inputs or parameters)[0].shape[-1])
    dtype = compute_dtype(*(inputs or reference.modulation_linears(parameters)[0]))
    columns = reference.modulation_columns(parameters)
    if out is None:
        out = noise.new_empty((noise.shape[0], columns), dtype=dtype)
    elif out.shape != (noise.shape[0], columns) or out.dtype != dtype or out.stride(-1) != 1:
        raise ValueError(
            f"out has shape {tuple(out.shape)}, strides {out.stride()} and {out.dtype}; it must be "
            f"[{noise.shape[0]}, {columns}] with dense rows in {dtype}"
        )
    check_device("out", out, noise, "noise")
    if applies("mlp_generator", noise, kernel_refusal(out, noise, *inputs, *parameters)):
        from ear_kernels.ops.generator import autograd

        autograd.modulations(noise, inputs, parameters, temperature, out)
    else:
        reference.generator_modulations(noise.to(dtype), inputs, parameters, temperature, out)
    return out


@takes_tensors
def generator_chain(
    z: Tensor, modulations: Tensor, inputs: list[Tensor], parameters: list[Tensor], *, eps: float = 1e-6
) -> Tensor:
    """The MLP generator with modulations that are there already, without gradients.

    Args:
        z: ``[R, C]``, one row a token.
        modulations: ``[R, (3 * blocks + 2) * W]`` of :func:`generator_modulations` under the same autocast, row for
            row. Rows may lie any distance apart (a slice of a larger tensor along its first dimension, with or
            without a step; expanded); the columns of a row lie beside each other. Rows in another order are gathered
            by the caller.
        inputs, parameters: as in :func:`generator_modulations`; ``inputs`` may be those of ``input_proj`` alone.
            Weights in the dtype of ``modulations`` are read
            where they lie, so that a CUDA graph sees them as they are at replay. Of float32 ones under autocast so
            are those of at most 64 rows; for more rows they are cast at every call, unless a scope of
            :class:`ear_kernels.runtime.copies.LowCopies` has copies.
        eps: of every norm.

    Returns:
        ``[R, D]`` in the dtype of ``modulations``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or gradients that are wanted.
        TypeError: integer tensors.
    """
    _check_generator("z", z, (4, 2), inputs, parameters, lambda: inputs[-2].shape[-1], modulations)
    dtype, wanted = compute_dtype(*inputs), (z.shape[0], reference.modulation_columns(parameters))
    check_device("modulations", modulations, z, "z")
    if modulations.shape != wanted or modulations.dtype != dtype or modulations.stride(-1) != 1:
        raise ValueError(
            f"modulations has shape {tuple(modulations.shape)}, strides {modulations.stride()} and "
            f"{modulations.dtype}; it must be {list(wanted)} with dense rows in {dtype}"
        )
    if applies("mlp_generator", z, kernel_refusal(z, modulations, *inputs, *parameters)):
        from ear_kernels.ops.generator import autograd

        return autograd.chain(z, modulations, inputs, parameters, eps)
    return reference.generator_chain(z.to(dtype), modulations, inputs, parameters, eps)
