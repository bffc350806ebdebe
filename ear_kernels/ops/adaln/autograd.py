"""Launchers, library registration and autograd of the LayerNorm + modulation kernels.

Importing this imports Triton; ``ear_kernels.functional`` does so at the first call that needs it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ear_kernels.ops.generator import kernels_adaln as kernels
from ear_kernels.runtime.autograd import refuse_double_backward
from ear_kernels.runtime.column_sums import column_sums
from ear_kernels.runtime.launching import (
    RowConfig,
    dense_rows,
    dependent_launch,
    next_power_of_two,
    row_grid,
    row_warps,
)

MAX_WIDTH = 8192
"""Widest row: one program holds a row and its column sums in registers."""


# Block of columns -> config. (One row a unit, runs of rows.) The fastest of 36 launches each on an H200
# (docs/performance_generator.md); two stages prefetch the next row.
# 2,048 lanes spill 24 bytes (ops/generator/shipped.py).
BACKWARD_ROWS: dict[int, tuple[RowConfig, RowConfig]] = {
    512: (RowConfig(2, 1, 528), RowConfig(2, 1, 528)),
    1024: (RowConfig(4, 2, 396), RowConfig(4, 2, 396)),
    2048: (RowConfig(4, 2, 264), RowConfig(4, 2, 264)),
    4096: (RowConfig(16, 1, 132), RowConfig(16, 1, 132)),
    8192: (RowConfig(16, 1, 132), RowConfig(16, 1, 132)),
}


def backward_config(width: int, group: int) -> RowConfig:
    """The static config of ``adaln_bwd_kernel`` for rows of ``width`` in runs of ``group``."""
    single, runs = BACKWARD_ROWS[max(512, next_power_of_two(width))]
    return single if group == 1 else runs


class ColumnSums(NamedTuple):
    """Sums over all rows, ``[W]`` float32 each; None where they were not asked for."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    ffn: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    gate: Tensor | None = None


UNIT_ROWS = 16
"""Most rows of one run (rows that share their modulation) that one unit of work takes."""


def units_of(group: int, unit_rows: int | None = None) -> tuple[int, int]:
    """(units a run, rows a unit) for runs of ``group`` rows; at most ``unit_rows`` (``UNIT_ROWS``) rows a
    unit."""
    unit_rows = min(group, UNIT_ROWS if unit_rows is None else unit_rows)
    return -(-group // unit_rows), unit_rows


def launch_forward(
    hidden: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    stats: tuple[Tensor, Tensor] | None,
    *,
    group: int,
    eps: float,
    temperature: float = 1.0,
    index: Tensor | None = None,
    residual: tuple[Tensor, Tensor, Tensor] | None = None,
    unit_rows: int | None = None,
    dependent: bool = False,
    followed: bool = False,
) -> None:
    """Write ``LN(hidden) * (1 + scale) + temperature * shift`` to ``out [R, W]`` and the row statistics to
    ``stats``.

    Every matrix has dense rows. ``shift`` (None: 0) and ``scale`` are ``[R / group, W]``. With
    ``residual = (ffn, gate, next_hidden)`` the rows are ``hidden + gate * ffn``, which is also written to
    ``next_hidden``. ``out`` may be ``shift``'s memory if ``group`` is 1: a program reads its shift before it writes.
    ``dependent``, ``followed`` by a dependent kernel: see :func:`ear_kernels.runtime.launching.dependent_launch`.
    """
    rows, width = out.shape
    if rows == 0:
        return
    chunks, unit_rows = units_of(group, unit_rows)
    ffn, gate, next_hidden = residual if residual is not None else (hidden, hidden, out)
    mean, rstd = stats if stats is not None else (out, out)
    kernels.adaln_fwd_kernel[(rows // group * chunks,)](
        hidden,
        index if index is not None else hidden,
        ffn,
        gate,
        shift if shift is not None else scale,
        scale,
        weight if weight is not None else hidden,
        bias if bias is not None else hidden,
        next_hidden,
        out,
        mean,
        rstd,
        rows,
        group,
        chunks,
        unit_rows,
        hidden.stride(0),
        ffn.stride(0),
        gate.stride(0),
        shift.stride(0) if shift is not None else 0,
        scale.stride(0),
        next_hidden.stride(0),
        out.stride(0),
        eps,
        temperature,
        WIDTH=width,
        BLOCK=next_power_of_two(width),
        HAS_INDEX=index is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_SHIFT=shift is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        SAVE_STATS=stats is not None,
        DEPENDENT=dependent,
        FOLLOWED=followed,
        num_warps=row_warps(width),
        **dependent_launch(dependent),
    )


def launch_backward(
    grad_out: Tensor,
    hidden: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: tuple[Tensor, Tensor],
    grad_hidden: Tensor,
    grad_shift: Tensor | None,
    grad_scale: Tensor,
    *,
    group: int,
    index: Tensor | None = None,
    grad_residual: Tensor | None = None,
    previous: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    sum_affine: bool,
    sum_ffn: bool = False,
    sum_modulation: bool = False,
    unit_rows: int | None = None,
    previous_hidden: Tensor | None = None,
) -> ColumnSums:
    """Backward of :func:`launch_forward`; writes into the given gradients and returns the column sums.

    ``previous = (ffn, gate, grad_ffn, grad_gate)`` continues through the gated residual of the block before.
    ``grad_shift``, ``grad_scale`` and ``grad_gate`` are ``[R / group * chunks, W]`` (``units_of(group)``):
    sum over the chunks where there are several. ``grad_hidden`` may be ``grad_residual``; with one chunk
    ``grad_scale`` may be ``scale``, ``grad_gate`` may be ``gate`` and ``grad_ffn`` ``ffn``; ``grad_shift`` is None
    where the caller keeps ``grad_out`` itself. ``previous_hidden`` receives ``hidden - gate * ffn`` and may be
    ``hidden``.

    ``sum_affine`` asks for the sums of the norm's weight and bias, ``sum_ffn`` for that of ``grad_ffn``,
    ``sum_modulation`` for those of shift, scale and, with ``previous``, gate.
    """
    rows, width = grad_out.shape
    names = ["weight", "bias"] if sum_affine else []
    names += ["ffn"] if sum_ffn else []
    names += ["shift", "scale"] if sum_modulation else []
    names += ["gate"] if sum_modulation and previous is not None else []
    sums = len(names)
    if rows == 0:
        return ColumnSums(**{name: grad_out.new_zeros(width, dtype=torch.float32) for name in names})
    chunks, unit_rows = units_of(group, unit_rows)
    units = rows // group * chunks
    config = backward_config(width, group)
    programs, units_per_program = row_grid(units, config.programs)
    partials = grad_out.new_empty((programs, max(sums, 1), width), dtype=torch.float32)
    ffn, gate, grad_ffn, grad_gate = previous if previous is not None else (hidden, scale, grad_hidden, grad_scale)
    residual = grad_residual if grad_residual is not None else grad_out
    rebuilt = previous_hidden if previous_hidden is not None else grad_hidden
    shift_out = grad_shift if grad_shift is not None else grad_scale
    kernels.adaln_bwd_kernel[(programs,)](
        grad_out,
        hidden,
        index if index is not None else hidden,
        scale,
        weight if weight is not None else hidden,
        bias if bias is not None else hidden,
        stats[0],
        stats[1],
        residual,
        ffn,
        gate,
        rebuilt,
        grad_hidden,
        shift_out,
        grad_scale,
        grad_ffn,
        grad_gate,
        partials,
        group,
        chunks,
        unit_rows,
        units,
        units_per_program,
        grad_out.stride(0),
        hidden.stride(0),
        scale.stride(0),
        residual.stride(0),
        ffn.stride(0),
        gate.stride(0),
        rebuilt.stride(0),
        grad_hidden.stride(0),
        shift_out.stride(0),
        grad_scale.stride(0),
        grad_ffn.stride(0),
        grad_gate.stride(0),
        WIDTH=width,
        BLOCK=next_power_of_two(width),
        HAS_INDEX=index is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=grad_residual is not None,
        HAS_PREVIOUS=previous is not None,
        REBUILD=previous_hidden is not None,
        STORE_SHIFT=grad_shift is not None,
        SINGLE=group == 1,
        SUM_AFFINE=sum_affine,
        SUM_FFN=sum_ffn,
        SUM_MODULATION=sum_modulation,
        SUMS=sums,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    return ColumnSums(**dict(zip(names, column_sums(partials).unbind(), strict=False)))


def _forward(
    hidden: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    group: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``hidden [R, W]``, ``shift, scale [R / group, W]`` -> modulated ``[R, W]`` in ``dtype``, mean and rstd
    ``[R]``."""
    hidden, shift, scale = dense_rows(hidden), dense_rows(shift), dense_rows(scale)
    out = hidden.new_empty(hidden.shape, dtype=dtype)
    mean, rstd = (hidden.new_empty(hidden.shape[:1], dtype=torch.float32) for _ in range(2))
    launch_forward(
        hidden,
        shift,
        scale,
        weight.contiguous() if weight is not None else None,
        bias.contiguous() if bias is not None else None,
        out,
        (mean, rstd),
        group=group,
        eps=eps,
    )
    return out, mean, rstd


def _forward_fake(
    hidden: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    group: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    stats = [hidden.new_empty(hidden.shape[:1], dtype=torch.float32) for _ in range(2)]
    return hidden.new_empty(hidden.shape, dtype=dtype), stats[0], stats[1]


def _backward(
    grad_out: Tensor,
    hidden: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, shift, scale (in their dtypes and shapes), weight and bias (``[W]``, float32)."""
    grad_out, hidden, scale = dense_rows(grad_out), dense_rows(hidden), dense_rows(scale)
    rows, width = hidden.shape
    entries = rows // group
    chunks, _ = units_of(group)
    grad_hidden = hidden.new_empty((rows, width))
    # Runs longer than a unit leave one float32 partial a unit, summed below in a fixed order.
    dtypes = (torch.float32,) * 2 if chunks > 1 else (shift.dtype, scale.dtype)
    grad_shift, grad_scale = (hidden.new_empty((entries * chunks, width), dtype=dtype) for dtype in dtypes)
    sums = launch_backward(
        grad_out,
        hidden,
        scale,
        weight.contiguous() if weight is not None else None,
        bias.contiguous() if bias is not None else None,
        (mean, rstd),
        grad_hidden,
        grad_shift,
        grad_scale,
        group=group,
        sum_affine=weight is not None or bias is not None,
    )
    if chunks > 1:
        grad_shift = grad_shift.view(entries, chunks, width).sum(1).to(shift.dtype)
        grad_scale = grad_scale.view(entries, chunks, width).sum(1).to(scale.dtype)
    if sums.weight is None or sums.bias is None:
        empty = [hidden.new_zeros((width,), dtype=torch.float32) for _ in range(2)]
        return grad_hidden, grad_shift, grad_scale, empty[0], empty[1]
    # Copies: outputs of an operation must not share memory.
    return grad_hidden, grad_shift, grad_scale, sums.weight.clone(), sums.bias.clone()


def _backward_fake(
    grad_out: Tensor,
    hidden: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    width = hidden.shape[-1]
    columns = [hidden.new_empty((width,), dtype=torch.float32) for _ in range(2)]
    return (
        hidden.new_empty(hidden.shape),
        shift.new_empty(shift.shape),
        scale.new_empty(scale.shape),
        columns[0],
        columns[1],
    )


LIBRARY = torch.library.Library("ear_kernels", "FRAGMENT")
LIBRARY.define(
    "adaln_fwd(Tensor hidden, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, int group, float eps, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define(
    "adaln_bwd(Tensor grad_out, Tensor hidden, Tensor shift, Tensor scale, Tensor? weight, Tensor? bias, "
    "Tensor mean, Tensor rstd, int group) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.impl("adaln_fwd", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("adaln_bwd", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("ear_kernels::adaln_fwd", _forward_fake, lib=LIBRARY)
torch.library.register_fake("ear_kernels::adaln_bwd", _backward_fake, lib=LIBRARY)


class AdaLNModulate(torch.autograd.Function):
    """``hidden [R, W]``, ``shift, scale [R / group, W]`` -> modulated rows ``[R, W]`` in ``dtype``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        shift: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        group: int,
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        # A library operation costs tens of microseconds a call; only a compiler needs it.
        run = torch.ops.ear_kernels.adaln_fwd if torch.compiler.is_compiling() else _forward
        out, mean, rstd = run(hidden, shift, scale, weight, bias, group, eps, dtype)
        ctx.save_for_backward(hidden, shift, scale, weight, bias, mean, rstd)
        ctx.group = group
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("adaln_modulate")
        hidden, shift, scale, weight, bias, mean, rstd = ctx.saved_tensors
        run = torch.ops.ear_kernels.adaln_bwd if torch.compiler.is_compiling() else _backward
        grad_hidden, grad_shift, grad_scale, grad_weight, grad_bias = run(
            grad_out, hidden, shift, scale, weight, bias, mean, rstd, ctx.group
        )
        return (
            grad_hidden,
            grad_shift,
            grad_scale,
            grad_weight.to(weight.dtype) if weight is not None else None,
            grad_bias.to(bias.dtype) if bias is not None else None,
            None,
            None,
            None,
        )


def broadcast_group(rows: tuple[int, ...], leading: tuple[int, ...]) -> int | None:
    """Rows per entry when ``leading`` (a broadcastable shape) holds one entry for a run of consecutive rows.

    None if the shapes broadcast in any other way, and then the caller must expand.
    """
    leading = (1,) * (len(rows) - len(leading)) + leading
    split = 0
    while split < len(rows) and leading[split] == rows[split]:
        split += 1
    if any(size != 1 for size in leading[split:]):
        return None
    group = 1
    for size in rows[split:]:
        group *= size
    return group


def modulation_rows(hidden: Tensor, *tensors: Tensor) -> tuple[int, list[Tensor]]:
    """(group, the tensors as ``[R / group, W]``) for tensors that broadcast to ``hidden [..., W]``."""
    rows = tuple(hidden.shape[:-1])
    width = hidden.shape[-1]
    groups = {
        broadcast_group(rows, tuple(tensor.shape[:-1])) if tensor.ndim and tensor.shape[-1] == width else None
        for tensor in tensors
    }
    group = groups.pop() if len(groups) == 1 else None
    if group is None or group == 0:
        return 1, [tensor.expand(hidden.shape).reshape(-1, width) for tensor in tensors]
    return group, [tensor.reshape(-1, width) for tensor in tensors]


def supported(hidden: Tensor, *tensors: Tensor | None) -> str | None:
    """Why the kernels cannot take these tensors, or None if they can."""
    for tensor in (hidden, *tensors):
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"dtype {tensor.dtype} (the kernels take float32, float16 and bfloat16)"
    if not 1 <= hidden.shape[-1] <= MAX_WIDTH:
        return f"width {hidden.shape[-1]} (the kernels take 1 to {MAX_WIDTH})"
    return None


def adaln_modulate(
    hidden: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """``hidden [..., W]``; shift and scale broadcastable to it -> ``[..., W]`` in ``dtype``."""
    group, (shift_EW, scale_EW) = modulation_rows(hidden, shift, scale)
    hidden_RW = hidden.reshape(-1, hidden.shape[-1])
    out = AdaLNModulate.apply(hidden_RW, shift_EW, scale_EW, weight, bias, group, eps, dtype)
    return out.view(hidden.shape)
