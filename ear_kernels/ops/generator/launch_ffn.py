"""Launches of the SiLU network and its gated residual: GEMMs with an epilogue, pointwise kernels around cuBLAS, and
the static table that chooses between the two.

No autotuning and no device query at import. A Triton GEMM pays where its rate is above about 81 % of cuBLAS's; the
measurements behind each entry are in docs/performance.md. GEMMs of the backward are cuBLAS: with 32 output
tiles for 132 SMs there is nothing to win for weight gradients. Imports Triton.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ear_kernels.ops.generator import kernels_ffn as kernels
from ear_kernels.ops.generator.launch_adaln import Runs, row_strides
from ear_kernels.runtime.column_sums import column_sums
from ear_kernels.runtime.gemm import linear
from ear_kernels.runtime.launching import (
    ceil_div,
    dense_rows,
    dependent_launch,
    is_describable,
    is_on_hopper,
    launch,
    next_power_of_two,
    processor,
    row_grid,
    row_warps,
)

SILU_BLOCK = 4096

POINTWISE_PROGRAMS = 1056
"""Programs of a pointwise backward: 8 for each of an H200's SMs; a constant for the sake of the order of its sums."""


@dataclass(frozen=True)
class GemmConfig:
    """Tile and launch options of ``linear_kernel``. ``split`` = 2 runs the epilogue on half a tile at a time."""

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int
    split: int = 1
    flatten: bool = False


@dataclass(frozen=True)
class Entry:
    """From ``rows`` rows and ``width`` output columns on: the config, and that of a call that saves; None: cuBLAS."""

    rows: int
    width: int
    config: GemmConfig | None
    saving: GemmConfig | None


_64 = GemmConfig(64, 64, 64, 4, 4)
_64_DEEP = GemmConfig(64, 64, 64, 6, 4)
_128_64 = GemmConfig(128, 64, 64, 4, 4)
_128_128 = GemmConfig(128, 128, 64, 4, 8)
_128_256 = GemmConfig(128, 256, 64, 3, 8, split=2, flatten=True)

# Hopper, bf16 and fp16: "silu" is GEMM + bias + SiLU, "gate" GEMM + bias, times gate, plus residual. The last entry
# whose rows and width are both reached applies. Below 4,096 rows, where nothing is saved, the fastest of
# benchmarks/sweep_rows.py on an H100 (benchmarks/results/sweep_rows_h100_2026-11-24.json). From there on cuBLAS where
# something is saved (on an H200 6 x 1024 takes 29.1 ms with it, 30.05 ms with Triton for both) and for the gate; SiLU
# alone is faster in the GEMM at 8 x 1280 and 12 x 1536 (H200: 18.0 against 18.3 ms, 35.2 against 36.0), not at
# 6 x 1024 (9.3 against 9.2).
HOPPER: dict[str, tuple[Entry, ...]] = {
    "silu": (
        Entry(0, 0, _64_DEEP, _64),
        Entry(0, 1408, None, _64),
        Entry(512, 0, None, _128_64),
        Entry(768, 1408, _128_128, _128_128),
        Entry(1536, 0, None, _128_128),
        Entry(4096, 0, None, None),
        Entry(4096, 1152, _128_256, None),
    ),
    "gate": (
        Entry(0, 0, None, _64),
        Entry(512, 0, None, _128_64),
        Entry(768, 1408, _128_128, _128_128),
        Entry(1536, 0, None, _128_128),
        Entry(4096, 0, None, None),
    ),
}

_instead: ContextVar[Mapping[str, GemmConfig | None] | None] = ContextVar("ear_kernels_gemms", default=None)


@contextmanager
def using_gemms(**configs: GemmConfig | None) -> Iterator[None]:
    """Inside, GEMMs with the named epilogues use these configs (None: cuBLAS), whatever the table says.

    For tests and for the measurements that make the table.
    """
    unknown = set(configs) - set(HOPPER)
    if unknown:
        raise ValueError(f"{sorted(unknown)} are no epilogues; use {', '.join(HOPPER)}")
    token = _instead.set({**(_instead.get() or {}), **configs})
    try:
        yield
    finally:
        _instead.reset(token)


def gemm_config(epilogue: str, rows: int, width: int, *operands: Tensor, save: bool) -> GemmConfig | None:
    """The Triton config for a GEMM ``[rows, width]`` with this epilogue, or None for cuBLAS and a pointwise kernel.

    ``save``: it also stores what backward needs.
    """
    first = operands[0]
    if first.dtype == torch.float32 or rows == 0 or not is_describable(*operands):
        return None
    instead = _instead.get() or {}
    if epilogue in instead:
        return instead[epilogue]
    if not is_on_hopper(first):
        return None
    entry = [entry for entry in HOPPER[epilogue] if rows >= entry.rows and width >= entry.width][-1]
    return entry.saving if save else entry.config


def launch_linear(
    config: GemmConfig,
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    saved: Tensor | None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    dependent: bool,
) -> None:
    """Write ``SiLU(f)``, or ``residual + gate * f`` with a gate, to ``out [R, N]``, f = ``a @ weight^T + bias``.

    ``saved`` receives f. ``dependent``: see :func:`ear_kernels.runtime.launching.dependent_launch`.
    """
    rows, n = out.shape

    def in_tiles(tensor: Tensor | None) -> TensorDescriptor | None:
        tile = [config.bm, config.bn // config.split]
        return None if tensor is None else TensorDescriptor.from_tensor(tensor, tile)

    tiles = ceil_div(rows, config.bm) * ceil_div(n, config.bn)
    launch(
        kernels.linear_kernel, (min(tiles, processor(a).count),),
        TensorDescriptor.from_tensor(a, [config.bm, config.bk]),
        TensorDescriptor.from_tensor(weight, [config.bn, config.bk]),
        bias, in_tiles(saved), in_tiles(residual), in_tiles(gate), in_tiles(out), rows, n, a.shape[1], on=a,
        BM=config.bm, BN=config.bn, BK=config.bk, SPLIT=config.split, FLATTEN=config.flatten, DEPENDENT=dependent,
        num_stages=config.stages, num_warps=config.warps, **dependent_launch(dependent),
    )  # fmt: skip


def silu(pre: Tensor, out: Tensor | None = None) -> Tensor:
    """SiLU of a contiguous ``[R, W]``, into ``out`` (dense rows) if given."""
    out = torch.empty_like(pre) if out is None else out
    if pre.numel():
        launch(
            kernels.silu_fwd_kernel, (ceil_div(pre.numel(), SILU_BLOCK),),
            pre, out, pre.numel(), out.stride(0), on=pre, WIDTH=pre.shape[1], BLOCK=SILU_BLOCK, num_warps=8,
        )  # fmt: skip
    return out


def silu_backward(grad_out: Tensor, pre: Tensor, grad_pre: Tensor, active: Tensor | None = None) -> Tensor:
    """Write ``grad_out * SiLU'(pre)`` to ``grad_pre``, which may be ``grad_out``; returns its column sums in float32.

    ``active`` receives SiLU(pre), and may be ``pre``.
    """
    rows, width = pre.shape
    if rows == 0:
        return pre.new_zeros((width,), dtype=torch.float32)
    programs, rows_per_program = row_grid(rows, POINTWISE_PROGRAMS)
    partials = pre.new_empty((programs, width), dtype=torch.float32)
    launch(
        kernels.silu_bwd_kernel, (programs,),
        grad_out, pre, grad_pre, active, partials, rows, rows_per_program,
        *row_strides(grad_out, pre, grad_pre, active), on=pre,
        WIDTH=width, BLOCK=next_power_of_two(width), num_warps=row_warps(width),
    )  # fmt: skip
    return column_sums(partials)


def gate_residual(hidden: Tensor, ffn: Tensor, gate: Tensor, runs: Runs) -> Tensor:
    """``hidden + gate * ffn`` for ``hidden, ffn [R, W]`` and ``gate [R / group, W]``."""
    rows, width = hidden.shape
    out = hidden.new_empty((rows, width))
    if rows:
        launch(
            kernels.gate_fwd_kernel, (runs.units_in(rows),),
            hidden, ffn, gate, out, *runs.sizes, *row_strides(hidden, ffn, gate, out),
            on=hidden, WIDTH=width, BLOCK=next_power_of_two(width), num_warps=row_warps(width),
        )  # fmt: skip
    return out


def gate_backward(
    grad_out: Tensor, ffn: Tensor, gate: Tensor, grad_ffn: Tensor, grad_gate: Tensor, runs: Runs
) -> Tensor:
    """Write the gradients of ``gate * ffn``; ``grad_gate`` is ``[R / group * units, W]``.

    Returns the column sums of ``grad_ffn``.
    """
    rows, width = grad_out.shape
    if rows == 0:
        return grad_out.new_zeros((width,), dtype=torch.float32)
    units = runs.units_in(rows)
    programs, units_per_program = row_grid(units, POINTWISE_PROGRAMS)
    partials = grad_out.new_empty((programs, width), dtype=torch.float32)
    launch(
        kernels.gate_bwd_kernel, (programs,),
        grad_out, ffn, gate, grad_ffn, grad_gate, partials, *runs.sizes, units, units_per_program,
        *row_strides(grad_out, ffn, gate, grad_ffn, grad_gate),
        on=grad_out, WIDTH=width, BLOCK=next_power_of_two(width), num_warps=row_warps(width),
    )  # fmt: skip
    return column_sums(partials)


def silu_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, save: bool, dependent: bool = False
) -> tuple[Tensor | None, Tensor]:
    """(pre-activation or None, SiLU(pre-activation)) of ``x @ weight^T + bias``; both ``[R, N]``."""
    rows, n = x.shape[0], weight.shape[0]
    config = gemm_config("silu", rows, n, x, weight, save=save) if n * x.element_size() % 16 == 0 else None
    if config is None:
        pre = linear(x, weight, bias)
        return (pre, silu(pre)) if save else (None, silu(pre, pre))
    active = x.new_empty((rows, n))
    saved = x.new_empty((rows, n)) if save else None
    launch_linear(config, x, weight, bias, active, saved=saved, dependent=dependent)
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
    """(``hidden + gate * f``, f or None), f = ``active @ weight^T + bias``, in one kernel.

    None where that does not pay. One gate per row, all matrices ``[R, .]``.
    """
    config = gemm_config("gate", *hidden.shape, active, weight, hidden, gate, save=save)
    if config is None:
        return None
    out = hidden.new_empty(hidden.shape)
    ffn = hidden.new_empty(hidden.shape) if save else None
    launch_linear(config, active, weight, bias, out, saved=ffn, residual=hidden, gate=gate, dependent=dependent)
    return out, ffn


def ffn_forward(
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
        out = gate_residual(hidden, ffn, gate, Runs.of(group))
    if not save or pre is None or ffn is None:
        pre, ffn = hidden.new_empty(0), hidden.new_empty(0)
    return out, pre, ffn


def ffn_backward(
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
    runs = Runs.of(group)
    grad_ffn = grad_out.new_empty(grad_out.shape)
    grad_gate = runs.unit_gradient(gate)
    grad_bias_out = gate_backward(grad_out, ffn, gate, grad_ffn, grad_gate, runs)
    grad_pre, active = torch.mm(grad_ffn, weight_out), torch.empty_like(pre)
    grad_bias_in = silu_backward(grad_pre, pre, grad_pre, active)
    return (
        torch.mm(grad_pre, weight_in),
        runs.sum_units(grad_gate, gate.dtype),
        torch.mm(grad_pre.t(), modulated),
        grad_bias_in,
        torch.mm(grad_ffn.t(), active),
        grad_bias_out,
    )
