"""Forward without gradients, one modulation a row: nothing is saved, so its order and its streams are free.

Legend: R rows, W width, D size of a token. The chain is norm, first linear with SiLU, second linear with gate and
residual; the modulations of all blocks depend on the noise only and are three fifths of the work. At a thousand rows
a GEMM has fewer tiles than the GPU has processors, or a few more than a whole number of waves, and a launch costs as
much as a norm. The table says what is done about it.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ear_kernels.ops.generator import launch_ffn as ffn_ops
from ear_kernels.ops.generator.launch import ResidualStream, output_weights
from ear_kernels.ops.generator.reference import modulation_linears, scale_shifts, split_parameters
from ear_kernels.runtime.gemm import linear
from ear_kernels.runtime.launching import is_on_hopper

COMBINE_ROWS = 8192
"""``W_l W_s`` (:mod:`launch`), a product of weights for a GEMM of all rows, pays from this many rows on."""


@dataclass(frozen=True)
class Plan:
    """How the launches of a forward are arranged.

    Args:
        streams: that compute the modulations, beside one of high priority for the chain: they fill the processors
            that a GEMM of few tiles leaves idle. 0: each modulation before its norm, all on one stream.
        dependent: the chain's Triton kernels are launched before their predecessor has ended
            (:func:`ear_kernels.runtime.launching.dependent_launch`).
    """

    streams: int = 0
    dependent: bool = False


# (Rows from) -> plan on Hopper; the last entry that is reached. Elsewhere the first.
TABLE: tuple[tuple[int, Plan], ...] = ((0, Plan()), (65, Plan(streams=2, dependent=True)), (4096, Plan()))


def plan_for(rows: int, tensor: Tensor) -> Plan:
    """The static table's entry for this many rows on this tensor's device."""
    if not is_on_hopper(tensor):
        return TABLE[0][1]
    return [plan for least, plan in TABLE if rows >= least][-1]


@lru_cache
def _streams(device: int, count: int, priority: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device, priority=priority) for _ in range(count))


class _Modulations:
    """Outputs of the modulation linears of all layers, ``[R, 3W]`` and last ``[R, 2W]`` or ``[R, W]``.

    ``chain`` is the stream for everything else, None for the caller's. What both touch is allocated on the caller's
    stream, which waits for the chain's at the end, so that its allocator may reuse it.
    """

    def __init__(self, streams: int, activated: Tensor, linears: list[tuple[Tensor, Tensor]]) -> None:
        self._activated, self._linears = activated, linears
        self._outputs: list[tuple[Tensor, torch.cuda.Event]] = []
        self.chain: torch.cuda.Stream | None = None
        if streams and activated.is_cuda:
            self._start(streams)

    def _start(self, streams: int) -> None:
        device = self._activated.device
        self._caller = torch.cuda.current_stream(device)
        outputs = [self._activated.new_empty((len(self._activated), len(weight))) for weight, _ in self._linears]
        (self.chain,) = _streams(device.index, 1, -1)
        others = _streams(device.index, streams - 1, 0)
        for stream in (self.chain, *others):
            stream.wait_stream(self._caller)
        for layer, (weights, out) in enumerate(zip(self._linears, outputs, strict=True)):
            stream = (self._caller, *others)[layer % streams]
            with torch.cuda.stream(stream):
                linear(self._activated, *weights, out)
                self._outputs.append((out, stream.record_event()))

    def of_layer(self, layer: int) -> Tensor:
        """The layer's modulation, for use on the current stream."""
        if not self._outputs:
            return linear(self._activated, *self._linears[layer])
        out, done = self._outputs[layer]
        torch.cuda.current_stream(out.device).wait_event(done)
        return out

    def join(self) -> None:
        """Let the caller's stream wait for the chain's."""
        if self.chain is not None:
            self._caller.wait_stream(self.chain)


def modulations(
    noise: Tensor, inputs: list[Tensor], parameters: list[Tensor], temperature: float, out: Tensor
) -> None:
    """``noise [R, noise_dim]`` -> ``out [R, (3 * blocks + 2) W]`` (dense rows), whose dtype all tensors have.

    Without inputs ``noise`` is the conditioning. A copy of all weights side by side makes the layers one product.
    """
    embedded = linear(noise, *inputs[:2]) if inputs else noise.contiguous()
    weights, biases = zip(*modulation_linears(parameters), strict=True)
    activated = ffn_ops.silu(embedded, embedded if inputs else None)
    linear(activated, torch.cat(weights), torch.cat(biases), out)
    scale_shifts(out, embedded.shape[1], temperature)


def chain(z: Tensor, modulations: Tensor, inputs: list[Tensor], parameters: list[Tensor], eps: float) -> Tensor:
    """``z [R, C]``, ``modulations [R, (3 * blocks + 2) W]`` (dense rows) -> ``[R, D]``; all tensors of one dtype."""
    blocks, final = split_parameters(parameters)
    dependent = plan_for(len(z), z).dependent
    stream = ResidualStream(linear(z, *inputs[-2:]), None, 1, eps, dependent)
    width = stream.hidden.shape[1]
    u = torch.empty_like(stream.hidden)
    parts = modulations.split(width, 1)
    for layer, block in enumerate(blocks):
        shift, scale, gate = parts[3 * layer : 3 * layer + 3]
        stream.block(block, shift, scale, gate, 1.0, u)
    shift, scale = parts[-2:]
    stream.normalise(shift, scale, (), 1.0, u, False)
    return linear(u, final.weight_out, final.bias_out)


def forward(
    hidden: Tensor,
    conditioning: Tensor,
    parameters: list[Tensor],
    index: Tensor | None,
    temperature: float,
    eps: float,
) -> Tensor:
    """``[R, D]`` from ``hidden [T, W]`` and ``conditioning [R, W]``, the embedded noise; see :mod:`launch`."""
    blocks, final = split_parameters(parameters)
    rows, width = conditioning.shape
    plan = plan_for(rows, conditioning)
    combined = output_weights(final, width) if rows >= COMBINE_ROWS else None
    stream, conditioning = ResidualStream(hidden, index, 1, eps, plan.dependent), conditioning.contiguous()
    out = conditioning.new_empty((rows, len(final.weight_out)))
    if not rows:
        return out
    wide = conditioning.new_empty((rows, 2 * width)) if combined else None
    activated = ffn_ops.silu(conditioning, wide[:, width:] if wide is not None else None)
    linears = [(block.weight_mod, block.bias_mod) for block in blocks]
    linears.append(
        (final.weight_mod[width:], final.bias_mod[width:]) if combined else (final.weight_mod, final.bias_mod)
    )
    modulations = _Modulations(plan.streams, activated, linears)
    with torch.cuda.stream(modulations.chain) if modulations.chain else nullcontext():
        for layer, block in enumerate(blocks):
            mod = modulations.of_layer(layer)
            # The norm's output overwrites the shift.
            u, scale, gate = mod.split(width, 1)
            stream.block(block, u, scale, gate, temperature, u)
            del mod, u, scale, gate
        mod = modulations.of_layer(len(blocks))
        if wide is not None and combined is not None:
            stream.normalise(None, mod, (), 1.0, wide[:, :width], False)
            linear(wide, *combined, out)
        else:
            shift, scale = mod.split(width, 1)
            stream.normalise(shift, scale, (), 1.0, shift, False)
            linear(shift, final.weight_out, final.bias_out, out)
    modulations.join()
    return out
