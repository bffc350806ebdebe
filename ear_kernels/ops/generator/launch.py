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

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ear_kernels.ops.generator import launch_adaln as adaln
from ear_kernels.ops.generator import launch_ffn as ffn_ops
from ear_kernels.ops.generator.launch_adaln import ColumnSums, NormInputs, PreviousBlock, Runs
from ear_kernels.ops.generator.reference import Block, FinalLayer, split_parameters
from ear_kernels.runtime.column_sums import column_sums
from ear_kernels.runtime.gemm import linear, weight_gradient
from ear_kernels.runtime.launching import dense_rows


class SavedBlock(NamedTuple):
    """What forward saves of a block; ``modulated`` is empty for group = 1, where it lies in ``mod``."""

    mod: Tensor  # [E, 3W]
    modulated: Tensor  # [R, W]
    pre: Tensor  # [R, W]
    ffn: Tensor  # [R, W]
    mean: Tensor  # [R] float32
    rstd: Tensor  # [R] float32


class SavedFinalLayer(NamedTuple):
    """What forward saves of the final layer."""

    hidden: Tensor  # [R, W]
    mean: Tensor  # [R] float32
    rstd: Tensor  # [R] float32
    mod: Tensor  # [E, 2W]; for group = 1 the scale, [R, W]
    modulated: Tensor  # [R, W]; for group = 1 v | s, [R, 2W]


def output_weights(final: FinalLayer, width: int) -> tuple[Tensor, Tensor]:
    """``[W_l | W_l W_s]`` ``[D, 2W]`` and its bias ``[D]``, in the final layer's dtype, products in float32."""
    last = final.weight_out.float()
    product = last @ final.weight_mod[:width].float()
    bias = final.bias_out.float() + last @ final.bias_mod[:width].float()
    return torch.cat([final.weight_out, product.to(final.weight_out.dtype)], 1), bias.to(final.bias_out.dtype)


class ResidualStream:
    """The rows between the layers of a forward: ``hidden``, in which row r starts from row ``index[r]``, and the ffn
    and gate of a block whose residual the next norm adds."""

    def __init__(self, hidden: Tensor, index: Tensor | None, group: int, eps: float, dependent: bool = False) -> None:
        self.hidden, self._index = dense_rows(hidden), index
        self._unadded: tuple[Tensor, ...] = ()
        self._runs, self._eps, self._dependent = Runs(group, group), eps, dependent

    def normalise(
        self, shift: Tensor | None, scale: Tensor, norm: Sequence[Tensor], temperature: float, u: Tensor, save: bool
    ) -> list[Tensor]:
        """Add what is unadded and write the norm, modulated, to ``u``; ``norm`` is its weight and bias, if it has
        any. Returns its statistics with ``save``."""
        stats = [u.new_empty(len(u), dtype=torch.float32) for _ in range(2)] if save else []
        residual = (*self._unadded, self.hidden.new_empty(u.shape)) if self._unadded else ()
        adaln.launch_forward(
            self.hidden, shift, scale, norm, u, stats, runs=self._runs, eps=self._eps, temperature=temperature,
            index=self._index, residual=residual, next_is_dependent=self._dependent,
        )  # fmt: skip
        if residual:
            self.hidden, self._index, self._unadded = residual[-1], None, ()
        return stats

    def add(self, active: Tensor, block: Block, gate: Tensor, save: bool) -> Tensor | None:
        """Add ``gate`` times the block's second linear of ``active``, which is returned where it is stored, as with
        ``save`` it always is."""
        if self._runs.group == 1 and self._index is None:
            weights = (block.weight_out, block.bias_out)
            fused = ffn_ops.gated_linear(active, *weights, self.hidden, gate, save, self._dependent)
            if fused is not None:
                self.hidden, ffn = fused
                return ffn
        ffn = linear(active, block.weight_out, block.bias_out)
        self._unadded = (ffn, gate)
        return ffn

    def block(self, block: Block, shift: Tensor, scale: Tensor, gate: Tensor, temperature: float, u: Tensor) -> None:
        """A whole block of which nothing is saved; ``u``, which may be ``shift``, is overwritten."""
        self.normalise(shift, scale, (block.norm_weight, block.norm_bias), temperature, u, False)
        _, active = ffn_ops.silu_linear(u, block.weight_in, block.bias_in, False, self._dependent)
        self.add(active, block, gate, False)


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

    Without ``save`` and with group = 1, :mod:`launch_inference` does the same faster.
    """
    blocks, final = split_parameters(parameters)
    entries, width = conditioning.shape
    rows = entries * group
    stream = ResidualStream(hidden, index, group, eps)
    wide = conditioning.new_empty((entries, 2 * width)) if group == 1 else None
    activated = ffn_ops.silu(conditioning.contiguous(), wide[:, width:] if wide is not None else None)
    saved: list[Tensor] = []
    for block in blocks:
        mod = linear(activated, block.weight_mod, block.bias_mod)
        shift, scale, gate = mod.split(width, 1)
        u = shift if group == 1 else mod.new_empty((rows, width))
        stats = stream.normalise(shift, scale, (block.norm_weight, block.norm_bias), temperature, u, save)
        pre, active = ffn_ops.silu_linear(u, block.weight_in, block.bias_in, save)
        ffn = stream.add(active, block, gate, save)
        if pre is not None and ffn is not None:
            saved += SavedBlock(mod, mod.new_empty(0) if group == 1 else u, pre, ffn, *stats)
        del u, active, pre, ffn, mod, shift, scale, gate
    if wide is not None:
        mod = linear(activated, final.weight_mod[width:], final.bias_mod[width:])
        stats = stream.normalise(None, mod, (), 1.0, wide[:, :width], save)
        out, modulated = linear(wide, *output_weights(final, width)), wide
    else:
        mod = linear(activated, final.weight_mod, final.bias_mod)
        modulated = mod.new_empty((rows, width))
        stats = stream.normalise(mod[:, :width], mod[:, width:], (), 1.0, modulated, save)
        out = linear(modulated, final.weight_out, final.bias_out)
    if save:
        saved += SavedFinalLayer(stream.hidden, stats[0], stats[1], mod, modulated)
    return [out, *saved]


class _Backward:
    """One backward pass, layer by layer from the last: ``grad_hidden``, ``grad_activated`` and the sums, ``grad_ffn``
    and ``grad_mod`` that a layer's kernel leaves for the block before it."""

    def __init__(
        self,
        hidden: Tensor,
        conditioning: Tensor,
        parameters: list[Tensor],
        saved: list[Tensor],
        index: Tensor | None,
        group: int,
        dtypes: list[torch.dtype],
        reuse: bool,
    ) -> None:
        self.blocks, self.final_layer = split_parameters(parameters)
        self.depth, (entries, self.width) = len(self.blocks), conditioning.shape
        kinds = [Block] * self.depth + [FinalLayer]
        names = [(layer, name) for layer, kind in enumerate(kinds) for name in kind._fields]
        self.dtypes = dict(zip(names, dtypes, strict=True))
        self.gradients: dict[tuple[int, str], Tensor] = {}
        size = len(SavedBlock._fields)
        self.saved = [SavedBlock(*saved[size * layer : size * (layer + 1)]) for layer in range(self.depth)]
        self.saved_final = SavedFinalLayer(*saved[size * self.depth :])
        self.hidden, self.conditioning, self.index, self.group, self.reuse = hidden, conditioning, index, group, reuse
        self.grad_hidden = hidden.new_empty((entries * group, self.width))
        # Of every block but the first: the input of its norm, rebuilt.
        self.rebuilt = self.memory_of(self.saved_final.hidden) if self.depth > 1 else None
        self.sums = ColumnSums()

    def store(self, layer: int, name: str, value: Tensor | None) -> None:
        """The gradient of a parameter of a block, or of the final layer after them, in the dtype asked for.

        Rows of one kernel's sums share memory, which outputs of a library operation must not: copies part them.
        """
        assert value is not None
        self.gradients[layer, name] = value.to(self.dtypes[layer, name], copy=not self.reuse)

    def store_product(self, layer: int, name: str, grad: Tensor, x: Tensor) -> None:
        """The parameter's gradient is ``grad^T @ x``."""
        self.gradients[layer, name] = weight_gradient(grad, x, self.dtypes[layer, name])

    def memory_of(self, saved: Tensor) -> Tensor:
        """Memory for a tensor of the same shape: that of ``saved`` itself where that may be overwritten."""
        return saved if self.reuse else torch.empty_like(saved)

    def norm(
        self, layer: int, grad_modulated: Tensor, inputs: NormInputs, grad_shift: Tensor | None, grad_scale: Tensor
    ) -> None:
        """Back through the layer's norm and modulation and the gated residual of the block before."""
        previous = None
        if layer > 0:
            before = self.saved[layer - 1]
            self.grad_mod = self.memory_of(before.mod) if self.group == 1 else torch.empty_like(before.mod)
            self.grad_ffn = self.memory_of(before.ffn)
            gate, grad_gate = before.mod[:, 2 * self.width :], self.grad_mod[:, 2 * self.width :]
            rebuilt = self.rebuilt if layer > 1 else None
            previous = PreviousBlock(before.ffn, gate, self.grad_ffn, grad_gate, rebuilt)
        self.sums = adaln.launch_backward(
            grad_modulated, inputs, self.grad_hidden, grad_shift, grad_scale, runs=Runs(self.group, self.group),
            grad_residual=self.grad_hidden if layer < self.depth else None, previous=previous,
            sum_modulation=self.group == 1,
        )  # fmt: skip

    def final(self, grad_out: Tensor) -> None:
        """Back through the final layer."""
        depth, width, layer, saved = self.depth, self.width, self.final_layer, self.saved_final
        sum_out = column_sums(grad_out)
        self.store(depth, "bias_out", sum_out)
        if self.group > 1:
            self.activated = ffn_ops.silu(self.conditioning.contiguous())
            self.store_product(depth, "weight_out", grad_out, saved.modulated)
            grad_mod = torch.empty_like(saved.mod)
            inputs = NormInputs(saved.hidden, saved.mod[:, width:], None, None, saved.mean, saved.rstd)
            self.norm(depth, torch.mm(grad_out, layer.weight_out), inputs, grad_mod[:, :width], grad_mod[:, width:])
            self.store(depth, "bias_mod", column_sums(grad_mod))
            self.store_product(depth, "weight_mod", grad_mod, self.activated)
            self.grad_activated = torch.mm(grad_mod, layer.weight_mod)
            return
        self.activated = saved.modulated[:, width:]
        last = layer.weight_out.float()
        both = weight_gradient(grad_out, saved.modulated, torch.float32)
        product = both[:, width:]
        shift_weight, shift_bias = layer.weight_mod[:width].float(), layer.bias_mod[:width].float()
        grad_weight = both[:, :width] + product @ shift_weight.t() + torch.outer(sum_out, shift_bias)
        self.store(depth, "weight_out", grad_weight)
        into = saved.modulated[:, :width] if self.reuse else None
        grad_modulated = torch.mm(grad_out, layer.weight_out, out=into)
        self.grad_activated = torch.mm(grad_out, output_weights(layer, width)[0][:, width:])
        grad_scale = self.memory_of(saved.mod)
        inputs = NormInputs(saved.hidden, saved.mod, None, None, saved.mean, saved.rstd)
        self.norm(depth, grad_modulated, inputs, None, grad_scale)
        assert self.sums.scale is not None
        self.store(depth, "bias_mod", torch.cat((sum_out @ last, self.sums.scale)))
        grad_scale_weight = weight_gradient(grad_scale, self.activated, torch.float32)
        self.store(depth, "weight_mod", torch.cat((last.t() @ product, grad_scale_weight)))
        self.grad_activated.addmm_(grad_scale, layer.weight_mod[width:])

    def block(self, layer: int) -> None:
        """Back through a block whose gated residual the layer after it has done."""
        width, block, saved = self.width, self.blocks[layer], self.saved[layer]
        grad_mod, grad_ffn, sums_after = self.grad_mod, self.grad_ffn, self.sums
        active = self.memory_of(saved.pre)
        grad_pre = torch.mm(grad_ffn, block.weight_out)
        self.store(layer, "bias_in", ffn_ops.silu_backward(grad_pre, saved.pre, grad_pre, active))
        self.store_product(layer, "weight_out", grad_ffn, active)
        self.store(layer, "bias_out", sums_after.ffn)
        shift, scale, _ = saved.mod.split(width, 1)
        self.store_product(layer, "weight_in", grad_pre, shift if self.group == 1 else saved.modulated)
        grad_shift, grad_scale, _ = grad_mod.split(width, 1)
        # For one modulation a row the shift's gradient is du itself: let the GEMM write it there.
        grad_modulated = torch.mm(grad_pre, block.weight_in, out=grad_shift if self.group == 1 else None)
        del grad_pre, active, grad_ffn
        hidden = self.hidden if layer == 0 else self.rebuilt
        assert hidden is not None
        index = self.index if layer == 0 else None
        inputs = NormInputs(hidden, scale, block.norm_weight, block.norm_bias, saved.mean, saved.rstd, index)
        self.norm(layer, grad_modulated, inputs, None if self.group == 1 else grad_shift, grad_scale)
        self.store(layer, "norm_weight", self.sums.weight)
        self.store(layer, "norm_bias", self.sums.bias)
        if self.group == 1:
            parts = (self.sums.shift, self.sums.scale, sums_after.gate)
            self.store(layer, "bias_mod", torch.cat([part for part in parts if part is not None]))
        else:
            self.store(layer, "bias_mod", column_sums(grad_mod))
        self.store_product(layer, "weight_mod", grad_mod, self.activated)
        self.grad_activated.addmm_(grad_mod, block.weight_mod)


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
    *,
    reuse: bool,
) -> list[Tensor]:
    """[gradient of hidden, of conditioning, of each parameter (in its ``dtypes`` entry)].

    ``reuse`` writes into ``saved`` (see above).
    """
    run = _Backward(dense_rows(hidden), conditioning, parameters, saved, index, group, dtypes, reuse)
    run.final(dense_rows(grad_out))
    for layer in reversed(range(run.depth)):
        run.block(layer)
    grad_conditioning = conditioning.new_empty(conditioning.shape)
    ffn_ops.silu_backward(run.grad_activated, dense_rows(conditioning), grad_conditioning)
    gradients = [run.gradients[parameter] for parameter in run.dtypes]
    return [_sum_samples(run.grad_hidden, hidden, index, inverse), grad_conditioning, *gradients]


def _sum_samples(grad_rows: Tensor, hidden: Tensor, index: Tensor | None, inverse: Tensor | None) -> Tensor:
    """The gradient of ``hidden [T, W]`` from that of its rows."""
    if index is None:
        return grad_rows
    if not grad_rows.numel():
        return torch.zeros_like(hidden)
    if inverse is not None:
        grad_rows = grad_rows[inverse]
    return grad_rows.view(hidden.shape[0], -1, hidden.shape[1]).sum(1)
