"""The work of a decoding step and no more: what is known from the steps before is kept, not computed again.

The maths is :func:`ear_model.sampling.decoding.decode_tokens`'s. Saved are, exactly: the queries, keys and values of
the first block for tokens that did not change; the last block but for the keys and values of tokens that are not
predicted; casts of weights. Every step reads and writes the same memory, so a CUDA graph can hold it; how many tokens
are left is a number on the device.

Legend: B images, G sequences (2 B with guidance: the classes' first, then the null class's), P class tokens, L image
tokens, S = P + L, k tokens predicted of each image, C width, D token size.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ear_kernels import LowCopies
from ear_model.config import SamplingConfig
from ear_model.draws import Draws, ImageDraws
from ear_model.model.masking import guidance_scale, random_orders
from ear_model.sampling._standins import attention, attention_rows, linear_gelu, residual_norm
from ear_model.sampling.decoding import SamplingModel


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(
        self, stream: Tensor, branch: Tensor | None = None, branch_bias: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """(stream + branch + its bias, the norm of that)."""
        return residual_norm(branch, branch_bias, stream, self.weight, self.bias, eps=self.eps, **options)


@dataclass(frozen=True)
class _Linear:
    """A linear's weight in the compute dtype, its bias in that, and as it is."""

    weight: Tensor
    bias: Tensor
    own_bias: Tensor


@dataclass(frozen=True)
class _Block:
    heads: int
    norm1: _Norm
    qkv: _Linear
    proj: _Linear
    norm2: _Norm
    fc1: _Linear
    fc2: _Linear

    def mlp(self, normed: Tensor) -> Tensor:
        """The MLP without its last bias."""
        return F.linear(linear_gelu(normed, self.fc1.weight, self.fc1.bias), self.fc2.weight)


class IncrementalDecoding:
    """The buffers of a batch, and the steps over them.

    Args:
        model: in eval mode.
        batch: B.
        guided: whether there is guidance.
        dtype: that is computed in: float32 or float64, the parameters' own, or bfloat16 or float16.
    """

    def __init__(self, model: SamplingModel, batch: int, *, guided: bool, dtype: torch.dtype) -> None:
        self.model, self.batch, self.guided, self.dtype = model, batch, guided, dtype
        self.sequences = 2 * batch if guided else batch
        config, backbone = model.config, model.backbone
        self.config = config
        parameters = [*backbone.decoder_blocks.parameters(), *backbone.z_proj.parameters(), *model.score.parameters()]
        self.copies = LowCopies(parameters, dtype) if dtype.itemsize == 2 else None
        with self.scope():
            self.blocks = [self._block(block) for block in backbone.decoder_blocks]
            self.embed = self._linear(backbone.z_proj)
        self.norm = self._norm(backbone.decoder_norm)
        position = backbone.decoder_pos_embed_learned.detach()
        self.position_SC = position[0]
        tokens, width, self.prefix = config.num_tokens, config.width, config.class_tokens

        def new(*shape: int, dtype: torch.dtype = position.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=position.device)

        length = self.prefix + tokens
        self.tokens_BLD, self.orders_BL = new(batch, tokens, config.token_dim), new(batch, tokens, dtype=torch.int64)
        self.noise_BLE: Tensor | None = None
        self.temperature = 1.0
        self.classes_GC, self.scales = new(self.sequences, width), new(tokens + 1)
        self.start_GSC, self.stream_GSC = new(self.sequences, length, width), new(self.sequences, length, width)
        self.qkv_GS3 = new(self.sequences, length, 3 * width, dtype=dtype)
        self.left = new(1, dtype=torch.int64)
        self.places_L = torch.arange(tokens, device=position.device)
        self.starts_G1 = length * torch.arange(self.sequences, device=position.device).unsqueeze(1) + self.prefix

    def scope(self) -> Any:
        """Where the 16-bit copies stand for the weights; entering casts them anew."""
        return nullcontext() if self.copies is None else self.copies

    def _low(self, parameter: Tensor) -> Tensor:
        copy = None if self.copies is None else self.copies.current(parameter, self.dtype)
        return parameter.detach() if copy is None else copy

    def _linear(self, linear: nn.Linear) -> _Linear:
        return _Linear(self._low(linear.weight), self._low(linear.bias), linear.bias.detach())

    def _norm(self, norm: nn.LayerNorm) -> _Norm:
        return _Norm(norm.weight.detach(), norm.bias.detach(), norm.eps)

    def _block(self, block: Any) -> _Block:
        linears = (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)
        qkv, proj, first, second = (self._linear(linear) for linear in linears)
        return _Block(
            block.attn.num_heads, self._norm(block.norm1), qkv, proj, self._norm(block.norm2), first, second
        )

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
        self.orders_BL.copy_(random_orders(self.batch, tokens, labels_B.device, draws))
        # An image's own numbers are the same however a draw is divided.
        parts = [tokens] if isinstance(draws, ImageDraws) else counts
        like, draw = self.start_GSC, self.model.score.draw_noise
        noise_BLE = torch.cat([draw(self.batch, count, like=like, draws=draws) for count in parts], 1)
        if self.noise_BLE is None:
            self.noise_BLE = torch.empty_like(noise_BLE)
        self.noise_BLE.copy_(noise_BLE)

    def prepare(self, temperature: float) -> None:
        """What is computed of the noise before the first step."""
        self.temperature = temperature

    def begin(self) -> None:
        """All tokens masked: the first block's inputs, and their queries, keys and values."""
        backbone, prefix = self.model.backbone, self.prefix
        # Rounded where the plain loop's embedding is.
        self.start_GSC[:, :prefix] = self.classes_GC.to(self.dtype).unsqueeze(1) + self.position_SC[:prefix]
        self.start_GSC[:, prefix:] = backbone.mask_token[0].to(self.dtype) + self.position_SC[prefix:]
        first = self.blocks[0]
        _, normed = first.norm1(self.start_GSC, dtype=self.dtype)
        self.qkv_GS3.copy_(F.linear(normed, first.qkv.weight, first.qkv.bias))
        self.tokens_BLD.zero_()
        self.left.fill_(self.config.num_tokens)

    def step(self, count: int) -> None:
        """Predict ``count`` tokens of every image."""
        self.left -= count
        places_k = self.left + self.places_L[:count]
        positions_Bk = self.orders_BL[:, places_k]
        rows_GK = (positions_Bk.repeat(2, 1) if self.guided else positions_Bk) + self.starts_G1
        hidden_RC = self._hidden(rows_GK.flatten())
        half = self.batch * count
        hidden, null = (hidden_RC[:half], hidden_RC[half:]) if self.guided else (hidden_RC, None)
        tokens = self.config.num_tokens
        drawn_k = tokens - count - self.left + self.places_L[:count]
        assert self.noise_BLE is not None
        noise_RE = self.noise_BLE[:, drawn_k].flatten(0, 1)
        sampled_RD = self.model.score.sample(hidden, null, self.scales[self.left], self.temperature, noise_RE)
        index = positions_Bk.unsqueeze(-1).expand(-1, -1, sampled_RD.shape[-1])
        self.tokens_BLD.scatter_(1, index, sampled_RD.view(self.batch, count, -1).to(self.tokens_BLD.dtype))
        self._write(sampled_RD, positions_Bk, rows_GK.flatten())

    def _hidden(self, rows_R: Tensor) -> Tensor:
        """Hidden states ``[R, C]`` in the stream's dtype of these rows of the ``G S``."""
        dtype, width = self.dtype, self.config.width
        options: dict[str, Any] = {"dtype": dtype}
        stream, branch, bias = self.start_GSC, None, None
        for number, block in enumerate(self.blocks[:-1]):
            if number == 0:
                qkv = self.qkv_GS3
            else:
                _, normed = block.norm1(stream, branch, bias, **options)
                qkv = F.linear(normed, block.qkv.weight, block.qkv.bias)
            projected = F.linear(attention(qkv, block.heads), block.proj.weight)
            # The first block's input stays as it is: the next step starts from it.
            stream, normed = block.norm2(
                stream, projected, block.proj.own_bias, out_stream=self.stream_GSC, **options
            )
            branch, bias = block.mlp(normed), block.fc2.own_bias
        last = self.blocks[-1]
        stream, normed = last.norm1(stream, branch, bias, **options)
        kv = F.linear(normed, last.qkv.weight[width:], last.qkv.bias[width:])
        query = F.linear(normed.view(-1, width)[rows_R], last.qkv.weight[:width], last.qkv.bias[:width])
        mixed = attention_rows(query.view(self.sequences, -1, width), kv, last.heads).view(-1, width)
        rows, normed = last.norm2(
            stream.view(-1, width)[rows_R], F.linear(mixed, last.proj.weight), last.proj.own_bias, **options
        )
        _, hidden = self.norm(rows, last.mlp(normed), last.fc2.own_bias, dtype=rows.dtype)
        return hidden

    def _write(self, sampled_RD: Tensor, positions_Bk: Tensor, rows_R: Tensor) -> None:
        """The embeddings of new tokens, and their queries, keys and values in the first block, at their rows."""
        first, width = self.blocks[0], self.config.width
        position = self.position_SC[self.prefix + positions_Bk.flatten()]
        embedded = F.linear(sampled_RD.to(self.dtype), self.embed.weight, self.embed.bias) + position
        _, normed = first.norm1(embedded, dtype=self.dtype)
        qkv = F.linear(normed, first.qkv.weight, first.qkv.bias)
        times = 2 if self.guided else 1
        self.start_GSC.view(-1, width).index_copy_(0, rows_R, embedded.repeat(times, 1))
        self.qkv_GS3.view(-1, 3 * width).index_copy_(0, rows_R, qkv.repeat(times, 1))
