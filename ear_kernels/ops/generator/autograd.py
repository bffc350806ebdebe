"""The whole generator after its two input linears as one autograd function: what is saved, recomputed and in place.

Legend: T tokens, R rows = tokens x samples, E conditioning vectors, R = E * group, W width. Forward, a block:

    mod [E, 3W] = SiLU(c) W_m^T      cuBLAS
    u   [R, W]  = LN(h) (1 + scale) + shift      one kernel, which also adds the previous block's gate * ffn to h
    pre [R, W]  = u W_1^T;  y = SiLU(pre);  ffn [R, W] = y W_2^T

Saved a block: h, mod, pre, ffn and two floats a row. With one modulation a row (group = 1) u overwrites the shift
inside ``mod``: backward needs u and not the shift, so it costs no memory. y is recomputed beside SiLU'(pre).

Backward, a block, from g = dL/dh' and df = g * gate (written by the kernel of the block after):

    da  = (df W_2) SiLU'(pre), and y again
    du  = da W_1, written where ``grad_mod`` keeps the shift's gradient (it is the same number for group = 1)
    one kernel: LN and modulation backward, + g, then the gate and residual of the block before: df, dgate
    ds += grad_mod W_m, accumulated by the GEMM itself (beta = 1)
"""

from typing import Any

import torch
from torch import Tensor

from ear_kernels.ops.adaln import autograd as adaln
from ear_kernels.ops.generator.reference import BLOCK_PARAMETERS
from ear_kernels.ops.silu_ffn import autograd as ffn_ops

SAVED_PER_BLOCK = 7
"""Tensors forward saves a block: h (empty for the first: it is the input), mod, u (empty for group = 1), pre, ffn,
mean, rstd. The final layer saves h, mod, u, mean, rstd."""

SAVED_FINAL = 5


def _split(parameters: list[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
    *blocks, final = (
        list(parameters[start : start + BLOCK_PARAMETERS])
        for start in range(0, len(parameters), BLOCK_PARAMETERS)
    )
    return blocks, final


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
    """[out ``[R, D]``, then with ``save`` the saved tensors]. Everything but the norms' parameters has one dtype."""
    blocks, final = _split(parameters)
    entries, width = conditioning.shape
    rows = entries * group
    hidden = adaln.as_rows(hidden)
    activated = ffn_ops.silu(conditioning.contiguous())
    saved: list[Tensor] = []
    pending: tuple[Tensor, Tensor] | None = None

    def normalise(mod: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, factor: float) -> Tensor:
        """u of a block; adds the pending gate * ffn to ``hidden`` first. Appends what backward needs."""
        nonlocal hidden, pending, index
        shift, scale = mod[:, :width], mod[:, width : 2 * width]
        u = shift if group == 1 else hidden.new_empty((rows, width))
        stats = (
            (mod.new_empty(rows, dtype=torch.float32), mod.new_empty(rows, dtype=torch.float32))
            if save
            else None
        )
        residual = None
        if pending is not None:
            residual = (*pending, hidden.new_empty((rows, width)))
        adaln.launch_forward(
            hidden,
            shift,
            scale,
            norm_weight,
            norm_bias,
            u,
            stats,
            group=group,
            eps=eps,
            temperature=factor,
            index=index,
            residual=residual,
            unit_rows=group,
        )
        if residual is not None:
            hidden, index, pending = residual[2], None, None
        if stats is not None:
            stored = hidden if saved else hidden.new_empty(0)
            saved.extend((stored, mod, u if group > 1 else hidden.new_empty(0), *stats))
        return u

    for norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, weight_mod, bias_mod in blocks:
        mod = ffn_ops.linear(activated, weight_mod, bias_mod)
        u = normalise(mod, norm_weight, norm_bias, temperature)
        gate = mod[:, 2 * width :]
        pre, active = ffn_ops.silu_linear(u, weight_in, bias_in, save)
        fused = None
        if group == 1 and index is None:
            fused = ffn_ops.gated_linear(active, weight_out, bias_out, hidden, gate, save)
        if fused is not None:
            hidden, ffn = fused
        else:
            ffn = ffn_ops.linear(active, weight_out, bias_out)
            pending = (ffn, gate)
        if save:
            assert pre is not None
            assert ffn is not None
            saved.extend((pre, ffn))
        del u, active, pre, mod
    weight_mod, bias_mod, weight_last, bias_last = final
    u = normalise(ffn_ops.linear(activated, weight_mod, bias_mod), None, None, 1.0)
    return [ffn_ops.linear(u, weight_last, bias_last), *saved]


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
    for layer in range(depth + 1 if save else 0):
        out += [new(rows, width) if layer else new(0), new(entries, (3 if layer < depth else 2) * width)]
        out += [new(rows, width) if group > 1 else new(0)]
        out += [new(rows, dtype=torch.float32), new(rows, dtype=torch.float32)]
        if layer < depth:
            out += [new(rows, width), new(rows, width)]
    return out


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad^T @ x`` by cuBLAS in ``dtype``: a float32 master weight gets the float32 accumulator, unrounded."""
    if grad.dtype != dtype and dtype == torch.float32 and grad.is_cuda:
        return torch.mm(grad.t(), x, out_dtype=dtype)
    return torch.mm(grad.t(), x).to(dtype)


def _backward(
    grad_out: Tensor,
    hidden: Tensor,
    conditioning: Tensor,
    parameters: list[Tensor],
    saved: list[Tensor],
    index: Tensor | None,
    inverse: Tensor | None,
    group: int,
    eps: float,
    dtypes: list[torch.dtype],
) -> list[Tensor]:
    """[gradient of hidden, of conditioning, of each parameter (in its ``dtypes`` entry)]."""
    blocks, final = _split(parameters)
    depth = len(blocks)
    entries, width = conditioning.shape
    rows = entries * group
    compute = conditioning.dtype
    hidden = adaln.as_rows(hidden)
    grad_out = adaln.as_rows(grad_out)
    activated = ffn_ops.silu(conditioning.contiguous())
    layers = [saved[SAVED_PER_BLOCK * i : SAVED_PER_BLOCK * (i + 1)] for i in range(depth + 1)]
    gradients: list[Tensor] = [hidden] * len(parameters)

    def put(layer: int, slot: int, value: Tensor) -> None:
        position = layer * BLOCK_PARAMETERS + slot
        # A copy: the sums are rows of one tensor, and outputs of an operation must not share memory.
        gradients[position] = value.to(dtypes[position], copy=True)

    def put_weight(layer: int, slot: int, grad: Tensor, x: Tensor) -> None:
        position = layer * BLOCK_PARAMETERS + slot
        gradients[position] = weight_gradient(grad, x, dtypes[position])

    def new_mod(count: int) -> Tensor:
        return hidden.new_empty((entries, count * width), dtype=compute)

    grad_ffn = sum_gate = sum_ffn = None
    grad_mod = new_mod(2)
    grad_hidden: Tensor | None = None
    grad_activated: Tensor | None = None
    for layer in reversed(range(depth + 1)):
        h, mod, u, mean, rstd, *ffn_saved = layers[layer]
        if layer == 0:
            h = hidden
        if group == 1:
            u = mod[:, :width]
        scale = mod[:, width : 2 * width]
        if layer == depth:
            norm_weight = norm_bias = None
            inner, into = grad_out, final[2]
            put_weight(layer, 2, grad_out, u)
            put(layer, 3, grad_out.sum(0, dtype=torch.float32))
        else:
            norm_weight, norm_bias, weight_in, _, weight_out, _, _, _ = blocks[layer]
            assert grad_ffn is not None
            assert sum_ffn is not None
            inner, active, sum_pre = ffn_ops.silu_linear_backward(grad_ffn, weight_out, ffn_saved[0])
            put_weight(layer, 4, grad_ffn, active)
            put(layer, 5, sum_ffn)
            put_weight(layer, 2, inner, u)
            put(layer, 3, sum_pre)
            into = weight_in
            del active
        # For one modulation a row the shift's gradient is du itself: let the GEMM write it there.
        grad_u = torch.mm(inner, into, out=grad_mod[:, :width]) if group == 1 else torch.mm(inner, into)
        del inner
        previous = None
        grad_mod_before = grad_mod
        if layer > 0:
            before = layers[layer - 1]
            grad_mod_before = new_mod(3)
            if grad_ffn is None:
                grad_ffn = hidden.new_empty((rows, width))
            previous = (before[6], before[1][:, 2 * width :], grad_ffn, grad_mod_before[:, 2 * width :])
        if grad_hidden is None:
            grad_residual, grad_hidden = None, hidden.new_empty((rows, width))
        else:
            grad_residual = grad_hidden
        sums = adaln.launch_backward(
            grad_u,
            h,
            scale,
            norm_weight,
            norm_bias,
            (mean, rstd),
            grad_hidden,
            None if group == 1 else grad_mod[:, :width],
            grad_mod[:, width : 2 * width],
            group=group,
            index=index if layer == 0 else None,
            grad_residual=grad_residual,
            previous=previous,
            sum_affine=norm_weight is not None,
            sum_modulation=True,
            unit_rows=group,
        )
        del grad_u
        if layer < depth:
            put(layer, 0, sums[0])
            put(layer, 1, sums[1])
            sums = sums[2:]
        assert layer == depth or sum_gate is not None
        mod_sums = (sums[0], sums[1]) if sum_gate is None else (sums[0], sums[1], sum_gate)
        slot = 0 if layer == depth else 6
        put(layer, slot + 1, torch.cat(mod_sums))
        if previous is not None:
            sum_gate, sum_ffn = sums[2], sums[3]
        put_weight(layer, slot, grad_mod, activated)
        weight_mod = final[0] if layer == depth else blocks[layer][6]
        if grad_activated is None:
            grad_activated = torch.mm(grad_mod, weight_mod)
        else:
            grad_activated.addmm_(grad_mod, weight_mod)
        grad_mod = grad_mod_before
    assert grad_hidden is not None
    assert grad_activated is not None
    grad_conditioning, _ = ffn_ops.silu_backward(grad_activated, conditioning, grad_pre=grad_activated)
    if index is not None:
        if inverse is not None:
            grad_hidden = grad_hidden[inverse]
        grad_hidden = (
            grad_hidden.view(hidden.shape[0], -1, width).sum(1) if rows else hidden.new_zeros(hidden.shape)
        )
    return [grad_hidden, grad_conditioning, *gradients]


def _backward_fake(
    grad_out: Tensor,
    hidden: Tensor,
    conditioning: Tensor,
    parameters: list[Tensor],
    saved: list[Tensor],
    index: Tensor | None,
    inverse: Tensor | None,
    group: int,
    eps: float,
    dtypes: list[torch.dtype],
) -> list[Tensor]:
    inputs = [hidden.new_empty(hidden.shape), conditioning.new_empty(conditioning.shape)]
    return inputs + [
        parameter.new_empty(parameter.shape, dtype=dtype)
        for parameter, dtype in zip(parameters, dtypes, strict=True)
    ]


LIBRARY = torch.library.Library("ear_kernels", "FRAGMENT")
LIBRARY.define(
    "generator_blocks_fwd(Tensor hidden, Tensor conditioning, Tensor[] parameters, Tensor? index, int group, "
    "float temperature, float eps, bool save) -> Tensor[]"
)
LIBRARY.define(
    "generator_blocks_bwd(Tensor grad_out, Tensor hidden, Tensor conditioning, Tensor[] parameters, Tensor[] saved, "
    "Tensor? index, Tensor? inverse, int group, float eps, ScalarType[] dtypes) -> Tensor[]"
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
        *parameters: Tensor,
    ) -> Tensor:
        run = torch.ops.ear_kernels.generator_blocks_fwd if torch.compiler.is_compiling() else _forward
        save = any(ctx.needs_input_grad)
        compute = conditioning.dtype
        # Cast once a step and keep: casting again in backward would read the float32 weights again.
        cast = [
            parameter if _is_norm(position, len(parameters)) else parameter.to(compute)
            for position, parameter in enumerate(parameters)
        ]
        out, *saved = run(hidden, conditioning, cast, index, group, temperature, eps, save)
        if save:
            ctx.save_for_backward(hidden, conditioning, index, inverse, *cast, *saved)
            ctx.group, ctx.eps, ctx.dtypes = group, eps, [parameter.dtype for parameter in parameters]
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        adaln.refuse_double_backward("mlp_generator")
        hidden, conditioning, index, inverse, *tensors = ctx.saved_tensors
        count = len(ctx.dtypes)
        run = torch.ops.ear_kernels.generator_blocks_bwd if torch.compiler.is_compiling() else _backward
        grad_hidden, grad_conditioning, *gradients = run(
            grad_out,
            hidden,
            conditioning,
            list(tensors[:count]),
            list(tensors[count:]),
            index,
            inverse,
            ctx.group,
            ctx.eps,
            ctx.dtypes,
        )
        return (grad_hidden, grad_conditioning, None, None, None, None, None, *gradients)


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
    with torch.autocast(hidden.device.type, enabled=False):
        return GeneratorBlocks.apply(
            hidden, conditioning, index, inverse, group, temperature, eps, *parameters
        )
