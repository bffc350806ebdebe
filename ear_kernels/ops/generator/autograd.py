"""The whole generator after its two input linears as one autograd function around :mod:`passes`."""

from typing import Any

import torch
from torch import Tensor

from ear_kernels.ops.generator import inference, passes
from ear_kernels.ops.generator.reference import BLOCK_PARAMETERS
from ear_kernels.runtime.autograd import graph_is_kept, refuse_double_backward
from ear_kernels.runtime.copies import low as low_copy


def _forward(
    hidden: Tensor,
    conditioning: Tensor,
    parameters: list[Tensor],
    index: Tensor | None,
    group: int,
    temperature: float,
    eps: float,
    save: bool,
) -> list[Tensor]:
    """[out ``[R, D]``, then with ``save`` what :func:`passes.backward` wants]."""
    if not save and group == 1:
        return [inference.forward(hidden, conditioning, parameters, index, temperature, eps)]
    return passes.forward(hidden, conditioning, parameters, index, group, temperature, eps, save)


def _forward_fake(
    hidden: Tensor,
    conditioning: Tensor,
    parameters: list[Tensor],
    index: Tensor | None,
    group: int,
    temperature: float,
    eps: float,
    save: bool,
) -> list[Tensor]:
    depth = len(parameters) // BLOCK_PARAMETERS
    entries, width = conditioning.shape
    rows = entries * group

    def new(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype or hidden.dtype)

    out = [new(rows, parameters[-2].shape[0])]
    if not save:
        return out
    for _ in range(depth):
        out += [
            new(entries, 3 * width),
            new(rows, width) if group > 1 else new(0),
            new(rows, width),
            new(rows, width),
        ]
        out += [new(rows, dtype=torch.float32), new(rows, dtype=torch.float32)]
    out += [new(rows, width), new(rows, dtype=torch.float32), new(rows, dtype=torch.float32)]
    return out + (
        [new(rows, width), new(rows, 2 * width)] if group == 1 else [new(entries, 2 * width), new(rows, width)]
    )


# torch 2.11 hands the entries of a ScalarType[] argument to fakes and kernels as c10::ScalarType codes, later ones as
# dtypes (a single ScalarType comes as a dtype in both).
_SCALAR_TYPES = {5: torch.float16, 6: torch.float32, 7: torch.float64, 15: torch.bfloat16}


def as_dtype(dtype: torch.dtype | int) -> torch.dtype:
    """The dtype of an entry of a ScalarType[] argument."""
    return _SCALAR_TYPES[dtype] if isinstance(dtype, int) else dtype


def _backward(
    grad_out: Tensor,
    hidden: Tensor,
    conditioning: Tensor,
    parameters: list[Tensor],
    saved: list[Tensor],
    index: Tensor | None,
    inverse: Tensor | None,
    group: int,
    dtypes: list[torch.dtype],
    reuse: bool = False,
) -> list[Tensor]:
    """See :func:`passes.backward`. As a library operation it changes none of its arguments."""
    dtypes = [as_dtype(dtype) for dtype in dtypes]
    return passes.backward(grad_out, hidden, conditioning, parameters, saved, index, inverse, group, dtypes, reuse)


def _backward_fake(
    grad_out: Tensor,
    hidden: Tensor,
    conditioning: Tensor,
    parameters: list[Tensor],
    saved: list[Tensor],
    index: Tensor | None,
    inverse: Tensor | None,
    group: int,
    dtypes: list[torch.dtype],
) -> list[Tensor]:
    inputs = [hidden.new_empty(hidden.shape), conditioning.new_empty(conditioning.shape)]
    return inputs + [
        parameter.new_empty(parameter.shape, dtype=as_dtype(dtype))
        for parameter, dtype in zip(parameters, dtypes, strict=True)
    ]


LIBRARY = torch.library.Library("ear_kernels", "FRAGMENT")
LIBRARY.define(
    "generator_blocks_fwd(Tensor hidden, Tensor conditioning, Tensor[] parameters, Tensor? index, int group, "
    "float temperature, float eps, bool save) -> Tensor[]"
)
LIBRARY.define(
    "generator_blocks_bwd(Tensor grad_out, Tensor hidden, Tensor conditioning, Tensor[] parameters, Tensor[] saved, "
    "Tensor? index, Tensor? inverse, int group, ScalarType[] dtypes) -> Tensor[]"
)
LIBRARY.impl("generator_blocks_fwd", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("generator_blocks_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("ear_kernels::generator_blocks_fwd", _forward_fake, lib=LIBRARY)
torch.library.register_fake("ear_kernels::generator_blocks_bwd", _backward_fake, lib=LIBRARY)


def _is_norm(position: int, count: int) -> bool:
    return position % BLOCK_PARAMETERS < 2 and position < count - count % BLOCK_PARAMETERS


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
        run = torch.ops.ear_kernels.generator_blocks_fwd if torch.compiler.is_compiling() else _forward
        compute = conditioning.dtype
        # Cast once a step and keep: casting again in backward would read the float32 weights again.
        cast = [
            parameter if _is_norm(position, len(parameters)) else low_copy(parameter, compute)
            for position, parameter in enumerate(parameters)
        ]
        out, *saved = run(hidden, conditioning, cast, index, group, temperature, eps, save)
        if save:
            ctx.save_for_backward(hidden, conditioning, index, inverse, *cast, *saved)
            ctx.group, ctx.dtypes, ctx.spent = group, [parameter.dtype for parameter in parameters], False
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("mlp_generator")
        hidden, conditioning, index, inverse, *tensors = ctx.saved_tensors
        count = len(ctx.dtypes)
        arguments = (
            grad_out,
            hidden,
            conditioning,
            list(tensors[:count]),
            list(tensors[count:]),
            index,
            inverse,
            ctx.group,
            ctx.dtypes,
        )
        if torch.compiler.is_compiling():
            grad_hidden, grad_conditioning, *gradients = torch.ops.ear_kernels.generator_blocks_bwd(*arguments)
        else:
            if ctx.spent:
                raise RuntimeError(
                    "mlp_generator: backward ran before and has overwritten what it saved; "
                    "give the first call retain_graph=True"
                )
            ctx.spent = not graph_is_kept()
            grad_hidden, grad_conditioning, *gradients = _backward(*arguments, reuse=ctx.spent)
        return (grad_hidden, grad_conditioning, None, None, None, None, None, None, *gradients)


def generator_blocks(
    hidden: Tensor,
    conditioning: Tensor,
    parameters: list[Tensor],
    index: Tensor | None,
    inverse: Tensor | None,
    group: int,
    temperature: float,
    eps: float,
) -> Tensor:
    """See :func:`ear_kernels.functional.generator_blocks`."""
    # Asked here: inside an autograd function gradients are always off, and needs_input_grad ignores no_grad.
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (hidden, conditioning, *parameters))
    with torch.autocast(hidden.device.type, enabled=False):
        return GeneratorBlocks.apply(hidden, conditioning, index, inverse, group, temperature, eps, save, *parameters)
