"""The weights of a model as sampling reads them: where they lie, as 16-bit copies, or quantised to e4m3.

A copy is made anew when the bits of a parameter have changed, in the same memory, which CUDA graphs read.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ear_kernels import LowCopies
from ear_kernels.functional import (
    linear_gelu,
    linear_inference,
    quantise_e4m3,
    residual_norm,
)

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max

DEPENDENT = True
"""Kernels are launched while the one before still runs, and wait for its end: a step is a chain of small kernels."""


@dataclass(frozen=True)
class Norm:
    """A LayerNorm's parameters."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, stream: Tensor, *branches: tuple[Tensor, Tensor | None], **options: Any) -> Tensor:
        """The norm of the stream plus branches and their biases."""
        options |= {"eps": self.eps, "dependent": DEPENDENT}
        return residual_norm(stream, branches, self.weight, self.bias, **options)

    def largest(self) -> Tensor:
        """A bound of what any row's elements are at most: a normed row's length is sqrt(W) at most."""
        return (math.sqrt(len(self.weight)) * self.weight.abs() + self.bias.abs()).max()

    def length(self) -> Tensor:
        """A bound of what any row's length is at most."""
        return math.sqrt(len(self.weight)) * self.weight.abs().max() + self.bias.norm()


@dataclass(frozen=True)
class Quantised:
    """A weight in e4m3 with its scale, and the scale of what it is multiplied by; both float32 ``[1]``."""

    weight: Tensor
    scale: Tensor
    scale_in: Tensor


@dataclass(frozen=True)
class Linear:
    """A linear: ``weight`` and ``bias`` in the dtype that is computed in, the bias as it is, and ``e4m3``."""

    weight: Tensor
    bias: Tensor
    own_bias: Tensor
    e4m3: Quantised | None = None

    @property
    def takes(self) -> dict[str, Any]:
        """``dtype`` and ``scale`` of what it is to be given."""
        if self.e4m3 is None:
            return {"dtype": self.weight.dtype}
        return {"dtype": E4M3, "scale": self.e4m3.scale_in}

    def __call__(
        self,
        x: Tensor,
        *,
        bias: bool = True,
        rows: slice = slice(None),
        gelu: dict[str, Any] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """``x W^T``, plus the bias; with ``rows`` those of the weight; in ``out``, ``[R, N]``, if that is given.

        With ``gelu``, what the next linear :attr:`takes`, GELU of that, in that dtype.
        """
        weight, options = self.weight, dict(gelu or {})
        if "scale" in options:
            options["out_scale"] = options.pop("scale")
        if x.dtype == E4M3 and self.e4m3 is not None:
            weight = self.e4m3.weight
            options = {"dtype": self.bias.dtype, "scales": (self.e4m3.scale_in, self.e4m3.scale), **options}
        function = linear_inference if gelu is None else linear_gelu
        added = self.bias[rows] if bias else None
        result = function(x.flatten(0, -2), weight[rows], added, dependent=DEPENDENT, out=out, **options)
        return result.view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Block:
    """A transformer block."""

    heads: int
    norm1: Norm
    qkv: Linear
    proj: Linear
    norm2: Norm
    fc1: Linear
    fc2: Linear
    linears: dict[str, nn.Linear] = field(repr=False)

    def mlp(self, normed: Tensor, room: "Room | None" = None) -> Tensor:
        """The MLP without its last bias; what is between its linears lies in ``room``."""
        takes = self.fc2.takes if normed.dtype == E4M3 else {"dtype": normed.dtype}
        rows, inner = normed.numel() // normed.shape[-1], self.fc1.weight.shape[0]
        out = None if room is None else room(rows, inner, takes["dtype"])
        return self.fc2(self.fc1(normed, gelu=takes, out=out), bias=False)


class Room:
    """Memory for the widest results of a block, which are never needed at the same time.

    Args:
        weights: of the model.
        rows: at most.
    """

    def __init__(self, weights: "Weights", rows: int) -> None:
        block = weights.blocks[0]
        inner = block.fc1.weight.shape[0] * (1 if block.fc2.e4m3 is not None else weights.dtype.itemsize)
        widest = max(inner, block.qkv.weight.shape[0] * weights.dtype.itemsize)
        self._bytes = torch.empty(rows * widest, dtype=torch.uint8, device=block.qkv.weight.device)

    def __call__(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        """``[rows, width]``; it ends what was there."""
        return self._bytes[: rows * width * dtype.itemsize].view(dtype).view(rows, width)


class Weights:
    """What sampling reads of a model.

    Args:
        model: the model; its parameters stay where they are.
        dtype: that is computed in: the parameters' own or a 16-bit one.
        fp8: whether the blocks' linears are quantised to e4m3, but for those of a few rows.
    """

    def __init__(self, model: Any, dtype: torch.dtype, *, fp8: bool = False) -> None:
        self.dtype, self._fp8 = dtype, fp8
        backbone, is_mar = model.backbone, model.config.backbone == "mar"
        own = next(iter(model.parameters()))
        self._parameters = list(model.parameters())
        self._addresses = addresses(model)
        blocks, encoder = list(backbone.decoder_blocks), list(backbone.encoder_blocks) if is_mar else []
        whole = [*blocks, *encoder] if not fp8 else blocks[-1:]
        linears = [parameter for block in whole for parameter in block.parameters()]
        first = [*blocks[0].attn.qkv.parameters()]
        biases = [linear.bias for block in (*blocks, *encoder) for linear in _linears(block).values()]
        is_linear = isinstance(backbone.z_proj, nn.Linear)
        embeddings = [backbone.z_proj] if is_linear else []
        embeddings += [backbone.decoder_embed] if is_mar else []
        cast = [*linears, *first, *biases, *(each for linear in embeddings for each in linear.parameters())]
        scored = list(model.score.parameters())
        self._copies = [LowCopies(part, dtype) for part in (cast, scored)] if dtype != own.dtype else []
        if own.is_cuda:
            from ear_kernels.runtime.fingerprint import Fingerprint

            self._fingerprint: Any = Fingerprint(parameter.detach() for parameter in self._parameters)
        else:
            self._fingerprint = None
        self._found: int | None = None
        with self._copies[0] if self._copies else nullcontext():
            # MAR's decoder has other inputs in every step, so its first block is like the others.
            self.blocks = [
                self._block(block, quantised=fp8, first=number == 0 and not is_mar, last=number == len(blocks) - 1)
                for number, block in enumerate(blocks)
            ]
            self.encoder = [self._block(block, quantised=fp8, first=False, last=False) for block in encoder]
            self.embed = self._linear(backbone.z_proj) if is_linear else None
            if is_mar:
                self.decoder_embed = self._linear(backbone.decoder_embed)
                self.encoder_norm, self.embed_norm = _norm(backbone.encoder_norm), _norm(backbone.z_proj_ln)
        self.norm = _norm(backbone.decoder_norm)

    def fits(self, model: Any) -> bool:
        """Whether the model's parameters lie where they did."""
        return self._addresses == addresses(model)

    def scope(self) -> Any:
        """Where the 16-bit copies stand for the score's weights, as they were made last."""
        if not self._copies:
            return nullcontext()
        self._copies[1].vouch()
        return self._copies[1]

    @torch.no_grad()
    def refresh(self) -> bool:
        """Make what is copied of changed parameters anew; returns whether any has changed."""
        found = None if self._fingerprint is None else self._fingerprint()
        changed = found is None or found != self._found
        if changed:
            for copies in self._copies:
                copies.refresh(everything=True)
            for block in (*self.blocks, *self.encoder) if self._fp8 else ():
                _quantise(block)
            self._found = found
        return changed

    def start_check(self) -> None:
        """Read the parameters' bits, for :meth:`have_changed`."""
        self._fingerprint.start()

    def have_changed(self) -> bool:
        """Whether the parameters at :meth:`start_check` were others than those copied; it waits for the device."""
        return self._fingerprint.number() != self._found

    def _low(self, parameter: Tensor) -> Tensor:
        copy = self._copies[0].current(parameter, self.dtype) if self._copies else None
        return parameter.detach() if copy is None else copy

    def _linear(self, linear: nn.Linear, *, fp8: bool = False) -> Linear:
        weight = linear.weight.detach()
        e4m3 = None
        if fp8:
            # Each of its own memory: cuBLAS wants scales aligned to 16 bytes.
            scale, scale_in = (torch.ones(1, device=weight.device) for _ in range(2))
            e4m3 = Quantised(torch.zeros_like(weight, dtype=E4M3), scale, scale_in)
        return Linear(self._low(linear.weight), self._low(linear.bias), linear.bias.detach(), e4m3)

    def _block(self, block: Any, *, quantised: bool, first: bool, last: bool) -> Block:
        linears = _linears(block)
        # The first block's queries, keys and values are those of few rows; so is all but keys and values in the last.
        wanted = {"qkv": not first or last, "proj": not last, "fc1": not last, "fc2": not last}
        own = {name: self._linear(linear, fp8=quantised and wanted[name]) for name, linear in linears.items()}
        return Block(block.attn.num_heads, _norm(block.norm1), norm2=_norm(block.norm2), linears=linears, **own)


def addresses(model: Any) -> tuple[float, ...]:
    """Where the parameters lie, and the numbers that graphs hold beside them."""
    found: list[float] = [parameter.data_ptr() for parameter in model.parameters()]
    backbone, norms = model.backbone, ["decoder_norm"]
    stacks = [backbone.decoder_blocks]
    if model.config.backbone == "mar":
        norms += ["encoder_norm", "z_proj_ln"]
        stacks.append(backbone.encoder_blocks)
    for block in (block for stack in stacks for block in stack):
        found += block.norm1.eps, block.norm2.eps, block.attn.num_heads
    return *found, *(getattr(backbone, name).eps for name in norms)


def _linears(block: Any) -> dict[str, nn.Linear]:
    return {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach(), norm.eps)


def _quantise(block: Block) -> None:
    """The block's weights in e4m3, and the scales of what they are multiplied by.

    These are bounds that follow from the weights alone, so that nothing is ever cut off and no batch changes another:
    a row of a norm has a known length, a linear's output is that times a row of its weight at most, attention's
    output no more than the values, and GELU's no more than its input. Powers of two: their size rounds nothing.
    """
    width = block.proj.weight.shape[1]
    values = _largest(block.linears["qkv"], block.norm1, slice(2 * width, None))
    bounds = {"qkv": block.norm1.largest(), "proj": values, "fc1": block.norm2.largest()}
    bounds["fc2"] = _largest(block.linears["fc1"], block.norm2)
    for name, bound in bounds.items():
        kept = getattr(block, name).e4m3
        if kept is not None:
            weight, scale = quantise_e4m3(block.linears[name].weight.detach())
            kept.weight.copy_(weight)
            kept.scale.copy_(scale)
            kept.scale_in.copy_((bound / LARGEST).log2().ceil().clamp(-100, 100).exp2())


def _largest(linear: nn.Linear, norm: Norm, rows: slice = slice(None)) -> Tensor:
    """A bound of what a linear makes of a norm's rows."""
    return (linear.weight.detach()[rows].norm(dim=1) * norm.length() + linear.bias.detach()[rows].abs()).max()
