"""Forward and backward of the whole generator as sequences of launches: what is saved, recomputed and in place.

Legend: T tokens, R rows = tokens x samples, E conditioning vectors, R = E * group, W width, D size of a token,
s = SiLU(c). Forward, a block:

    mod [E, 3W] = s W_m^T            cuBLAS
    u   [R, W]  = LN(h) (1 + scale) + shift      one kernel, which also adds the previous block's gate * ffn to h
    pre [R, W]  = u W_1^T;  y = SiLU(pre);  ffn [R, W] = y W_2^T

Saved a block: mod, pre, ffn and two floats a row; h only for the final layer: backward has gate and ffn at hand
and subtracts them again (the error is a rounding of the stream a block, as forward's is). With one modulation a row
(group = 1) u overwrites the shift inside ``mod``: backward needs u and not the shift, so it costs no memory. y is
recomputed beside SiLU'(pre).

The final layer's shift never exists for group = 1: ``(v + s W_s^T) W_l^T = v W_l^T + s (W_l W_s)^T`` with
v = LN(h) (1 + scale) and a product ``W_l W_s [D, W]`` of weights, which replaces a GEMM of R rows. v and s lie beside
each other in one ``[R, 2W]``, so that this is one GEMM.

Backward, a block, from g = dL/dh' and df = g * gate (written by the kernel of the block after):

    da  = (df W_2) SiLU'(pre), and y again
    du  = da W_1, which for group = 1 is the shift's gradient too
    one kernel: LN and modulation backward, + g, then the gate and residual of the block before: df, dgate
    ds += dmod W_m, accumulated by the GEMM itself (beta = 1)

With ``reuse`` every gradient of the size of a saved tensor overwrites the saved tensor it is computed from (du,
dscale, dgate those in ``mod``; y pre; df ffn; the rebuilt h the last one): half of what backward needs beside them.
"""

import torch
from torch import Tensor

from ear_kernels.ops.adaln import autograd as adaln
from ear_kernels.ops.generator.reference import BLOCK_PARAMETERS
from ear_kernels.ops.silu_ffn import autograd as ffn_ops
from ear_kernels.runtime.column_sums import column_sums
from ear_kernels.runtime.gemm import linear, weight_gradient
from ear_kernels.runtime.launching import dense_rows

SAVED_PER_BLOCK = 6
"""Tensors forward saves a block: mod, u (empty for group = 1), pre, ffn, mean, rstd."""

COMBINE_ROWS = 8192
"""Forward alone computes ``W_l W_s`` from this many rows on (:mod:`inference`)."""

SAVED_FINAL = 5
"""Tensors forward saves after the blocks: the final h, the norm's mean and rstd, and for group = 1 the scale and
``[v | s]`` (else mod ``[E, 2W]`` and u)."""


def split(parameters: list[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Parameters of each block, and of the final layer."""
    *blocks, final = (
        list(parameters[start : start + BLOCK_PARAMETERS]) for start in range(0, len(parameters), BLOCK_PARAMETERS)
    )
    return blocks, final


def output_weights(final: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """``[W_l | W_l W_s]`` ``[D, 2W]`` and its bias ``[D]``, in the final layer's dtype, products in float32."""
    weight_mod, bias_mod, weight_last, bias_last = final
    last = weight_last.float()
    product = last @ weight_mod[:width].float()
    bias = bias_last.float() + last @ bias_mod[:width].float()
    return torch.cat([weight_last, product.to(weight_last.dtype)], 1), bias.to(bias_last.dtype)


def forward(
    hidden: Tensor,
    conditioning: Tensor,
    parameters: list[Tensor],
    index: Tensor | None,
    group: int,
    temperature: float,
    eps: float,
    save: bool,
) -> list[Tensor]:
    """[out ``[R, D]``, then with ``save`` the saved tensors]. Everything but the norms' parameters has one dtype.

    Without ``save`` and with group = 1, :mod:`inference` does the same faster.
    """
    blocks, final = split(parameters)
    entries, width = conditioning.shape
    rows = entries * group
    hidden = dense_rows(hidden)
    wide = conditioning.new_empty((entries, 2 * width)) if group == 1 else None
    activated = ffn_ops.silu(conditioning.contiguous(), wide[:, width:] if wide is not None else None)
    saved: list[Tensor] = []
    pending: tuple[Tensor, Tensor] | None = None

    def normalise(
        shift: Tensor | None, scale: Tensor, norm: list[Tensor] | None, factor: float, u: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write u; add the pending gate * ffn to ``hidden`` first. Returns the norm's statistics."""
        nonlocal hidden, pending, index
        stats = (scale.new_empty(rows, dtype=torch.float32), scale.new_empty(rows, dtype=torch.float32))
        residual = (*pending, hidden.new_empty((rows, width))) if pending is not None else None
        adaln.launch_forward(
            hidden,
            shift,
            scale,
            norm[0] if norm else None,
            norm[1] if norm else None,
            u,
            stats if save else None,
            group=group,
            eps=eps,
            temperature=factor,
            index=index,
            residual=residual,
            unit_rows=group,
        )
        if residual is not None:
            hidden, index, pending = residual[2], None, None
        return stats

    for norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, weight_mod, bias_mod in blocks:
        mod = linear(activated, weight_mod, bias_mod)
        shift, scale, gate = mod[:, :width], mod[:, width : 2 * width], mod[:, 2 * width :]
        u = shift if group == 1 else hidden.new_empty((rows, width))
        stats = normalise(shift, scale, [norm_weight, norm_bias], temperature, u)
        pre, active = ffn_ops.silu_linear(u, weight_in, bias_in, save)
        fused = None
        if group == 1 and index is None:
            fused = ffn_ops.gated_linear(active, weight_out, bias_out, hidden, gate, save)
        if fused is not None:
            hidden, ffn = fused
        else:
            ffn = linear(active, weight_out, bias_out)
            pending = (ffn, gate)
        if save:
            assert pre is not None
            assert ffn is not None
            saved.extend((mod, hidden.new_empty(0) if group == 1 else u, pre, ffn, *stats))
        del u, active, pre, mod
    if wide is not None:
        scale = linear(activated, final[0][width:], final[1][width:])
        stats = normalise(None, scale, None, 1.0, wide[:, :width])
        weight, bias = output_weights(final, width)
        out = linear(wide, weight, bias)
        saved += [hidden, *stats, scale, wide] if save else []
    else:
        mod = linear(activated, final[0], final[1])
        u = hidden.new_empty((rows, width))
        stats = normalise(mod[:, :width], mod[:, width:], None, 1.0, u)
        out = linear(u, final[2], final[3])
        saved += [hidden, *stats, mod, u] if save else []
    return [out, *saved]


def backward(
    grad_out: Tensor,
    hidden: Tensor,
    conditioning: Tensor,
    parameters: list[Tensor],
    saved: list[Tensor],
    index: Tensor | None,
    inverse: Tensor | None,
    group: int,
    dtypes: list[torch.dtype],
    reuse: bool,
) -> list[Tensor]:
    """[gradient of hidden, of conditioning, of each parameter (in its ``dtypes`` entry)].

    ``reuse`` writes into ``saved`` (see above).
    """
    blocks, final = split(parameters)
    depth = len(blocks)
    entries, width = conditioning.shape
    rows = entries * group
    hidden = dense_rows(hidden)
    grad_out = dense_rows(grad_out)
    gradients: list[Tensor | None] = [None] * len(parameters)

    def put(layer: int, slot: int, value: Tensor | None) -> None:
        assert value is not None
        position = layer * BLOCK_PARAMETERS + slot
        # Rows of one kernel's sums share memory, which outputs of a library operation (``reuse`` is off) must not.
        gradients[position] = value.to(dtypes[position], copy=not reuse)

    def put_weight(layer: int, slot: int, grad: Tensor, x: Tensor) -> None:
        """``grad^T @ x``."""
        position = layer * BLOCK_PARAMETERS + slot
        gradients[position] = weight_gradient(grad, x, dtypes[position])

    def like(tensor: Tensor) -> Tensor:
        return tensor if reuse else torch.empty_like(tensor)

    layers = [saved[SAVED_PER_BLOCK * i : SAVED_PER_BLOCK * (i + 1)] for i in range(depth)]
    last_hidden, mean, rstd, scale, wide = saved[SAVED_PER_BLOCK * depth :]

    # The final layer.
    weight_mod, bias_mod, weight_last, _ = final
    last, sum_out = weight_last.float(), column_sums(grad_out)
    put(depth, 3, sum_out)
    if group == 1:
        activated = wide[:, width:]
        both = weight_gradient(grad_out, wide, torch.float32)
        product = both[:, width:]
        shift_weight, shift_bias = weight_mod[:width].float(), bias_mod[:width].float()
        put(depth, 2, both[:, :width] + product @ shift_weight.t() + torch.outer(sum_out, shift_bias))
        grad_shift_weight, grad_shift_bias = last.t() @ product, sum_out @ last
        grad_u = torch.mm(grad_out, weight_last, out=wide[:, :width] if reuse else None)
        grad_activated = torch.mm(grad_out, output_weights(final, width)[0][:, width:])
        grad_mod = grad_scale = like(scale)
    else:
        activated = ffn_ops.silu(conditioning.contiguous())
        scale, u = scale[:, width:], wide
        put_weight(depth, 2, grad_out, u)
        grad_u = torch.mm(grad_out, weight_last)
        grad_mod = hidden.new_empty((entries, 2 * width))
        grad_scale = grad_mod[:, width:]

    sums, norm, h, stats = adaln.ColumnSums(), None, last_hidden, (mean, rstd)
    grad_hidden: Tensor | None = None
    first_hidden = hidden.new_empty((rows, width)) if index is not None else hidden.new_empty(hidden.shape)
    buffer = like(last_hidden) if depth > 1 else None
    for layer in reversed(range(depth + 1)):
        # grad_u, scale, h, their statistics and where dscale goes are those of ``layer``; now into the block before.
        previous = previous_hidden = next_mod = None
        if layer > 0:
            mod, u_before, pre, ffn, *stats_before = layers[layer - 1]
            gate = mod[:, 2 * width :]
            next_mod = like(mod) if group == 1 else torch.empty_like(mod)
            grad_ffn = like(ffn)
            previous = (ffn, gate, grad_ffn, next_mod[:, 2 * width :])
            previous_hidden = buffer if layer > 1 else None
        sum_gate = sums.gate
        into = first_hidden if grad_hidden is None else grad_hidden
        sums = adaln.launch_backward(
            grad_u,
            h,
            scale,
            norm[0] if norm else None,
            norm[1] if norm else None,
            stats,
            into,
            None if group == 1 else grad_mod[:, :width],
            grad_scale,
            group=group,
            index=index if layer == 0 else None,
            grad_residual=grad_hidden,
            previous=previous,
            sum_affine=norm is not None,
            sum_ffn=previous is not None,
            sum_modulation=group == 1,
            unit_rows=group,
            previous_hidden=previous_hidden,
        )
        grad_hidden = into
        if norm is not None:
            put(layer, 0, sums.weight)
            put(layer, 1, sums.bias)
        slot = 0 if layer == depth else 6
        weight_mod = final[0] if layer == depth else blocks[layer][6]
        if group > 1:
            bias_sum = column_sums(grad_mod)
        elif layer == depth:
            assert sums.scale is not None
            bias_sum = torch.cat((grad_shift_bias, sums.scale))
        else:
            assert sums.shift is not None
            assert sums.scale is not None
            assert sum_gate is not None
            bias_sum = torch.cat((sums.shift, sums.scale, sum_gate))
        put(layer, slot + 1, bias_sum)
        if layer == depth and group == 1:
            grad_scale_weight = weight_gradient(grad_mod, activated, torch.float32)
            put(layer, slot, torch.cat((grad_shift_weight, grad_scale_weight)))
            grad_activated.addmm_(grad_mod, weight_mod[width:])
        else:
            put_weight(layer, slot, grad_mod, activated)
            if layer == depth:
                grad_activated = torch.mm(grad_mod, weight_mod)
            else:
                grad_activated.addmm_(grad_mod, weight_mod)
        if layer == 0:
            break

        # Through the FFN of the block before.
        assert next_mod is not None
        norm_weight, norm_bias, weight_in, _, weight_out, _, _, _ = blocks[layer - 1]
        inner, active, sum_pre = ffn_ops.silu_linear_backward(grad_ffn, weight_out, pre, pre if reuse else None)
        put_weight(layer - 1, 4, grad_ffn, active)
        put(layer - 1, 5, sums.ffn)
        u = mod[:, :width] if group == 1 else u_before
        put_weight(layer - 1, 2, inner, u)
        put(layer - 1, 3, sum_pre)
        # For one modulation a row the shift's gradient is du itself: let the GEMM write it there.
        out = next_mod[:, :width] if group == 1 else None
        grad_u = torch.mm(inner, weight_in, out=out)
        del inner, active
        scale, norm, stats = mod[:, width : 2 * width], [norm_weight, norm_bias], (stats_before[0], stats_before[1])
        grad_mod, grad_scale = next_mod, next_mod[:, width : 2 * width]
        h = previous_hidden if previous_hidden is not None else hidden

    grad_conditioning = conditioning.new_empty((entries, width))
    ffn_ops.silu_backward(grad_activated, dense_rows(conditioning), grad_pre=grad_conditioning)
    grad_tokens = _sum_samples(grad_hidden, hidden, index, inverse)
    done = [gradient for gradient in gradients if gradient is not None]
    assert len(done) == len(parameters)
    return [grad_tokens, grad_conditioning, *done]


def _sum_samples(grad_rows: Tensor | None, hidden: Tensor, index: Tensor | None, inverse: Tensor | None) -> Tensor:
    """The gradient of ``hidden [T, W]`` from that of its rows."""
    assert grad_rows is not None
    if index is None:
        return grad_rows
    if not grad_rows.numel():
        return torch.zeros_like(hidden)
    if inverse is not None:
        grad_rows = grad_rows[inverse]
    return grad_rows.view(hidden.shape[0], -1, hidden.shape[1]).sum(1)
