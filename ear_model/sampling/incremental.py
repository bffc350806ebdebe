"""A decoding step of EAR's backbone and no more: what is known from the steps before is kept, not computed again.

The maths is :func:`ear_model.sampling.decoding.decode_tokens`'s. Saved are, exactly: the queries, keys and values of
the first block for tokens that did not change; the last block but for the keys and values of tokens that are not
predicted; casts of weights. Legend: :mod:`ear_model.sampling.state`.
"""

import torch
from torch import Tensor

from ear_kernels.functional import write_rows
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
        normed_RC = self.write_start(rows_GK, sampled_RD)
        write_rows(self.weights.blocks[0].qkv(normed_RC), self.qkv_GS3, rows_GK, self.left, count)
