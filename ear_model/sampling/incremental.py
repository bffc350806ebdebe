"""The work of a decoding step and no more: what is known from the steps before is kept, not computed again.

The maths is :func:`ear_model.sampling.decoding.decode_tokens`'s. Saved are, exactly: the queries, keys and values of
the first block for tokens that did not change; the last block but for the keys and values of tokens that are not
predicted; casts of weights. Every step reads and writes the same memory, so a CUDA graph can hold it; how many tokens
are left is a number on the device.

Legend: B images, G sequences (2 B with guidance: the classes' first, then the null class's), P class tokens, L image
tokens, S = P + L, k tokens predicted of each image, C width, D token size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ear_kernels.functional import (
    attention,
    attention_rows,
    guided_norm,
    predicted_rows,
    write_rows,
    write_tokens,
)
from ear_model.config import SamplingConfig
from ear_model.draws import Draws, ImageDraws
from ear_model.model.masking import draw_orders, guidance_scale
from ear_model.sampling.steps import SamplingModel
from ear_model.sampling.weights import DEPENDENT, Room, Weights

MOST_PREPARED = 2**27
"""Bytes that are kept of what can be computed of all noise before the first step: 12 images of EAR-B."""


class IncrementalDecoding:
    """The buffers of a batch, and the steps over them.

    Args:
        model: in eval mode.
        weights: of the model.
        batch: B.
        guided: whether there is guidance.
    """

    def __init__(self, model: SamplingModel, weights: Weights, batch: int, *, guided: bool) -> None:
        self.model, self.weights, self.batch, self.guided = model, weights, batch, guided
        self.sequences = 2 * batch if guided else batch
        self.config, self.dtype = model.config, weights.dtype
        config, dtype = self.config, self.dtype
        position = model.backbone.decoder_pos_embed_learned.detach()
        self.position_SC = position[0]
        tokens, width, self.prefix = config.num_tokens, config.width, config.class_tokens

        def new(*shape: int, dtype: torch.dtype = position.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=position.device)

        length = self.prefix + tokens
        self.tokens_BLD, self.orders_BL = new(batch, tokens, config.token_dim), new(batch, tokens, dtype=torch.int64)
        self.noise_BLE: Tensor | None = None
        self.prepared_RM: Tensor | None = None
        self.classes_GC, self.scales = new(self.sequences, width), new(tokens + 1)
        self.start_GSC, self.stream_GSC = new(self.sequences, length, width), new(self.sequences, length, width)
        self.qkv_GS3 = new(self.sequences, length, 3 * width, dtype=dtype)
        self.room = Room(weights, self.sequences * length)
        self.left = new(1, dtype=torch.int64)
        self.places_L = torch.arange(tokens, device=position.device)

    def fill(self, labels_B: Tensor, sampling: SamplingConfig, draws: Draws, counts: Sequence[int]) -> None:
        """Put what is decoded next into the buffers; orders and noise are drawn as the plain loop draws them.

        Args:
            labels_B: the classes.
            sampling: for the guidance.
            draws: where orders and noise come from.
            counts: tokens of each step.
        """
        tokens = self.config.num_tokens
        classes = [self.model.backbone.embed_classes(labels_B)]
        if self.guided:
            classes.append(self.model.backbone.null_class(self.batch))
        self.classes_GC.copy_(torch.cat(classes))
        scales = [
            guidance_scale(sampling.guidance, sampling.guidance_schedule, tokens, keep) for keep in range(tokens + 1)
        ]
        self.scales.copy_(torch.tensor(scales))
        self.orders_BL.copy_(draw_orders(sampling.order, self.batch, tokens, labels_B.device, draws))
        # An image's own numbers are the same however a draw is divided.
        parts = [tokens] if isinstance(draws, ImageDraws) else counts
        like, draw = self.start_GSC, self.model.score.draw_noise
        noise_BLE = torch.cat([draw(self.batch, count, like=like, draws=draws) for count in parts], 1)
        if self.noise_BLE is None:
            self.noise_BLE = torch.empty_like(noise_BLE)
        self.noise_BLE.copy_(noise_BLE)

    def prepare(self, temperature: float) -> None:
        """What is computed of the noise before the first step, if that is not too much to keep."""
        score, rows = self.model.score, self.batch * self.config.num_tokens
        assert self.noise_BLE is not None
        self.temperature: float | None = temperature
        if score.prepared_bytes(rows) <= MOST_PREPARED:
            self.temperature = None
            self.prepared_RM = score.prepare(self.noise_BLE.flatten(0, 1), temperature, self.prepared_RM)

    def begin(self) -> None:
        """All tokens masked: the first block's inputs, and their queries, keys and values."""
        backbone, prefix = self.model.backbone, self.prefix
        # Rounded where the plain loop's embedding is.
        self.start_GSC[:, :prefix] = self.classes_GC.to(self.dtype).unsqueeze(1) + self.position_SC[:prefix]
        self.start_GSC[:, prefix:] = backbone.mask_token[0].to(self.dtype) + self.position_SC[prefix:]
        first = self.weights.blocks[0]
        self.qkv_GS3.copy_(first.qkv(first.norm1(self.start_GSC, dtype=self.dtype)))
        self.tokens_BLD.zero_()
        self.left.fill_(self.config.num_tokens)

    def step(self, count: int, guided: bool = True) -> None:
        """Predict ``count`` tokens of every image; where there is guidance, it can be left out."""
        self._finish(count, *self.hidden(count, guided and self.guided))

    def first_step(self, count: int, hidden_TLC: Tensor, places_G: Tensor, guided: bool = True) -> None:
        """:meth:`step` while all tokens are masked, from hidden states of the classes at these places of a table."""
        length, tokens = self.prefix + self.config.num_tokens, self.config.num_tokens
        positions_Bk = self.orders_BL[:, tokens - count :]
        positions_Gk = positions_Bk.repeat(2, 1) if self.guided else positions_Bk
        starts_G1 = torch.arange(0, self.sequences * length, length, device=positions_Gk.device).unsqueeze(1)
        hidden_RC = hidden_TLC.flatten(0, 1)[(places_G.unsqueeze(1) * tokens + positions_Gk).flatten()]
        if self.guided:
            scale = self.scales[tokens - count] if guided else 1.0
            own_RC, null_RC = hidden_RC.chunk(2)
            hidden_RC = scale * own_RC + (1 - scale) * null_RC
        self._finish(count, (positions_Gk + starts_G1 + self.prefix).flatten(), hidden_RC)

    def _finish(self, count: int, rows_GK: Tensor, hidden_RC: Tensor) -> None:
        """Sample tokens from guided hidden states, and write them where the next step reads them."""
        tokens, score = self.config.num_tokens, self.model.score
        drawn_k = tokens - self.left + self.places_L[:count]
        assert self.noise_BLE is not None
        if self.temperature is None:
            assert self.prepared_RM is not None
            drawn_RM = self.prepared_RM.view(self.batch, tokens, -1)[:, drawn_k].flatten(0, 1)
            sampled_RD = score.sample_prepared(hidden_RC, None, 1.0, drawn_RM)
        else:
            noise_RE = self.noise_BLE[:, drawn_k].flatten(0, 1)
            sampled_RD = score.sample(hidden_RC, None, 1.0, self.temperature, noise_RE)
        first, embed = self.weights.blocks[0], self.weights.embed
        norm = first.norm1.weight, first.norm1.bias, first.norm1.eps
        normed_RC = write_tokens(
            sampled_RD, self.tokens_BLD, self.start_GSC, rows_GK, (embed.weight, embed.bias), self.position_SC, norm
        )
        write_rows(first.qkv(normed_RC), self.qkv_GS3, rows_GK, self.left, count)

    def hidden(self, count: int, guided: bool = False) -> tuple[Tensor, Tensor]:
        """The rows of the ``G S`` that are predicted, and their hidden states ``[B k, C]``, guided or not."""
        width, blocks = self.config.width, self.weights.blocks
        sequences = self.sequences if guided else self.batch
        # Without guidance the classes' sequences alone: they come first.
        start_GSC, stream_GSC, qkv_GS3 = (x[:sequences] for x in (self.start_GSC, self.stream_GSC, self.qkv_GS3))
        # The first block's input stays as it is: the next step starts from it.
        stream, branches = start_GSC, list[tuple[Tensor, Tensor]]()
        for number, block in enumerate(blocks[:-1]):
            if number == 0:
                qkv = qkv_GS3
            else:
                normed = block.norm1(stream, *branches, out_stream=stream_GSC, **block.qkv.takes)
                rows = normed.numel() // width
                stream, qkv = stream_GSC, block.qkv(normed, out=self.room(rows, 3 * width, self.dtype))
            projected = block.proj(attention(qkv, block.heads, dependent=DEPENDENT, **block.proj.takes), bias=False)
            branches = [(projected, block.proj.own_bias)]
            # The stream is read twice and written once in a block: the next norm adds both branches.
            normed = block.norm2(stream, *branches, **block.fc1.takes)
            branches.append((block.mlp(normed, self.room), block.fc2.own_bias))
        last = blocks[-1]
        # The last block gathers rows of the stream, so all must be in it.
        written = {"out_stream": stream_GSC} if branches else {}
        normed = last.norm1(stream, *branches, **written, **last.qkv.takes)
        stream = stream_GSC if branches else stream
        kv = last.qkv(normed, rows=slice(width, None))
        norm = last.norm1
        rows_GK, rows_RC, normed = predicted_rows(
            stream, self.orders_BL, self.left, count, norm.weight, norm.bias, eps=norm.eps, dtype=self.dtype
        )
        query = last.qkv(normed, rows=slice(width)).view(sequences, -1, width)
        mixed = attention_rows(query, kv, last.heads, dependent=DEPENDENT).view(-1, width)
        branch = last.proj(mixed, bias=False), last.proj.own_bias
        normed = last.norm2(rows_RC, branch, out_stream=rows_RC, dtype=self.dtype)
        scales, norm = self.scales if guided else None, self.weights.norm
        after = norm.weight, norm.bias, scales, self.left, count
        hidden_RC = guided_norm(last.mlp(normed), last.fc2.own_bias, rows_RC, *after, eps=norm.eps)
        if sequences < self.sequences:
            # The tokens are written for the null class, too.
            rows_GK = torch.cat([rows_GK, rows_GK + sequences * stream_GSC.shape[1]])
        return rows_GK, hidden_RC
