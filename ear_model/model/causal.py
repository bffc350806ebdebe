"""The causal backbone: next tokens in one order for all images (paper Table 5; docs/model.md, "Orders").

Its inputs are the copies of the class embedding, then the tokens in the model's order but the last; the hidden state
of an input is what the next token is predicted from. Shapes: B sequences, L tokens, T numbers of a token, C width,
P = class_tokens + L - 1 inputs, of which n are new, H heads of D features.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ear_kernels.runtime.checks import compute_dtype
from ear_model.config import ModelConfig
from ear_model.model.backbone import Backbone, Pending, TransformerBlock
from ear_model.model.masking import token_order

# Without cuDNN's, which makes a plan for every number of keys.
DECODING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class CausalBlock(TransformerBlock):
    """The block with causal attention, and with a cache of keys and values for sampling."""

    causal = True

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        pending: Pending | None = None,
        seeds: Tensor | None = None,
        cache: Tensor | None = None,
        start: int = 0,
    ) -> tuple[Tensor, Pending | None]:
        """As :class:`TransformerBlock`; with a cache as :meth:`plain_forward`, and nothing pending."""
        if cache is None:
            return super().forward(hidden, pending, seeds)
        return self.plain_forward(hidden, cache, start), None

    def plain_forward(self, hidden: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        """The residual stream ``[B, n, C]`` of inputs start .. start + n - 1 after the block, by its submodules.

        Args:
            hidden: before it.
            cache: ``[2, B, H, P, D]``, the keys and values of the inputs before ``start``; those of the new ones are
                written into it. With ``start`` above 0 there is one new input.
            start: 0 without a cache.
        """
        attention: Any = self.attn
        rate = attention.attn_drop.p if self.training else 0.0
        heads = attention.num_heads
        packed = attention.qkv(self.norm1(hidden)).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = attention.q_norm(packed[0]), attention.k_norm(packed[1]), packed[2]
        if cache is not None:
            end = start + hidden.shape[1]
            cache[0, :, :, start:end], cache[1, :, :, start:end] = key, value
            if start:
                key, value = cache[0, :, :, :end], cache[1, :, :, :end]
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=start == 0)
        branch = attention.proj_drop(attention.proj(mixed.transpose(1, 2).flatten(2)))
        hidden = hidden + self.drop_path1(self.ls1(branch))
        return hidden + self.drop_path2(self.ls2(self.mlp(self.norm2(hidden))))


class CausalBackbone(Backbone):
    """Maps a class and the tokens before it to a hidden state for each token.

    It has the masked backbone's parameters but for ``mask_token``, which it has no use for: a parameter without a
    gradient would stop DDP. An input carries the position embedding of its own place, a copy of the class that of the
    copy and a token that of its place in the grid. The order is fixed, so an input's place also tells which token
    comes next. The position of the order's last token, which is no input, is not used.
    """

    BLOCK = CausalBlock
    IS_MASKED = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        order_L = token_order(config.order, config.num_tokens)
        self.order_L: Tensor
        """int64: the place in the grid of each token of the order."""
        self.register_buffer("order_L", order_L, persistent=False)

    def embed_prefix(self, classes_BC: Tensor) -> Tensor:
        """The first ``class_tokens`` inputs ``[B, class_tokens, C]``."""
        position = self.decoder_pos_embed_learned[:, : self.class_tokens]
        return classes_BC.unsqueeze(1) + position

    def embed_tokens(self, tokens_BnT: Tensor, first: int = 0) -> Tensor:
        """Inputs ``[B, n, C]`` that are the tokens first .. first + n - 1 of the order, given in the order."""
        places = self.class_tokens + self.order_L[first : first + tokens_BnT.shape[1]]
        position = self.decoder_pos_embed_learned
        return self.embed_values(tokens_BnT) + position[:, places]

    def forward(  # type: ignore[override]
        self, tokens_BLT: Tensor, classes_BC: Tensor, run_blocks: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Hidden states ``[B, L, C]`` in the model's order: row i predicts its token i.

        Args:
            tokens_BLT: tokens, row by row; the order's last is not read.
            classes_BC: class embeddings.
            run_blocks: does the work of :meth:`run_blocks`, which does it if None.
        """
        tokens = self.embed_tokens(tokens_BLT[:, self.order_L[:-1]])
        hidden = torch.cat([self.embed_prefix(classes_BC), tokens], dim=1)
        return (run_blocks or self.run_blocks)(hidden)[:, self.class_tokens - 1 :]

    def new_cache(self, sequences: int) -> Tensor:
        """Memory for the keys and values of ``sequences`` sequences: ``[blocks, 2, sequences, H, P, D]``."""
        config, position = self.config, self.decoder_pos_embed_learned
        heads, dim = config.num_heads, config.width // config.num_heads
        inputs = config.class_tokens + config.num_tokens - 1
        shape = (config.depth, 2, sequences, heads, inputs, dim)
        return position.new_empty(shape, dtype=compute_dtype(position))

    @torch.no_grad()
    def extend(self, inputs_BnC: Tensor, cache: Tensor, start: int) -> Tensor:
        """The hidden state ``[B, C]`` of the last of the inputs start .. start + n - 1, in eval mode.

        Args:
            inputs_BnC: what :meth:`embed_prefix` and :meth:`embed_tokens` give; one where ``start`` is above 0.
            cache: of :meth:`new_cache`, filled up to ``start``; the new inputs are added.
            start: their first one's number.
        """
        hidden = inputs_BnC
        with sdpa_kernel(DECODING, set_priority=True):
            for block, own in zip(self.decoder_blocks, cache, strict=True):
                hidden, _ = block(hidden, cache=own, start=start)
        normed = self.decoder_norm(hidden[:, -1])
        return normed.float() if torch.is_autocast_enabled(hidden.device.type) else normed
