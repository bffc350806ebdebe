"""Launches of the LayerNorm + modulation kernels, with the static table of the backward's. Imports Triton."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ear_kernels.ops.generator import kernels_adaln as kernels
from ear_kernels.runtime.column_sums import column_sums
from ear_kernels.runtime.launching import (
    RowConfig,
    ceil_div,
    dense_rows,
    launch,
    next_power_of_two,
    row_grid,
    row_warps,
)

# Block of columns -> config. (One row a run, longer runs.) The fastest of 36 launches each on an H200
# (docs/performance.md); two stages prefetch the next row. 2,048 lanes spill 24 to 64 bytes: the best launch
# that does not takes 0.75 ms instead of 0.64 at W = 1280.
BACKWARD_ROWS: dict[int, tuple[RowConfig, RowConfig]] = {
    512: (RowConfig(2, 1, 528), RowConfig(2, 1, 528)),
    1024: (RowConfig(4, 2, 396), RowConfig(4, 2, 396)),
    2048: (RowConfig(4, 2, 264), RowConfig(4, 2, 264)),
    4096: (RowConfig(16, 1, 132), RowConfig(16, 1, 132)),
    8192: (RowConfig(16, 1, 132), RowConfig(16, 1, 132)),
}

UNIT_ROWS = 16
"""Most rows of a run that a unit of work takes where a run may be all rows."""


@dataclass(frozen=True)
class Runs:
    """Consecutive rows that share their modulation.

    Args:
        group: rows a run.
        unit_rows: most rows of a run that one unit of work takes.
    """

    group: int
    unit_rows: int

    @property
    def units(self) -> int:
        """Units of a run."""
        return ceil_div(self.group, self.unit_rows)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The kernels' ``group, chunks, unit_rows``."""
        return self.group, self.units, self.unit_rows

    def units_in(self, rows: int) -> int:
        """Units of all runs of this many rows."""
        return rows // self.group * self.units

    def unit_gradient(self, modulation: Tensor) -> Tensor:
        """Memory for a gradient of ``modulation [R / group, W]`` a unit, float32 where several will be summed."""
        entries, width = modulation.shape
        dtype = torch.float32 if self.units > 1 else modulation.dtype
        return modulation.new_empty((entries * self.units, width), dtype=dtype)

    def sum_units(self, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient ``[R / group, W]`` from that of the units, summed in a fixed order."""
        return grad if self.units == 1 else grad.unflatten(0, (-1, self.units)).sum(1).to(dtype)

    @staticmethod
    def of(group: int) -> "Runs":
        """Runs of any length, cut into units of at most ``UNIT_ROWS``."""
        return Runs(group, min(group, UNIT_ROWS))


@dataclass(frozen=True)
class NormInputs:
    """What the backward of a norm and modulation reads of its forward: ``hidden [R, W]``, or ``[T, W]`` with
    ``index [R]``, ``scale [R / group, W]``, the norm's parameters and the rows' statistics ``[R]``."""

    hidden: Tensor
    scale: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    index: Tensor | None = None


@dataclass(frozen=True)
class PreviousBlock:
    """The gated residual before a norm: ``ffn [R, W]`` and ``gate [R / group, W]``, memory for their gradients, and
    for ``hidden - gate * ffn`` where that is wanted."""

    ffn: Tensor
    gate: Tensor
    grad_ffn: Tensor
    grad_gate: Tensor
    hidden: Tensor | None


class ColumnSums(NamedTuple):
    """Sums over all rows, ``[W]`` float32 each; None where there is nothing to sum or it was not asked for."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    ffn: Tensor | None = None
    shift: Tensor | None = None
    scale: Tensor | None = None
    gate: Tensor | None = None


def row_strides(*tensors: Tensor | None) -> list[int | None]:
    """The strides of the kernels' matrices along their rows; None for those that are absent."""
    return [None if tensor is None else tensor.stride(0) for tensor in tensors]


def launch_forward(
    hidden: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    norm: Sequence[Tensor | None],
    out: Tensor,
    stats: Sequence[Tensor],
    *,
    runs: Runs,
    eps: float,
    temperature: float = 1.0,
    index: Tensor | None = None,
    residual: Sequence[Tensor] = (),
    next_is_dependent: bool = False,
) -> None:
    """Write ``LN(hidden) * (1 + scale) + temperature * shift`` to ``out [R, W]``.

    Every matrix has dense rows. ``shift`` (None: 0) and ``scale`` are ``[R / group, W]``. ``norm`` is the norm's
    weight and bias, ``stats`` memory for mean and rstd; either may be empty. With
    ``residual = (ffn, gate, next_hidden)`` the rows are ``hidden + gate * ffn``, which is also written to
    ``next_hidden``. ``out`` may be ``shift``'s memory if ``group`` is 1: a program reads its shift before it writes.
    ``next_is_dependent``: the next kernel is launched as
    :func:`ear_kernels.runtime.launching.dependent_launch` says.
    """
    rows, width = out.shape
    if rows == 0:
        return
    weight, bias = norm or (None, None)
    ffn, gate, next_hidden = residual or (None, None, None)
    mean, rstd = stats or (None, None)
    launch(
        kernels.adaln_fwd_kernel, (runs.units_in(rows),),
        hidden, index, ffn, gate, shift, scale, weight, bias, next_hidden, out, mean, rstd, rows, *runs.sizes,
        *row_strides(hidden, ffn, gate, shift, scale, next_hidden, out), eps, temperature, on=out,
        WIDTH=width, BLOCK=next_power_of_two(width), NEXT_IS_DEPENDENT=next_is_dependent, num_warps=row_warps(width),
    )  # fmt: skip


def launch_backward(
    grad_out: Tensor,
    inputs: NormInputs,
    grad_hidden: Tensor,
    grad_shift: Tensor | None,
    grad_scale: Tensor,
    *,
    runs: Runs,
    grad_residual: Tensor | None = None,
    previous: PreviousBlock | None = None,
    sum_modulation: bool = False,
) -> ColumnSums:
    """Backward of :func:`launch_forward`; writes into the given gradients and returns the column sums.

    With ``previous`` it continues through the gated residual of the block before. ``grad_shift``, ``grad_scale`` and
    ``previous.grad_gate`` are ``[R / group * units, W]``: sum over the units of a run where there are several.
    ``grad_hidden`` may be ``grad_residual``; with one unit a run ``grad_scale`` may be ``scale``, ``grad_gate``
    ``gate`` and ``grad_ffn`` ``ffn``; ``grad_shift`` is None where the caller keeps ``grad_out`` itself.
    ``previous.hidden`` may be ``inputs.hidden``.

    The sums are those of the norm's parameters and of ``grad_ffn`` where there are any; ``sum_modulation`` asks for
    those of shift, scale and gate as well.
    """
    rows, width = grad_out.shape
    names = ["weight", "bias"] if inputs.weight is not None or inputs.bias is not None else []
    names += ["ffn"] if previous is not None else []
    names += ["shift", "scale"] if sum_modulation else []
    names += ["gate"] if sum_modulation and previous is not None else []
    if rows == 0:
        return ColumnSums(**{name: grad_out.new_zeros(width, dtype=torch.float32) for name in names})
    single, longer = BACKWARD_ROWS[max(512, next_power_of_two(width))]
    config = single if runs.group == 1 else longer
    units = runs.units_in(rows)
    programs, units_per_program = row_grid(units, config.programs)
    partials = grad_out.new_empty((programs, len(names), width), dtype=torch.float32) if names else None
    ffn = gate = grad_ffn = grad_gate = previous_hidden = None
    if previous is not None:
        ffn, gate, grad_ffn, grad_gate = previous.ffn, previous.gate, previous.grad_ffn, previous.grad_gate
        previous_hidden = previous.hidden
    launch(
        kernels.adaln_bwd_kernel, (programs,),
        grad_out, inputs.hidden, inputs.index, inputs.scale, inputs.weight, inputs.bias, inputs.mean, inputs.rstd,
        grad_residual, ffn, gate, previous_hidden, grad_hidden, grad_shift, grad_scale, grad_ffn, grad_gate, partials,
        *runs.sizes, units, units_per_program,
        *row_strides(grad_out, inputs.hidden, inputs.scale, grad_residual, ffn, gate, previous_hidden),
        *row_strides(grad_hidden, grad_shift, grad_scale, grad_ffn, grad_gate), on=grad_out,
        WIDTH=width, BLOCK=next_power_of_two(width), SINGLE=runs.group == 1, SUM_MODULATION=sum_modulation,
        SUMS=len(names), STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    sums = column_sums(partials).unbind() if partials is not None else ()
    return ColumnSums(**dict(zip(names, sums, strict=True)))


def adaln_forward(
    hidden: Tensor,
    shift: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    group: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``hidden [R, W]``, ``shift, scale [R / group, W]`` -> rows ``[R, W]`` in ``dtype``, mean and rstd ``[R]``."""
    out = hidden.new_empty(hidden.shape, dtype=dtype)
    mean, rstd = (hidden.new_empty(hidden.shape[:1], dtype=torch.float32) for _ in range(2))
    norm = [None if parameter is None else parameter.contiguous() for parameter in (weight, bias)]
    inputs = (dense_rows(hidden), dense_rows(shift), dense_rows(scale), norm)
    launch_forward(*inputs, out, (mean, rstd), runs=Runs.of(group), eps=eps)
    return out, mean, rstd


def adaln_backward(
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
    runs = Runs.of(group)
    grad_hidden = hidden.new_empty(hidden.shape)
    grad_shift, grad_scale = runs.unit_gradient(shift), runs.unit_gradient(scale)
    weight, bias = (None if parameter is None else parameter.contiguous() for parameter in (weight, bias))
    inputs = NormInputs(dense_rows(hidden), dense_rows(scale), weight, bias, mean, rstd)
    sums = launch_backward(dense_rows(grad_out), inputs, grad_hidden, grad_shift, grad_scale, runs=runs)
    grad_shift, grad_scale = runs.sum_units(grad_shift, shift.dtype), runs.sum_units(grad_scale, scale.dtype)
    # Copies: outputs of an operation must not share memory.
    columns = [
        hidden.new_zeros(hidden.shape[1], dtype=torch.float32) if total is None else total.clone()
        for total in (sums.weight, sums.bias)
    ]
    return grad_hidden, grad_shift, grad_scale, columns[0], columns[1]
