"""The whole generator after its two input linears as one autograd function: what is saved, recomputed and in place.

Legend: T tokens, R rows = tokens x samples, E conditioning vectors, R = E * group, W width. Forward, a block:

    mod [E, 3W] = SiLU(c) W_m^T      cuBLAS
    u   [R, W]  = LN(h) (1 + scale) + shift      one kernel, which also adds the previous block's gate * ffn to h
    pre [R, W]  = u W_1^T;  y = SiLU(pre);  ffn [R, W] = y W_2^T

Saved a block: mod, pre, ffn and two floats a row; h only for the final layer: backward has gate and ffn at hand
and subtracts them again (``configs.rebuild_hidden``; the error is a rounding of the stream a block, as forward's is).
With one modulation a row (group = 1) u overwrites the shift inside ``mod``: backward needs u and not the shift, so it
costs no memory. y is recomputed beside SiLU'(pre).

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
from ear_kernels.ops.silu_ffn import configs

SAVED_PER_BLOCK = 7
"""Tensors forward saves a block: h (empty for the first: it is the input), mod, u (empty for group = 1), pre, ffn,
mean, rstd. The final layer saves h, mod, u, mean, rstd."""

SAVED_FINAL = 5


def _split(parameters: list[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
    *blocks, final = (
        list(parameters[start : start + BLOCK_PARAMETERS]) for start in range(0, len(parameters), BLOCK_PARAMETERS)
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
    rebuild: bool,
) -> list[Tensor]:
    """[out ``[R, D]``, then with ``save`` the saved tensors]. Everything but the norms' parameters has one dtype."""
    blocks, final = _split(parameters)
    entries, width = conditioning.shape
    rows = entries * group
    hidden = adaln.as_rows(hidden)
    activated = ffn_ops.silu(conditioning.contiguous())
    saved: list[Tensor] = []
    pending: tuple[Tensor, Tensor] | None = None

    def normalise(
        mod: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, factor: float, final_layer: bool = False
    ) -> Tensor:
        """u of a block; adds the pending gate * ffn to ``hidden`` first. Appends what backward needs."""
        nonlocal hidden, pending, index
        shift, scale = mod[:, :width], mod[:, width : 2 * width]
        u = shift if group == 1 else hidden.new_empty((rows, width))
        stats = (mod.new_empty(rows, dtype=torch.float32), mod.new_empty(rows, dtype=torch.float32)) if save else None
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
            # The first layer's input is an argument; a rebuilt one needs only the last.
            keep = bool(saved) and (not rebuild or final_layer)
            stored = hidden if keep else hidden.new_empty(0)
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
    u = normalise(ffn_ops.linear(activated, weight_mod, bias_mod), None, None, 1.0, final_layer=True)
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
    rebuild: bool,
) -> list[Tensor]:
    depth = len(parameters) // BLOCK_PARAMETERS
    entries, width = conditioning.shape
    rows = entries * group

    def new(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return hidden.new_empty(shape, dtype=dtype or hidden.dtype)

    out = [new(rows, parameters[-2].shape[0])]
    for layer in range(depth + 1 if save else 0):
        stored = layer == depth or (layer > 0 and not rebuild)
        out += [new(rows, width) if stored else new(0), new(entries, (3 if layer < depth else 2) * width)]
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


class _Gradients:
    """Parameter gradients, summed over chunks of rows in float32."""

    def __init__(self, dtypes: list[torch.dtype]) -> None:
        self.dtypes = [as_dtype(dtype) for dtype in dtypes]
        self.sums: list[Tensor | None] = [None] * len(dtypes)

    def add(self, layer: int, slot: int, value: Tensor, last: bool) -> None:
        position = layer * BLOCK_PARAMETERS + slot
        before = self.sums[position]
        if before is not None:
            value = before.add_(value)
        elif not last:
            value = value.float()
        # A copy if it is a row of the kernel's sums: outputs of an operation must not share memory.
        self.sums[position] = value.to(self.dtypes[position]) if last else value

    def add_column(self, layer: int, slot: int, value: Tensor, last: bool) -> None:
        self.add(layer, slot, value.clone(), last)

    def add_weight(self, layer: int, slot: int, grad: Tensor, x: Tensor, last: bool, first: bool) -> None:
        """``grad^T @ x``; in one chunk straight into the parameter's dtype, else into a float32 sum."""
        dtype = self.dtypes[layer * BLOCK_PARAMETERS + slot] if first and last else torch.float32
        self.add(layer, slot, weight_gradient(grad, x, dtype), last)


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
    """[gradient of hidden, of conditioning, of each parameter (in its ``dtypes`` entry)].

    Rows are independent, so they are taken ``configs.backward_rows`` at a time: what backward needs beside the
    saved tensors (about ten tensors of the rows) then is that of one chunk.
    """
    entries, width = conditioning.shape
    rows = entries * group
    hidden = adaln.as_rows(hidden)
    grad_out = adaln.as_rows(grad_out)
    samples = rows // hidden.shape[0] if index is not None and inverse is None and rows else 1
    most = configs.backward_rows or max(rows, 1)
    # Whole tokens in a chunk: their samples' gradients are summed chunk by chunk.
    step = max(1, max(most, samples) // (samples * group)) * samples if group == 1 else max(1, most // group)
    gradients = _Gradients(dtypes)
    grad_conditioning = conditioning.new_empty((entries, width))
    grad_tokens = hidden.new_empty(hidden.shape)
    grad_rows = hidden.new_empty((rows, width)) if inverse is not None else None
    starts = range(0, max(entries, 1), step)
    for start in starts:
        stop = min(start + step, entries)
        first_row, last_row = start * group, stop * group
        chunk = last_row - first_row
        tokens = slice(first_row // samples, last_row // samples)
        if grad_rows is not None:
            into = grad_rows[first_row:last_row]
        elif index is None:
            into = grad_tokens[tokens]
        else:
            into = hidden.new_empty((chunk, width))
        _backward_chunk(
            grad_out[first_row:last_row],
            hidden if index is not None else hidden[first_row:last_row],
            conditioning[start:stop],
            parameters,
            [tensor[start:stop] if tensor.shape[0] == entries else tensor[first_row:last_row] for tensor in saved],
            index[first_row:last_row] if index is not None else None,
            group,
            into,
            grad_conditioning[start:stop],
            gradients,
            first=start == 0,
            last=stop == entries,
        )
        if index is not None and grad_rows is None:
            torch.sum(into.view(-1, samples, width), 1, out=grad_tokens[tokens])
    if grad_rows is not None and inverse is not None:
        if rows:
            torch.sum(grad_rows[inverse].view(hidden.shape[0], -1, width), 1, out=grad_tokens)
        else:
            grad_tokens.zero_()
    done = [gradient for gradient in gradients.sums if gradient is not None]
    assert len(done) == len(parameters)
    return [grad_tokens, grad_conditioning, *done]


def _backward_chunk(
    grad_out: Tensor,
    hidden: Tensor,
    conditioning: Tensor,
    parameters: list[Tensor],
    saved: list[Tensor],
    index: Tensor | None,
    group: int,
    grad_hidden: Tensor,
    grad_conditioning: Tensor,
    gradients: _Gradients,
    *,
    first: bool,
    last: bool,
) -> None:
    """Backward of some rows; writes ``grad_hidden [rows, W]`` and ``grad_conditioning``, adds to ``gradients``."""
    blocks, final = _split(parameters)
    depth = len(blocks)
    entries, width = conditioning.shape
    rows = entries * group
    compute = conditioning.dtype
    activated = ffn_ops.silu(conditioning.contiguous())
    layers = [saved[SAVED_PER_BLOCK * i : SAVED_PER_BLOCK * (i + 1)] for i in range(depth + 1)]

    def new_mod(count: int) -> Tensor:
        return hidden.new_empty((entries, count * width), dtype=compute)

    grad_ffn = sum_gate = sum_ffn = rebuilt = grad_residual = None
    grad_mod = new_mod(2)
    grad_activated: Tensor | None = None
    for layer in reversed(range(depth + 1)):
        h, mod, u, mean, rstd, *ffn_saved = layers[layer]
        if layer == 0:
            h = hidden
        elif rebuilt is not None:
            h = rebuilt
        if group == 1:
            u = mod[:, :width]
        scale = mod[:, width : 2 * width]
        if layer == depth:
            norm_weight = norm_bias = None
            inner, into = grad_out, final[2]
            gradients.add_weight(layer, 2, grad_out, u, last, first)
            gradients.add(layer, 3, grad_out.sum(0, dtype=torch.float32), last)
        else:
            norm_weight, norm_bias, weight_in, _, weight_out, _, _, _ = blocks[layer]
            assert grad_ffn is not None
            assert sum_ffn is not None
            inner, active, sum_pre = ffn_ops.silu_linear_backward(grad_ffn, weight_out, ffn_saved[0])
            gradients.add_weight(layer, 4, grad_ffn, active, last, first)
            gradients.add_column(layer, 5, sum_ffn, last)
            gradients.add_weight(layer, 2, inner, u, last, first)
            gradients.add_column(layer, 3, sum_pre, last)
            into = weight_in
            del active
        # For one modulation a row the shift's gradient is du itself: let the GEMM write it there.
        grad_u = torch.mm(inner, into, out=grad_mod[:, :width]) if group == 1 else torch.mm(inner, into)
        del inner
        previous = previous_hidden = None
        grad_mod_before = grad_mod
        if layer > 0:
            before = layers[layer - 1]
            grad_mod_before = new_mod(3)
            if grad_ffn is None:
                grad_ffn = hidden.new_empty((rows, width))
            previous = (before[6], before[1][:, 2 * width :], grad_ffn, grad_mod_before[:, 2 * width :])
            if layer > 1 and before[0].numel() == 0:
                rebuilt = hidden.new_empty((rows, width)) if rebuilt is None else rebuilt
                previous_hidden = rebuilt
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
            previous_hidden=previous_hidden,
        )
        grad_residual = grad_hidden
        del grad_u
        if layer < depth:
            gradients.add_column(layer, 0, sums[0], last)
            gradients.add_column(layer, 1, sums[1], last)
            sums = sums[2:]
        mod_sums = (sums[0], sums[1]) if sum_gate is None else (sums[0], sums[1], sum_gate)
        slot = 0 if layer == depth else 6
        gradients.add(layer, slot + 1, torch.cat(mod_sums), last)
        if previous is not None:
            sum_gate, sum_ffn = sums[2], sums[3]
        gradients.add_weight(layer, slot, grad_mod, activated, last, first)
        weight_mod = final[0] if layer == depth else blocks[layer][6]
        if grad_activated is None:
            grad_activated = torch.mm(grad_mod, weight_mod)
        else:
            grad_activated.addmm_(grad_mod, weight_mod)
        grad_mod = grad_mod_before
    assert grad_activated is not None
    ffn_ops.silu_backward(grad_activated, adaln.as_rows(conditioning), grad_pre=grad_conditioning)


# torch 2.11 hands the entries of a ScalarType[] argument to fakes and kernels as c10::ScalarType codes, later ones as
# dtypes (a single ScalarType comes as a dtype in both).
_SCALAR_TYPES = {5: torch.float16, 6: torch.float32, 7: torch.float64, 15: torch.bfloat16}


def as_dtype(dtype: torch.dtype | int) -> torch.dtype:
    """The dtype of an entry of a ScalarType[] argument."""
    return _SCALAR_TYPES[dtype] if isinstance(dtype, int) else dtype


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
        parameter.new_empty(parameter.shape, dtype=as_dtype(dtype))
        for parameter, dtype in zip(parameters, dtypes, strict=True)
    ]


LIBRARY = torch.library.Library("ear_kernels", "FRAGMENT")
LIBRARY.define(
    "generator_blocks_fwd(Tensor hidden, Tensor conditioning, Tensor[] parameters, Tensor? index, int group, "
    "float temperature, float eps, bool save, bool rebuild) -> Tensor[]"
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
        out, *saved = run(hidden, conditioning, cast, index, group, temperature, eps, save, configs.rebuild_hidden)
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
        return GeneratorBlocks.apply(hidden, conditioning, index, inverse, group, temperature, eps, *parameters)
