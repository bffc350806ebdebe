"""A decoding step of a causal backbone: one new row of each sequence, over cached keys and values.

The maths is :func:`ear_model.sampling.causal.decode_causal`'s. How many tokens are known is a number on the device,
so one graph serves all steps but the first. The null class's sequences are computed in every step; where there is no
guidance their weight is 0. Legend: :mod:`ear_model.sampling.state`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ear_kernels.functional import attention_cached, guided_norm
from ear_model.config import SamplingConfig
from ear_model.draws import Draws
from ear_model.sampling.state import Branches, Decoding
from ear_model.sampling.steps import SamplingModel
from ear_model.sampling.weights import DEPENDENT, Weights


class CausalDecoding(Decoding):
    """The buffers of a batch and the steps of :class:`ear_model.model.causal.CausalBackbone` over them."""

    is_causal = True

    def __init__(self, model: SamplingModel, weights: Weights, batch: int, *, guided: bool) -> None:
        super().__init__(model, weights, batch, guided=guided)
        # The order's last token is no input, and the first one's is the prefix's last row.
        self.rows_LG = (self.prefix + model.backbone.order_L).unsqueeze(1) + self.starts_G
        shape = len(weights.blocks), 2, self.sequences, self.length - 1, self.config.width
        self.cache = torch.zeros(shape, dtype=self.dtype, device=self.left.device)
        self.next_GC = torch.zeros_like(self.classes_GC)

    def fill(self, labels_B: Tensor, sampling: SamplingConfig, draws: Draws, counts: Sequence[int]) -> None:
        super().fill(labels_B, sampling, draws, counts)
        tokens = self.config.num_tokens
        for keep in range(tokens):
            if not sampling.guides(keep + 1, tokens):
                self.guidance[keep] = 1.0
        self.scales.copy_(torch.tensor(self.guidance))

    def step_name(self, known: int) -> tuple[int, ...]:
        return (min(known, 1),)

    def begin(self) -> None:
        self.tokens_BLD.zero_()
        self.left.fill_(self.config.num_tokens)

    def hidden(self, known: int, count: int, guided: bool = False) -> tuple[Tensor, Tensor]:
        stream, branches = self._new_row() if known else self._prefix()
        scales, norm = self.scales if self.guided and self.head.mixes_hidden else None, self.weights.norm
        (branch, first), (last, bias) = branches
        # The norm takes one branch: the other is in the stream by then.
        rows_GC = stream + branch.to(stream.dtype) + first.to(stream.dtype)
        after = norm.weight, norm.bias, scales, self.left, count
        hidden_RC = guided_norm(last, bias, rows_GC, *after, eps=norm.eps)
        return self.rows_LG.index_select(0, self.drawn(1)).flatten(), hidden_RC

    def write(self, rows_GK: Tensor, sampled_RD: Tensor, count: int) -> None:
        self.write_start(rows_GK, sampled_RD)
        self.next_GC.copy_(self.start_GSC.flatten(0, 1).index_select(0, rows_GK))
        self.left -= count

    def _new_row(self) -> tuple[Tensor, Branches]:
        """The blocks over the tokens that were written last."""
        stream_GC, branches = self.next_GC, Branches()
        place = self.prefix - 1 + self.config.num_tokens - self.left
        for block, cache in zip(self.weights.blocks, self.cache, strict=True):
            written = {"out_stream": stream_GC} if branches else {}
            qkv = block.qkv(block.norm1(stream_GC, *branches, **written, **block.qkv.takes))
            mixed = attention_cached(qkv, cache, place, block.heads, dependent=DEPENDENT)
            branches = [(block.proj(mixed, bias=False), block.proj.own_bias)]
            normed = block.norm2(stream_GC, *branches, **block.fc1.takes)
            branches.append((block.mlp(normed), block.fc2.own_bias))
        return stream_GC, branches

    def _prefix(self) -> tuple[Tensor, Branches]:
        """The blocks over the class's rows; of what comes out the last row."""
        prefix, heads = self.prefix, self.config.num_heads
        stream = (self.classes_GC.unsqueeze(1) + self.position_SC[:prefix]).contiguous()
        branches = Branches()
        for block, cache in zip(self.weights.blocks, self.cache, strict=True):
            written = {"out_stream": stream} if branches else {}
            qkv = block.qkv(block.norm1(stream, *branches, **written, **block.qkv.takes))
            query, key, value = qkv.chunk(3, -1)
            cache[0, :, :prefix], cache[1, :, :prefix] = key, value
            q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            branches = [(block.proj(mixed, bias=False), block.proj.own_bias)]
            normed = block.norm2(stream, *branches, **block.fc1.takes)
            branches.append((block.mlp(normed), block.fc2.own_bias))
        return stream[:, -1].contiguous(), [(branch[:, -1].contiguous(), bias) for branch, bias in branches]
