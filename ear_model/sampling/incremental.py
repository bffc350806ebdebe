"""A decoding step of EAR's backbone and no more: what is known from the steps before is kept, not computed again.

The maths is :func:`ear_model.sampling.decoding.decode_tokens`'s. Saved are, exactly: the queries, keys and values of
the first block for tokens that did not change; the last block but for the keys and values of tokens that are not
predicted; casts of weights. Legend: :mod:`ear_model.sampling.state`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ear_kernels.functional import write_rows, write_tokens
from ear_model.sampling.state import Decoding
from ear_model.sampling.steps import SamplingModel
from ear_model.sampling.weights import Weights


class IncrementalDecoding(Decoding):
    """The buffers of a batch and the steps of :class:`ear_model.model.backbone.Backbone` over them."""

    def __init__(self, model: SamplingModel, weights: Weights, batch: int, *, guided: bool) -> None:
        super().__init__(model, weights, batch, guided=guided)
        shape = self.sequences, self.length, 3 * self.config.width
        self.qkv_GS3 = torch.zeros(shape, dtype=self.dtype, device=self.left.device)

    def step_name(self, known: int) -> tuple[int, ...]:
        return ()

    def begin(self) -> None:
        """All tokens masked: the first block's inputs, and their queries, keys and values."""
        backbone, prefix = self.model.backbone, self.prefix
        # Rounded where the plain loop's embedding is.
        dtype = self.dtype if self.weights.embed is not None else self.position_SC.dtype
        self.start_GSC[:, :prefix] = self.classes_GC.to(dtype).unsqueeze(1) + self.position_SC[:prefix]
        self.start_GSC[:, prefix:] = backbone.mask_token[0].to(dtype) + self.position_SC[prefix:]
        first = self.weights.blocks[0]
        self.qkv_GS3.copy_(first.qkv(first.norm1(self.start_GSC, dtype=self.dtype)))
        self.tokens_BLD.zero_()
        self.left.fill_(self.config.num_tokens)

    def hidden(self, known: int, count: int, guided: bool = False) -> tuple[Tensor, Tensor]:
        sequences = self.sequences if guided else self.batch
        # Without guidance the classes' sequences alone: they come first.
        start_GSC, stream_GSC, qkv_GS3 = (x[:sequences] for x in (self.start_GSC, self.stream_GSC, self.qkv_GS3))
        # The first block's input stays as it is: the next step starts from it.
        stream, branches = self.run_blocks(self.weights.blocks[:-1], start_GSC, stream_GSC, qkv_GS3)
        return self.predict_last(count, guided, stream, branches, stream_GSC)

    def write(self, rows_GK: Tensor, sampled_RD: Tensor, count: int) -> None:
        first, embed = self.weights.blocks[0], self.weights.embed
        norm = first.norm1.weight, first.norm1.bias, first.norm1.eps
        if embed is not None:
            linear = embed.weight, embed.bias
            normed_RC = write_tokens(
                sampled_RD, self.tokens_BLD, self.start_GSC, rows_GK, linear, self.position_SC, norm
            )
        else:
            normed_RC = self._write_indices(rows_GK, sampled_RD)
        write_rows(first.qkv(normed_RC), self.qkv_GS3, rows_GK, self.left, count)

    def _write_indices(self, rows_GK: Tensor, sampled_R1: Tensor) -> Tensor:
        """As :func:`ear_kernels.functional.write_tokens`, of tokens that are indices into a table."""
        own_R = rows_GK[: len(sampled_R1)]
        places_R, width = own_R % self.length, self.config.width
        kept_R = own_R // self.length * self.config.num_tokens + places_R - self.prefix
        self.tokens_BLD.flatten(0, 1).index_copy_(0, kept_R, sampled_R1)
        x_RC = self.model.backbone.z_proj(sampled_R1) + self.position_SC[places_R]
        self.start_GSC.flatten(0, 1).index_copy_(0, rows_GK, x_RC.repeat(len(rows_GK) // len(own_R), 1))
        norm = self.weights.blocks[0].norm1
        return F.layer_norm(x_RC, (width,), norm.weight, norm.bias, norm.eps).to(self.dtype)
