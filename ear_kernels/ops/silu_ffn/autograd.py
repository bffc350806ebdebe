"""Launchers, library registration and autograd of the SiLU network with its gated residual.

Each GEMM is either one Triton kernel with an epilogue or cuBLAS and a pointwise kernel, as ``configs.plan`` says.
Weight gradients are cuBLAS: with 32 output tiles for 132 SMs there is nothing to win. Importing this imports Triton.
"""

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ear_kernels.ops.adaln.autograd import modulation_rows, units_of
from ear_kernels.ops.generator import kernels_ffn as kernels
from ear_kernels.ops.silu_ffn import configs
from ear_kernels.ops.silu_ffn.configs import GemmConfig
from ear_kernels.runtime.autograd import refuse_double_backward
from ear_kernels.runtime.column_sums import column_sums
from ear_kernels.runtime.gemm import linear
from ear_kernels.runtime.launching import (
    dense_rows,
    dependent_launch,
    next_power_of_two,
    processor,
    row_grid,
    row_warps,
)

_EPILOGUE_NUMBERS = {"silu": 1, "gate": 2, "dsilu": 3}
_SILU_BLOCK = 4096

POINTWISE_PROGRAMS = 1056
"""Programs of a pointwise backward: 8 for each of an H200's SMs; a constant for the sake of the order of its sums."""

POINTWISE_STAGES = 2


def launch_linear(
    config: GemmConfig,
    epilogue: str,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    bias: Tensor | None = None,
    extra: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    dependent: bool = False,
) -> Tensor | None:
    """One Triton GEMM with an epilogue; writes ``out`` (and ``extra``) of shape ``[R, N]``.

    ``b`` is ``[N, K]`` except for "dsilu", where it is the forward weight ``[K, N]`` as it is. For "dsilu",
    ``residual`` is the pre-activation and the return value its gradient's column sums ``[N]`` (float32).
    ``dependent``: see :func:`ear_kernels.runtime.launching.dependent_launch`.
    """
    rows, n = out.shape
    k = a.shape[1]
    half = config.bn // config.split
    transposed = epilogue != "dsilu"
    tiles_m, tiles_n = -(-rows // config.bm), -(-n // config.bn)
    partials = a.new_empty((tiles_m, n), dtype=torch.float32) if epilogue == "dsilu" else None

    def described(tensor: Tensor | None, width: int) -> TensorDescriptor | None:
        return None if tensor is None else TensorDescriptor.from_tensor(tensor, [config.bm, width])

    kernels.linear_kernel[(min(tiles_m * tiles_n, processor(a).count * config.per_sm),)](
        described(a, config.bk),
        TensorDescriptor.from_tensor(b, [config.bn, config.bk] if transposed else [config.bk, config.bn]),
        bias,
        described(extra, half),
        described(residual, half),
        described(gate, half),
        described(out, half),
        partials,
        rows,
        n,
        k,
        EPILOGUE=_EPILOGUE_NUMBERS[epilogue],
        HAS_BIAS=bias is not None,
        STORE_EXTRA=extra is not None,
        B_TRANSPOSED=transposed,
        BM=config.bm,
        BN=config.bn,
        BK=config.bk,
        GROUP_M=config.group_m,
        SPLIT=config.split,
        FLATTEN=config.flatten,
        DEPENDENT=dependent,
        num_stages=config.stages,
        num_warps=config.warps,
        **dependent_launch(dependent),
    )
    return column_sums(partials) if partials is not None else None


def silu(pre: Tensor, out: Tensor | None = None) -> Tensor:
    """SiLU of a contiguous ``[R, W]``, into ``out`` (dense rows) if given."""
    out = torch.empty_like(pre) if out is None else out
    if pre.numel():
        grid = (-(-pre.numel() // _SILU_BLOCK),)
        kernels.silu_fwd_kernel[grid](
            pre, out, pre.numel(), out.stride(0), WIDTH=pre.shape[1], BLOCK=_SILU_BLOCK, num_warps=8
        )
    return out


def silu_backward(
    grad_out: Tensor, pre: Tensor, active: Tensor | None = None, grad_pre: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(``grad_out * SiLU'(pre)``, its column sums in float32); ``active`` receives SiLU(pre).

    ``grad_pre`` may be ``grad_out``.
    """
    rows, width = pre.shape
    if grad_pre is None:
        grad_pre = pre.new_empty((rows, width))
    if rows == 0:
        return grad_pre, pre.new_zeros((width,), dtype=torch.float32)
    programs, rows_per_program = row_grid(rows, POINTWISE_PROGRAMS)
    partials = pre.new_empty((programs, width), dtype=torch.float32)
    into = active if active is not None else grad_pre
    kernels.silu_bwd_kernel[(programs,)](
        grad_out,
        pre,
        grad_pre,
        into,
        partials,
        rows,
        rows_per_program,
        grad_out.stride(0),
        pre.stride(0),
        grad_pre.stride(0),
        into.stride(0),
        WIDTH=width,
        BLOCK=next_power_of_two(width),
        STORE_ACTIVE=active is not None,
        STAGES=POINTWISE_STAGES,
        num_warps=row_warps(width),
    )
    return grad_pre, column_sums(partials)


def gate_residual(hidden: Tensor, ffn: Tensor, gate: Tensor, group: int) -> Tensor:
    """``hidden + gate * ffn`` for ``hidden, ffn [R, W]`` and ``gate [R / group, W]``."""
    rows, width = hidden.shape
    out = hidden.new_empty((rows, width))
    if rows == 0:
        return out
    chunks, unit_rows = units_of(group)
    kernels.gate_fwd_kernel[(rows // group * chunks,)](
        hidden,
        ffn,
        gate,
        out,
        group,
        chunks,
        unit_rows,
        hidden.stride(0),
        ffn.stride(0),
        gate.stride(0),
        out.stride(0),
        WIDTH=width,
        BLOCK=next_power_of_two(width),
        num_warps=row_warps(width),
    )
    return out


def gate_backward(
    grad_out: Tensor, ffn: Tensor, gate: Tensor, grad_ffn: Tensor, grad_gate: Tensor, group: int
) -> Tensor:
    """Write the gradients of ``gate * ffn``; ``grad_gate`` is ``[R / group * chunks, W]``.

    Returns the column sums of ``grad_ffn``.
    """
    rows, width = grad_out.shape
    if rows == 0:
        return grad_out.new_zeros((width,), dtype=torch.float32)
    chunks, unit_rows = units_of(group)
    units = rows // group * chunks
    programs, units_per_program = row_grid(units, POINTWISE_PROGRAMS)
    partials = grad_out.new_empty((programs, width), dtype=torch.float32)
    kernels.gate_bwd_kernel[(programs,)](
        grad_out,
        ffn,
        gate,
        grad_ffn,
        grad_gate,
        partials,
        group,
        chunks,
        unit_rows,
        units,
        units_per_program,
        grad_out.stride(0),
        ffn.stride(0),
        gate.stride(0),
        grad_ffn.stride(0),
        grad_gate.stride(0),
        WIDTH=width,
        BLOCK=next_power_of_two(width),
        num_warps=row_warps(width),
    )
    return column_sums(partials)


def silu_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, save: bool, dependent: bool = False
) -> tuple[Tensor | None, Tensor]:
    """(pre-activation or None, SiLU(pre-activation)) of ``x @ weight^T + bias``; both ``[R, N]``."""
    rows, n = x.shape[0], weight.shape[0]
    config = configs.plan("silu", rows, n, x, weight, save=save) if n * x.element_size() % 16 == 0 else None
    if config is None:
        pre = linear(x, weight, bias)
        return (pre, silu(pre)) if save else (None, silu(pre, pre))
    active = x.new_empty((rows, n))
    saved = x.new_empty((rows, n)) if save else None
    launch_linear(config, "silu", x, weight, active, bias=bias, extra=saved, dependent=dependent)
    return saved, active


def gated_linear(
    active: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden: Tensor,
    gate: Tensor,
    save: bool,
    dependent: bool = False,
) -> tuple[Tensor, Tensor | None] | None:
    """(``hidden + gate * f``, f or None), ``f = active @ weight^T + bias``, in one kernel.

    None where that does not pay. One gate per row, all matrices ``[R, .]``.
    """
    config = configs.plan("gate", *hidden.shape, active, weight, hidden, gate, save=save)
    if config is None:
        return None
    out = hidden.new_empty(hidden.shape)
    ffn = hidden.new_empty(hidden.shape) if save else None
    launch_linear(
        config, "gate", active, weight, out, bias=bias, extra=ffn, residual=hidden, gate=gate, dependent=dependent
    )
    return out, ffn


def silu_linear_backward(
    grad_ffn: Tensor, weight_out: Tensor, pre: Tensor, active: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Back through ``SiLU(pre) @ weight_out^T``: (gradient of pre, SiLU(pre), column sums of the gradient).

    SiLU(pre) goes into ``active`` if given, which may be ``pre``.
    """
    config = configs.plan("dsilu", *pre.shape, grad_ffn, weight_out, pre, save=True)
    if active is None or config is not None:
        active = pre.new_empty(pre.shape)
    if config is None:
        grad = torch.mm(grad_ffn, weight_out)
        grad, sums = silu_backward(grad, pre, active, grad_pre=grad)
        return grad, active, sums
    grad = pre.new_empty(pre.shape)
    tile_sums = launch_linear(config, "dsilu", grad_ffn, weight_out, grad, extra=active, residual=pre)
    assert tile_sums is not None
    return grad, active, tile_sums


def _forward(
    hidden: Tensor,
    modulated: Tensor,
    gate: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    group: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out ``[R, W]``, pre-activation ``[R, V]``, FFN output ``[R, W]``); the last two are empty without ``save``."""
    hidden, modulated, gate = dense_rows(hidden), dense_rows(modulated), dense_rows(gate)
    pre, active = silu_linear(modulated, weight_in, bias_in, save)
    fused = gated_linear(active, weight_out, bias_out, hidden, gate, save) if group == 1 else None
    if fused is not None:
        out, ffn = fused
    else:
        ffn = linear(active, weight_out, bias_out)
        out = gate_residual(hidden, ffn, gate, group)
    if not save or pre is None or ffn is None:
        pre, ffn = hidden.new_empty(0), hidden.new_empty(0)
    return out, pre, ffn


def _forward_fake(
    hidden: Tensor,
    modulated: Tensor,
    gate: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    group: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out = hidden.new_empty(hidden.shape)
    if not save:
        return out, hidden.new_empty(0), hidden.new_empty(0)
    return out, hidden.new_empty((hidden.shape[0], weight_in.shape[0])), hidden.new_empty(hidden.shape)


def _backward(
    grad_out: Tensor,
    modulated: Tensor,
    gate: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    pre: Tensor,
    ffn: Tensor,
    group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of modulated, gate, weight_in, bias_in (float32), weight_out, bias_out (float32)."""
    grad_out, gate, modulated = dense_rows(grad_out), dense_rows(gate), dense_rows(modulated)
    rows, width = grad_out.shape
    chunks, _ = units_of(group)
    entries = rows // group
    grad_ffn = grad_out.new_empty((rows, width))
    grad_gate = grad_out.new_empty((entries * chunks, width), dtype=torch.float32 if chunks > 1 else gate.dtype)
    grad_bias_out = gate_backward(grad_out, ffn, gate, grad_ffn, grad_gate, group)
    if chunks > 1:
        grad_gate = grad_gate.view(entries, chunks, width).sum(1).to(gate.dtype)
    grad_pre, active, grad_bias_in = silu_linear_backward(grad_ffn, weight_out, pre)
    return (
        torch.mm(grad_pre, weight_in),
        grad_gate,
        torch.mm(grad_pre.t(), modulated),
        grad_bias_in,
        torch.mm(grad_ffn.t(), active),
        grad_bias_out,
    )


def _backward_fake(
    grad_out: Tensor,
    modulated: Tensor,
    gate: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    pre: Tensor,
    ffn: Tensor,
    group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    columns = [
        modulated.new_empty((size,), dtype=torch.float32) for size in (weight_in.shape[0], weight_out.shape[0])
    ]
    return (
        modulated.new_empty(modulated.shape),
        gate.new_empty(gate.shape),
        weight_in.new_empty(weight_in.shape),
        columns[0],
        weight_out.new_empty(weight_out.shape),
        columns[1],
    )


LIBRARY = torch.library.Library("ear_kernels", "FRAGMENT")
LIBRARY.define(
    "gated_silu_ffn_fwd(Tensor hidden, Tensor modulated, Tensor gate, Tensor weight_in, Tensor? bias_in, "
    "Tensor weight_out, Tensor? bias_out, int group, bool save) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "gated_silu_ffn_bwd(Tensor grad_out, Tensor modulated, Tensor gate, Tensor weight_in, Tensor weight_out, "
    "Tensor pre, Tensor ffn, int group) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.impl("gated_silu_ffn_fwd", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("gated_silu_ffn_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("ear_kernels::gated_silu_ffn_fwd", _forward_fake, lib=LIBRARY)
torch.library.register_fake("ear_kernels::gated_silu_ffn_bwd", _backward_fake, lib=LIBRARY)


class GatedSiluFFN(torch.autograd.Function):
    """``hidden [R, W]``, ``modulated [R, U]``, ``gate [R / group, W]``, one dtype -> ``[R, W]``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        modulated: Tensor,
        gate: Tensor,
        weight_in: Tensor,
        bias_in: Tensor | None,
        weight_out: Tensor,
        bias_out: Tensor | None,
        group: int,
        save: bool,
    ) -> Tensor:
        run = torch.ops.ear_kernels.gated_silu_ffn_fwd if torch.compiler.is_compiling() else _forward
        out, pre, ffn = run(hidden, modulated, gate, weight_in, bias_in, weight_out, bias_out, group, save)
        ctx.save_for_backward(modulated, gate, weight_in, weight_out, pre, ffn)
        ctx.group, ctx.biases = group, (bias_in is not None, bias_out is not None)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("gated_silu_ffn")
        modulated, gate, weight_in, weight_out, pre, ffn = ctx.saved_tensors
        run = torch.ops.ear_kernels.gated_silu_ffn_bwd if torch.compiler.is_compiling() else _backward
        grad_modulated, grad_gate, grad_w_in, grad_b_in, grad_w_out, grad_b_out = run(
            grad_out, modulated, gate, weight_in, weight_out, pre, ffn, ctx.group
        )
        has_in, has_out = ctx.biases
        return (
            grad_out,
            grad_modulated,
            grad_gate,
            grad_w_in,
            grad_b_in.to(weight_in.dtype) if has_in else None,
            grad_w_out,
            grad_b_out.to(weight_out.dtype) if has_out else None,
            None,
            None,
        )


def gated_silu_ffn(
    hidden: Tensor,
    modulated: Tensor,
    gate: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """``hidden [..., W]``, ``modulated [..., U]``, gate broadcastable to hidden -> ``[..., W]`` in ``dtype``."""
    group, (gate_EW,) = modulation_rows(hidden, gate)
    tensors = (
        hidden.reshape(-1, hidden.shape[-1]),
        modulated.reshape(-1, modulated.shape[-1]),
        gate_EW,
        weight_in,
        bias_in,
        weight_out,
        bias_out,
    )
    cast = [tensor.to(dtype) if tensor is not None else None for tensor in tensors]
    # Autocast would cast nothing here (all is one dtype already) but would look at every GEMM inside.
    with torch.autocast(hidden.device.type, enabled=False):
        # Asked outside of the autograd function, in which gradients are always off.
        save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in cast)
        out = GatedSiluFFN.apply(*cast, group, save)
    return out.view(hidden.shape)
