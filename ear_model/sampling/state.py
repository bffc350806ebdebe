"""What a batch is decoded in: buffers that stay where they are, so that CUDA graphs can hold the steps.

How many tokens are left is a number on the device. Orders and noise are drawn as the plain loop draws them.

Legend: B images, G sequences (2 B with guidance: the classes' first, then the null class's), P class tokens, L image
tokens, S = P + L, k tokens predicted of each image, C width, D token size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ear_kernels.functional import attention, attention_rows, guided_norm, predicted_rows, write_tokens
from ear_model.config import SamplingConfig
from ear_model.draws import Draws, ImageDraws
from ear_model.model.masking import draw_orders, guidance_scale
from ear_model.sampling.heads import Piece, make_head
from ear_model.sampling.steps import SamplingModel, score_options
from ear_model.sampling.weights import DEPENDENT, Block, Room, Weights

Branches = list[tuple[Tensor, Tensor]]


class Decoding:
    """The buffers of a batch, and the steps over them.

    Args:
        model: in eval mode.
        weights: of the model.
        batch: B.
        guided: whether there is guidance.
    """

    is_causal = False
    """Whether the order is the model's own."""

    def __init__(self, model: SamplingModel, weights: Weights, batch: int, *, guided: bool) -> None:
        self.model, self.weights, self.batch, self.guided = model, weights, batch, guided
        self.sequences = 2 * batch if guided else batch
        self.config, self.dtype = model.config, weights.dtype
        config, position = self.config, model.backbone.decoder_pos_embed_learned.detach()
        self.position_SC = position[0]
        tokens, width, self.prefix = config.num_tokens, config.width, config.class_tokens

        def new(*shape: int, dtype: torch.dtype = position.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=position.device)

        self.length = self.prefix + tokens
        self.tokens_BLD = new(batch, tokens, model.score.token_size)
        self.orders_BL = new(batch, tokens, dtype=torch.int64)
        self.classes_GC, self.scales = new(self.sequences, width), new(tokens + 1)
        self.start_GSC, self.stream_GSC = (new(self.sequences, self.length, width) for _ in range(2))
        self.room = Room(weights, self.sequences * self.length)
        self.left, self.rows = new(1, dtype=torch.int64), new(self.sequences * tokens, dtype=torch.int64)
        self.places_L = torch.arange(tokens, device=position.device)
        self.starts_G = torch.arange(0, self.sequences * self.length, self.length, device=position.device)
        self.score_options: dict[str, Any] = {}
        self.noise_BLE = new(batch, tokens, 0)
        self._noise: dict[int, Tensor] = {}
        self.head = make_head(self)

    def fill(self, labels_B: Tensor, sampling: SamplingConfig, draws: Draws, counts: Sequence[int]) -> None:
        """Put what is decoded next into the buffers.

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
        schedule = sampling.guidance_schedule
        self.guidance = [guidance_scale(sampling.guidance, schedule, tokens, keep) for keep in range(tokens + 1)]
        self.scales.copy_(torch.tensor(self.guidance))
        if not self.is_causal:
            self.orders_BL.copy_(draw_orders(sampling.order, self.batch, tokens, labels_B.device, draws))
        self.score_options = score_options(self.model, sampling)
        # An image's own numbers are the same however a draw is divided.
        parts = [tokens] if isinstance(draws, ImageDraws) and self.head.draws_once else counts
        options: dict[str, Any] = {"like": self.start_GSC, "draws": draws, **self.score_options}
        drawn = [self.model.score.draw_noise(self.batch, count, **options) for count in parts]
        size = drawn[0].shape[-1]
        if size not in self._noise:
            self._noise[size] = drawn[0].new_empty(self.batch, tokens, size)
        self.noise_BLE = torch.cat(drawn, 1, out=self._noise[size])

    def prepare(self, sampling: SamplingConfig) -> None:
        """What is computed before the first step, of the noise and of the weights."""
        self.head.prepare(sampling)

    def pieces(self, known: int, count: int, guided: bool, table: tuple[Tensor, Tensor] | None = None) -> list[Piece]:
        """Of the step that predicts ``count`` tokens of every image when ``known`` are.

        Args:
            guided: where there is guidance, it can be left out.
            table: for the first step, hidden states of classes, and the classes' places among them.
        """
        guided = guided and self.guided
        if table is None:
            predict: Callable[[], tuple[Tensor, Tensor]] = partial(self.hidden, known, count, guided)
            return self.head.pieces(("step", *self.step_name(known)), known, count, guided, predict)
        predict = partial(self._first_hidden, count, *table, guided)
        return self.head.pieces(("first step",), known, count, guided, predict)

    def step(self, known: int, count: int, guided: bool = True) -> None:
        """All pieces of a step, one after the other."""
        for _, work in self.pieces(known, count, guided):
            work()

    def drawn(self, count: int) -> Tensor:
        """Places of the next tokens among the noise, ``[count]``."""
        return self.config.num_tokens - self.left + self.places_L[:count]

    # Of each kind of backbone.

    def step_name(self, known: int) -> tuple[int, ...]:
        """What the shapes of a step depend on beside the number of tokens that it predicts."""
        raise NotImplementedError

    def begin(self) -> None:
        """All tokens masked."""
        raise NotImplementedError

    def hidden(self, known: int, count: int, guided: bool = False) -> tuple[Tensor, Tensor]:
        """The rows of the ``G S`` that are predicted, and their hidden states.

        Those are ``[B k, C]``; with guidance mixed, or ``[2 B k, C]`` if the score is to mix what it makes of them.
        """
        raise NotImplementedError

    def write(self, rows_GK: Tensor, sampled_RD: Tensor, count: int) -> None:
        """Put sampled tokens where the next step reads them."""
        raise NotImplementedError

    # What they share.

    def run_blocks(
        self, blocks: Sequence[Block], start_GSC: Tensor, stream_GSC: Tensor, qkv_GS3: Tensor | None = None
    ) -> tuple[Tensor, Branches]:
        """Blocks over a start, which stays as it is if it is no ``stream_GSC``: the stream and what is to be added.

        ``qkv_GS3``: those of the first block, if they are known.
        """
        width = self.config.width
        stream, branches = start_GSC, Branches()
        for number, block in enumerate(blocks):
            if number == 0 and qkv_GS3 is not None:
                qkv = qkv_GS3
            else:
                written = {"out_stream": stream_GSC} if branches else {}
                normed = block.norm1(stream, *branches, **written, **block.qkv.takes)
                stream = stream_GSC if branches else stream
                qkv = block.qkv(normed, out=self.room(normed.numel() // width, 3 * width, self.dtype))
            mixed = attention(qkv.view(*stream.shape[:2], -1), block.heads, dependent=DEPENDENT, **block.proj.takes)
            branches = [(block.proj(mixed, bias=False), block.proj.own_bias)]
            # The stream is read twice and written once in a block: the next norm adds both branches.
            normed = block.norm2(stream, *branches, **block.fc1.takes)
            branches.append((block.mlp(normed, self.room), block.fc2.own_bias))
        return stream, branches

    def write_start(self, rows_GK: Tensor, sampled_RD: Tensor) -> Tensor:
        """Write sampled tokens, and what the backbone makes of them at these rows of its input.

        Returns:
            Its first block's norm, ``[B k, C]``.
        """
        norm, embed = self.weights.blocks[0].norm1, self.weights.embed
        if embed is not None:
            linear, parameters = (embed.weight, embed.bias), (norm.weight, norm.bias, norm.eps)
            given = self.tokens_BLD, self.start_GSC, rows_GK, linear, self.position_SC, parameters
            return write_tokens(sampled_RD, *given)
        own_R = rows_GK[: len(sampled_RD)]
        places_R, width = own_R % self.length, self.config.width
        kept_R = own_R // self.length * self.config.num_tokens + places_R - self.prefix
        self.tokens_BLD.flatten(0, 1).index_copy_(0, kept_R, sampled_RD.to(self.tokens_BLD.dtype))
        x_RC = self.model.backbone.z_proj(sampled_RD) + self.position_SC[places_R]
        self.start_GSC.flatten(0, 1).index_copy_(0, rows_GK, x_RC.repeat(len(rows_GK) // len(own_R), 1))
        return F.layer_norm(x_RC, (width,), norm.weight, norm.bias, norm.eps).to(self.dtype)

    def predict_last(
        self, count: int, guided: bool, stream: Tensor, branches: Branches, stream_GSC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The last block for the predicted rows alone, and the norm: see :meth:`hidden`."""
        width, last = self.config.width, self.weights.blocks[-1]
        sequences = len(stream)
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
        scales, norm = self.scales if guided and self.head.mixes_hidden else None, self.weights.norm
        after = norm.weight, norm.bias, scales, self.left, count
        hidden_RC = guided_norm(last.mlp(normed), last.fc2.own_bias, rows_RC, *after, eps=norm.eps)
        if sequences < self.sequences:
            # The tokens are written for the null class, too.
            rows_GK = torch.cat([rows_GK, rows_GK + sequences * self.length])
        return rows_GK, hidden_RC

    def _first_hidden(self, count: int, hidden_TLC: Tensor, places_G: Tensor, guided: bool) -> tuple[Tensor, Tensor]:
        """:meth:`hidden` while all tokens are masked, from hidden states of the classes at places of a table."""
        tokens = self.config.num_tokens
        positions_Bk = self.orders_BL[:, tokens - count :]
        positions_Gk = positions_Bk.repeat(2, 1) if self.guided else positions_Bk
        hidden_RC = hidden_TLC.flatten(0, 1)[(places_G.unsqueeze(1) * tokens + positions_Gk).flatten()]
        own_RC, null_RC = hidden_RC[: self.batch * count], hidden_RC[self.batch * count :]
        if not guided:
            hidden_RC = own_RC
        elif self.head.mixes_hidden:
            scale = self.scales[tokens - count]
            hidden_RC = scale * own_RC + (1 - scale) * null_RC
        return (positions_Gk + self.starts_G.unsqueeze(1) + self.prefix).flatten(), hidden_RC
