"""Forward without gradients, one modulation a row: nothing is saved, so its order and its streams are free.

Legend: R rows, W width, D size of a token. The chain is norm, first linear with SiLU, second linear with gate and
residual; the modulations of all blocks depend on the noise only and are three fifths of the work. At a thousand rows
a GEMM has fewer tiles than the GPU has processors, or a few more than a whole number of waves, and a launch costs as
much as a norm. The table says what is done about it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ear_kernels.ops.adaln import autograd as adaln
from ear_kernels.ops.generator import passes
from ear_kernels.ops.silu_ffn import autograd as ffn_ops
from ear_kernels.runtime.gemm import linear
from ear_kernels.runtime.launching import dense_rows, is_on_hopper


@dataclass(frozen=True)
class Plan:
    """How the launches of a forward are arranged.

    Args:
        modulation: "each" before its norm; all "first", on the chain's stream; or "beside" the chain, on streams of
            their own, where they fill the processors that a GEMM of few tiles leaves idle.
        streams: of "beside".
        urgent: "beside" runs the chain, not the modulations, on another stream, one of high priority.
        dependent: the chain's Triton kernels are launched before their predecessor has ended
            (:func:`ear_kernels.runtime.launching.dependent_launch`).
    """

    modulation: str = "each"
    streams: int = 1
    urgent: bool = False
    dependent: bool = False


# (Rows from, width from) -> plan on Hopper; the last entry that is reached on both counts. Elsewhere the first.
TABLE: tuple[tuple[int, int, Plan], ...] = (
    (0, 0, Plan()),
    (65, 0, Plan("beside", streams=2, urgent=True, dependent=True)),
    (4096, 0, Plan()),
)


def plan_for(rows: int, width: int, tensor: Tensor) -> Plan:
    """The static table's entry for ``[rows, width]`` on this tensor's device."""
    if not is_on_hopper(tensor):
        return TABLE[0][2]
    return [plan for least, narrowest, plan in TABLE if rows >= least and width >= narrowest][-1]


@lru_cache
def _streams(index: int, count: int, priority: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(index, priority=priority) for _ in range(count))


class _Modulations:
    """Outputs of the modulation linears of all layers, ``[R, 3W]`` and last ``[R, 2W]`` or ``[R, W]``.

    ``chain`` is the stream for everything else. What both streams touch is allocated on the caller's, which waits for
    both at the end, so that its allocator may reuse it.
    """

    def __init__(self, plan: Plan, activated: Tensor, linears: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._activated, self._linears = activated, linears
        self._events: list[torch.cuda.Event] = []
        self._outputs: list[Tensor | None] = [None] * len(linears)
        self.chain: torch.cuda.Stream | None = None
        self.beside = plan.modulation == "beside" and activated.is_cuda
        if self.beside:
            self._start(plan)
        elif plan.modulation != "each":
            self._outputs = [linear(activated, *weights) for weights in linears]

    def _start(self, plan: Plan) -> None:
        device = self._activated.device
        self._caller = torch.cuda.current_stream(device)
        self._outputs = [
            self._activated.new_empty((len(self._activated), len(weight))) for weight, _ in self._linears
        ]
        others = _streams(device.index, plan.streams, 0)
        if plan.urgent:
            (self.chain,) = _streams(device.index, 1, -1)
            self.chain.wait_stream(self._caller)
            others = (self._caller, *others[1:])
        for stream in others:
            if stream != self._caller:
                stream.wait_stream(self._caller)
        for layer, (weights, out) in enumerate(zip(self._linears, self._outputs, strict=True)):
            stream = others[layer % len(others)]
            with torch.cuda.stream(stream):
                linear(self._activated, *weights, out)
                self._events.append(stream.record_event())

    def take(self, layer: int) -> Tensor:
        """The layer's modulation, for the current stream; nothing is kept of it here."""
        out = self._outputs[layer]
        if out is None:
            return linear(self._activated, *self._linears[layer])
        if self._events:
            torch.cuda.current_stream(out.device).wait_event(self._events[layer])
        if not self.beside:
            self._outputs[layer] = None
        return out

    def join(self) -> None:
        """Let the caller's stream wait for the chain's."""
        if self.chain is not None:
            self._caller.wait_stream(self.chain)


def forward(
    hidden: Tensor,
    conditioning: Tensor,
    parameters: list[Tensor],
    index: Tensor | None,
    temperature: float,
    eps: float,
) -> Tensor:
    """``[R, D]`` from ``hidden [T, W]`` and ``conditioning [R, W]``, the embedded noise; see :mod:`passes`."""
    blocks, final = passes.split(parameters)
    rows, width = conditioning.shape
    plan = plan_for(rows, width, conditioning)
    # A product of weights for a GEMM of all rows pays only if those are many.
    combined = passes.output_weights(final, width) if rows >= passes.COMBINE_ROWS else None
    hidden, conditioning = dense_rows(hidden), conditioning.contiguous()
    out = conditioning.new_empty((rows, len(final[2])))
    if not rows:
        return out
    wide = conditioning.new_empty((rows, 2 * width)) if combined else None
    activated = ffn_ops.silu(conditioning, wide[:, width:] if wide is not None else None)
    linears = [(block[6], block[7]) for block in blocks]
    linears.append((final[0][width:], final[1][width:]) if combined else (final[0], final[1]))
    modulations = _Modulations(plan, activated, linears)
    # A launch cannot overlap its predecessor and wait for an event too.
    after_gate = plan.dependent and plan.modulation == "first"
    pending: tuple[Tensor, Tensor] | None = None

    def normalise(
        shift: Tensor | None, scale: Tensor, norm: Sequence[Tensor | None], factor: float, u: Tensor
    ) -> None:
        nonlocal hidden, index, pending
        residual = (*pending, scale.new_empty((rows, width))) if pending is not None else None
        adaln.launch_forward(
            hidden, shift, scale, norm[0], norm[1], u, None, group=1, eps=eps, temperature=factor, index=index,
            residual=residual, dependent=after_gate, followed=plan.dependent,
        )  # fmt: skip
        if residual is not None:
            hidden, index, pending = residual[2], None, None

    with torch.cuda.stream(modulations.chain) if modulations.chain else nullcontext():
        for layer, (norm_weight, norm_bias, weight_in, bias_in, weight_out, bias_out, _, _) in enumerate(blocks):
            mod = modulations.take(layer)
            # The norm's output overwrites the shift.
            u, scale, gate = mod[:, :width], mod[:, width : 2 * width], mod[:, 2 * width :]
            normalise(u, scale, [norm_weight, norm_bias], temperature, u)
            _, active = ffn_ops.silu_linear(u, weight_in, bias_in, False, plan.dependent)
            fused = None
            if index is None:
                fused = ffn_ops.gated_linear(active, weight_out, bias_out, hidden, gate, False, plan.dependent)
            if fused is not None:
                hidden = fused[0]
            else:
                pending = (linear(active, weight_out, bias_out), gate)
            del mod, u, scale, gate, active
        mod = modulations.take(len(blocks))
        if wide is not None and combined is not None:
            normalise(None, mod, [None, None], 1.0, wide[:, :width])
            linear(wide, *combined, out)
        else:
            normalise(mod[:, :width], mod[:, width:], [None, None], 1.0, mod[:, :width])
            linear(mod[:, :width], final[2], final[3], out)
    modulations.join()
    return out
