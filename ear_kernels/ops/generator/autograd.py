"""Library registration and autograd functions of the generator's operations. Importing this imports Triton."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ear_kernels.ops.generator import (
    launch,
    launch_adaln,
    launch_chain,
    launch_few_rows,
    launch_ffn,
    launch_inference,
)
from ear_kernels.ops.generator.reference import BLOCK_PARAMETERS, is_norm_parameter
from ear_kernels.runtime.autograd import graph_is_kept, refuse_double_backward
from ear_kernels.runtime.copies import held as held_copy
from ear_kernels.runtime.copies import low_all

LIBRARY = torch.library.Library("ear_kernels", "FRAGMENT")


def _register(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``function`` the library operation that ``schema`` names.

    ``fake`` gets the arguments by position. Returns what calls the operation: through the library, which costs tens
    of microseconds, only for a compiler, which needs it.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ear_kernels::{name}", fake, lib=LIBRARY)
    operation = getattr(torch.ops.ear_kernels, name)

    def run(*arguments: Any) -> Any:
        return (operation if torch.compiler.is_compiling() else function)(*arguments)

    return run


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Autocast would cast nothing inside (the tensors have their dtypes) but would look at every GEMM."""
    if tensor.is_meta:  # has no autocast
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def _float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


# ------------------------------------------------------------------------------------------- LayerNorm + modulation


def _adaln_forward_fake(hidden: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = hidden.shape[0], others[-1]
    return hidden.new_empty(hidden.shape, dtype=dtype), _float32(hidden, rows), _float32(hidden, rows)


def _adaln_backward_fake(
    grad_out: Tensor, hidden: Tensor, shift: Tensor, scale: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    width = hidden.shape[-1]
    grads = [tensor.new_empty(tensor.shape) for tensor in (hidden, shift, scale)]
    return *grads, _float32(hidden, width), _float32(hidden, width)


_adaln_forward = _register(
    "adaln_fwd(Tensor hidden, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, int group, float eps, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    launch_adaln.adaln_forward,
    _adaln_forward_fake,
)
_adaln_backward = _register(
    "adaln_bwd(Tensor grad_out, Tensor hidden, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor rstd, int group) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    launch_adaln.adaln_backward,
    _adaln_backward_fake,
)


class AdaLNModulate(torch.autograd.Function):
    """The arguments of :func:`launch_adaln.adaln_forward` -> the modulated rows."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out, mean, rstd = _adaln_forward(*arguments)
        *tensors, group, _, _ = arguments
        ctx.save_for_backward(*tensors, mean, rstd)
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("adaln_modulate")
        saved = ctx.saved_tensors
        *grads, grad_weight, grad_bias = _adaln_backward(grad_out, *saved, ctx.group)
        affine = [
            grad.to(parameter.dtype) if parameter is not None else None
            for grad, parameter in zip((grad_weight, grad_bias), saved[3:5], strict=True)
        ]
        return (*grads, *affine, None, None, None)


# ------------------------------------------------------------------------------------------------- gated SiLU network


def _ffn_forward_fake(
    hidden: Tensor, modulated: Tensor, gate: Tensor, weight_in: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    out, save = hidden.new_empty(hidden.shape), others[-1]
    if not save:
        return out, hidden.new_empty(0), hidden.new_empty(0)
    return out, hidden.new_empty((hidden.shape[0], weight_in.shape[0])), hidden.new_empty(hidden.shape)


def _ffn_backward_fake(
    grad_out: Tensor, modulated: Tensor, gate: Tensor, weight_in: Tensor, weight_out: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    inner, width = weight_in.shape[0], weight_out.shape[0]
    grads = [tensor.new_empty(tensor.shape) for tensor in (modulated, gate, weight_in, weight_out)]
    return *grads[:3], _float32(grad_out, inner), grads[3], _float32(grad_out, width)


_ffn_forward = _register(
    "gated_silu_ffn_fwd(Tensor hidden, Tensor modulated, Tensor gate, Tensor weight_in, Tensor? bias_in, "
    "Tensor weight_out, Tensor? bias_out, int group, bool save) -> (Tensor, Tensor, Tensor)",
    launch_ffn.ffn_forward,
    _ffn_forward_fake,
)
_ffn_backward = _register(
    "gated_silu_ffn_bwd(Tensor grad_out, Tensor modulated, Tensor gate, Tensor weight_in, Tensor weight_out, "
    "Tensor pre, Tensor ffn, int group) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    launch_ffn.ffn_backward,
    _ffn_backward_fake,
)


class GatedSiluFFN(torch.autograd.Function):
    """The arguments of :func:`launch_ffn.ffn_forward`, tensors in one dtype -> ``[R, W]``."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        out, pre, ffn = _ffn_forward(*arguments)
        _, modulated, gate, weight_in, bias_in, weight_out, bias_out, group, _ = arguments
        ctx.save_for_backward(modulated, gate, weight_in, weight_out, pre, ffn)
        ctx.group, ctx.biases = group, (bias_in is not None, bias_out is not None)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("gated_silu_ffn")
        grad_modulated, grad_gate, grad_w_in, grad_b_in, grad_w_out, grad_b_out = _ffn_backward(
            grad_out, *ctx.saved_tensors, ctx.group
        )
        has_in, has_out = ctx.biases
        grad_b_in = grad_b_in.to(grad_w_in.dtype) if has_in else None
        grad_b_out = grad_b_out.to(grad_w_out.dtype) if has_out else None
        return grad_out, grad_modulated, grad_gate, grad_w_in, grad_b_in, grad_w_out, grad_b_out, None, None


def gated_silu_ffn(tensors: list[Tensor | None], group: int, dtype: torch.dtype) -> Tensor:
    """The tensors of :func:`launch_ffn.ffn_forward`, in any dtypes -> ``[R, W]`` in ``dtype``."""
    cast = [tensor.to(dtype) if tensor is not None else None for tensor in tensors]
    # Asked here: inside an autograd function gradients are always off.
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in cast)
    assert cast[0] is not None
    with _without_autocast(cast[0]):
        return GatedSiluFFN.apply(*cast, group, save)


# --------------------------------------------------------------------------------------------- all blocks of the head


def _blocks(*arguments: Any) -> list[Tensor]:
    """See :func:`launch.forward`."""
    hidden, conditioning, parameters, index, group, temperature, eps, save = arguments
    if not save and group == 1:
        return [launch_inference.forward(hidden, conditioning, parameters, index, temperature, eps)]
    return launch.forward(*arguments)


def _blocks_fake(
    hidden: Tensor, conditioning: Tensor, parameters: list[Tensor], index: Tensor | None, group: int, *others: Any
) -> list[Tensor]:
    (entries, width), save = conditioning.shape, others[-1]
    rows = entries * group

    def new(*shape: int) -> Tensor:
        return hidden.new_empty(shape)

    def stats() -> list[Tensor]:
        return [_float32(hidden, rows), _float32(hidden, rows)]

    out = [new(rows, parameters[-2].shape[0])]
    if not save:
        return out
    for _ in range(len(parameters) // BLOCK_PARAMETERS):
        modulated = new(rows, width) if group > 1 else new(0)
        out += [new(entries, 3 * width), modulated, new(rows, width), new(rows, width), *stats()]
    out += [new(rows, width), *stats()]
    both = [new(rows, width), new(rows, 2 * width)]
    return out + (both if group == 1 else [new(entries, 2 * width), new(rows, width)])


# torch 2.11 hands the entries of a ScalarType[] argument to fakes and kernels as c10::ScalarType codes, later ones as
# dtypes (a single ScalarType comes as a dtype in both).
_SCALAR_TYPES = {5: torch.float16, 6: torch.float32, 7: torch.float64, 15: torch.bfloat16}


def as_dtype(dtype: torch.dtype | int) -> torch.dtype:
    """The dtype of an entry of a ScalarType[] argument."""
    return _SCALAR_TYPES[dtype] if isinstance(dtype, int) else dtype


def _blocks_backward(*arguments: Any) -> list[Tensor]:
    """See :func:`launch.backward`. As a library operation it changes none of its arguments."""
    *others, dtypes = arguments
    arguments = (*others, [as_dtype(dtype) for dtype in dtypes])
    return launch.backward(*arguments, reuse=False)


def _blocks_backward_fake(
    grad_out: Tensor, hidden: Tensor, conditioning: Tensor, parameters: list[Tensor], *others: Any
) -> list[Tensor]:
    inputs = [hidden.new_empty(hidden.shape), conditioning.new_empty(conditioning.shape)]
    return inputs + [
        parameter.new_empty(parameter.shape, dtype=as_dtype(dtype))
        for parameter, dtype in zip(parameters, others[-1], strict=True)
    ]


_generator_forward = _register(
    "generator_blocks_fwd(Tensor hidden, Tensor conditioning, Tensor[] parameters, Tensor? index, int group, "
    "float temperature, float eps, bool save) -> Tensor[]",
    _blocks,
    _blocks_fake,
)
_register(
    "generator_blocks_bwd(Tensor grad_out, Tensor hidden, Tensor conditioning, Tensor[] parameters, Tensor[] saved, "
    "Tensor? index, Tensor? inverse, int group, ScalarType[] dtypes) -> Tensor[]",
    _blocks_backward,
    _blocks_backward_fake,
)


class GeneratorBlocks(torch.autograd.Function):
    """Blocks and final layer: ``hidden [T, W]``, ``conditioning [E, W]`` -> ``[E * group, D]``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        conditioning: Tensor,
        index: Tensor | None,
        inverse: Tensor | None,
        group: int,
        temperature: float,
        eps: float,
        save: bool,
        *parameters: Tensor,
    ) -> Tensor:
        # Cast once a step and keep: casting again in backward would read the float32 weights again.
        is_norm = [is_norm_parameter(position, len(parameters)) for position in range(len(parameters))]
        linears = [parameter for parameter, norm in zip(parameters, is_norm, strict=True) if not norm]
        low = iter(low_all(linears, conditioning.dtype))
        cast = [parameter if norm else next(low) for parameter, norm in zip(parameters, is_norm, strict=True)]
        out, *saved = _generator_forward(hidden, conditioning, cast, index, group, temperature, eps, save)
        if save:
            ctx.save_for_backward(hidden, conditioning, index, inverse, *cast, *saved)
            ctx.group, ctx.dtypes = group, [parameter.dtype for parameter in parameters]
            ctx.is_overwritten = False
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("mlp_generator")
        hidden, conditioning, index, inverse, *tensors = ctx.saved_tensors
        cast, saved = list(tensors[: len(ctx.dtypes)]), list(tensors[len(ctx.dtypes) :])
        arguments = (grad_out, hidden, conditioning, cast, saved, index, inverse, ctx.group, ctx.dtypes)
        if torch.compiler.is_compiling():
            grad_hidden, grad_conditioning, *gradients = torch.ops.ear_kernels.generator_blocks_bwd(*arguments)
        else:
            if ctx.is_overwritten:
                raise RuntimeError(
                    "mlp_generator: backward ran before and has overwritten what it saved; "
                    "give the first call retain_graph=True"
                )
            ctx.is_overwritten = not graph_is_kept()
            grad_hidden, grad_conditioning, *gradients = launch.backward(*arguments, reuse=ctx.is_overwritten)
        return (grad_hidden, grad_conditioning, None, None, None, None, None, None, *gradients)


def generator_blocks(hidden: Tensor, conditioning: Tensor, parameters: list[Tensor], *others: Any) -> Tensor:
    """See :func:`ear_kernels.functional.generator_blocks`, whose other arguments follow in the same order."""
    # Asked here: inside an autograd function gradients are always off, and needs_input_grad ignores no_grad.
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, conditioning, *parameters))
    with _without_autocast(hidden):
        return GeneratorBlocks.apply(hidden, conditioning, *others, save, *parameters)


# ------------------------------------------------------------------------------------------------ without gradients


def _few_rows_forward(
    z: Tensor, noise: Tensor, inputs: list[Tensor], parameters: list[Tensor], *others: Any
) -> Tensor:
    rows, dtype = noise.shape[0], others[-1]
    halves = rows <= launch_chain.WHOLE_ROWS and inputs[0].dtype == dtype
    if halves and launch_chain.chain_fits(rows, inputs, parameters, dtype, z, noise):
        return launch_chain.whole(z, noise, inputs, parameters, *others)
    return launch_few_rows.few_rows(z, noise, inputs, parameters, *others)


def _few_rows_fake(z: Tensor, noise: Tensor, inputs: list[Tensor], parameters: list[Tensor], *others: Any) -> Tensor:
    return z.new_empty((noise.shape[0], parameters[-2].shape[0]), dtype=others[-1])


def _weights(
    parameters: list[Tensor], dtype: torch.dtype, choose: Callable[[Tensor, torch.dtype], Tensor]
) -> list[Tensor]:
    """``choose(parameter, dtype)`` of all of a generator's parameters but the norms'."""
    count = len(parameters)
    return [
        parameter if is_norm_parameter(position, count) else choose(parameter, dtype)
        for position, parameter in enumerate(parameters)
    ]


def held(inputs: list[Tensor], parameters: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The weights, or the copies of them in ``dtype`` that a scope holds."""
    return [held_copy(each, dtype) for each in inputs], _weights(parameters, dtype, held_copy)


def _cast(inputs: list[Tensor], parameters: list[Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    return [each.to(dtype) for each in inputs], _weights(parameters, dtype, lambda each, to: each.to(to))


def _modulations(
    noise: Tensor, inputs: list[Tensor], parameters: list[Tensor], temperature: float, out: Tensor
) -> None:
    if inputs and launch_few_rows.fits(noise.shape[0], inputs, parameters, out.dtype, noise):
        launch_chain.modulations(noise, inputs, parameters, temperature, out)
    elif noise.shape[0]:
        inputs, parameters = _cast(inputs, parameters, out.dtype)
        launch_inference.modulations(noise.to(out.dtype), inputs, parameters, temperature, out)


def _chain(z: Tensor, modulations: Tensor, inputs: list[Tensor], parameters: list[Tensor], eps: float) -> Tensor:
    dtype = modulations.dtype
    if launch_chain.chain_fits(z.shape[0], inputs, parameters, dtype, z):
        return launch_chain.chain(z, modulations, inputs, parameters, 1, eps)
    inputs, parameters = _cast(inputs, parameters, dtype)
    return launch_inference.chain(z.to(dtype), modulations, inputs, parameters, eps)


def _chain_fake(z: Tensor, modulations: Tensor, inputs: list[Tensor], parameters: list[Tensor], eps: float) -> Tensor:
    return modulations.new_empty((z.shape[0], parameters[-2].shape[0]))


_few_rows = _register(
    "generator_few_rows(Tensor z, Tensor noise, Tensor[] inputs, Tensor[] parameters, int samples, "
    "float temperature, float eps, ScalarType dtype) -> Tensor",
    _few_rows_forward,
    _few_rows_fake,
)
_generator_modulations = _register(
    "generator_modulations(Tensor noise, Tensor[] inputs, Tensor[] parameters, float temperature, Tensor(a!) out) "
    "-> ()",
    _modulations,
    lambda *arguments: None,
)
_generator_chain = _register(
    "generator_chain(Tensor z, Tensor modulations, Tensor[] inputs, Tensor[] parameters, float eps) -> Tensor",
    _chain,
    _chain_fake,
)


def few_rows(z: Tensor, *others: Any) -> Tensor:
    """See :func:`launch_few_rows.few_rows`, whose arguments these are."""
    with _without_autocast(z):
        return _few_rows(z, *others)


def modulations(
    noise: Tensor, inputs: list[Tensor], parameters: list[Tensor], temperature: float, out: Tensor
) -> None:
    """See :func:`ear_kernels.functional.generator_modulations`."""
    with _without_autocast(noise):
        _generator_modulations(noise, *held(inputs, parameters, out.dtype), temperature, out)


def chain(z: Tensor, modulations: Tensor, inputs: list[Tensor], parameters: list[Tensor], eps: float) -> Tensor:
    """See :func:`ear_kernels.functional.generator_chain`."""
    with _without_autocast(z):
        return _generator_chain(z, modulations, *held(inputs, parameters, modulations.dtype), eps)
