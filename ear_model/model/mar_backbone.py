"""MAR's backbone (Li et al. 2024, arXiv:2406.11838): an encoder of the known tokens, a decoder of all of them.

Parameters have the names, shapes and order of the public MAR checkpoint. Shapes: B images, L tokens, K known tokens
an image, P class tokens ("buffer"), S = P + K, D token size, C width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ear_model.config import ModelConfig
from ear_model.model.backbone import (
    Backbone,
    TokenEmbedding,
    TransformerBlock,
    make_blocks,
    make_embedding,
    make_norm,
    run_stack,
)


class MarBackbone(Backbone):
    """Maps known and masked tokens and a class to a hidden state per token, at less cost where few are known.

    The encoder sees the class tokens and the known tokens alone. Its output goes to the decoder at their places, a
    learned mask token at the others. Both have learned positions over P + L; learned positions over L are added to
    what comes out. The encoder's input is normalised.
    """

    def __init__(self, config: ModelConfig) -> None:
        nn.Module.__init__(self)  # not Backbone's: its parameters are others, in another order
        width, places = config.width, config.class_tokens + config.num_tokens
        self.config, self.class_tokens = config, config.class_tokens
        self.fake_latent = nn.Parameter(torch.empty(1, width))
        self.encoder_pos_embed_learned = nn.Parameter(torch.empty(1, places, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, places, width))
        self.diffusion_pos_embed_learned = nn.Parameter(torch.empty(1, config.num_tokens, width))
        self.class_emb = nn.Embedding(config.num_classes, width)
        self.z_proj = make_embedding(config)
        self.z_proj_ln = make_norm(width)
        self.encoder_blocks = make_blocks(config, config.encoder_depth)
        self.encoder_norm = make_norm(width)
        self.decoder_embed = nn.Linear(width, width)
        self.decoder_blocks = make_blocks(config, config.depth)
        self.decoder_norm = make_norm(width)
        self.reset_parameters()

    def _embeddings(self) -> tuple[Tensor, ...]:
        positions = self.encoder_pos_embed_learned, self.decoder_pos_embed_learned, self.diffusion_pos_embed_learned
        tables = (self.z_proj.weight,) if isinstance(self.z_proj, TokenEmbedding) else ()
        return self.class_emb.weight, self.fake_latent, self.mask_token, *positions, *tables

    def _token_positions(self) -> list[Tensor]:
        return [
            each[0, self.class_tokens :] for each in (self.encoder_pos_embed_learned, self.decoder_pos_embed_learned)
        ]

    def all_blocks(self) -> list[TransformerBlock]:
        return [*self.encoder_blocks, *self.decoder_blocks]

    def forward(
        self,
        tokens_BLD: Tensor,
        masked_BL: Tensor,
        classes_BC: Tensor,
        run_blocks: Callable[[Tensor], Tensor] | None = None,
        num_masked: int | None = None,
    ) -> Tensor:
        """Hidden states ``[B, L, C]``; the contents of masked tokens are not read.

        Args:
            tokens_BLD: tokens.
            masked_BL: which of them are masked, the same number in every image.
            classes_BC: class embeddings.
            run_blocks: does the work of ``run_blocks``, the decoder's blocks and norm.
            num_masked: how many are masked in every image. If None they are counted, which waits for the device.

        Raises:
            ValueError: images with different numbers of masked tokens, where they are counted.
        """
        batch, num_tokens = masked_BL.shape
        if num_masked is None:
            num_masked = _number_masked(masked_BL)
        # False before True, each in order: the known tokens, left to right.
        known_BK = masked_BL.byte().argsort(dim=1, stable=True)[:, : num_tokens - num_masked]
        prefix = torch.arange(self.class_tokens, device=masked_BL.device).expand(batch, -1)
        kept_BS = torch.cat([prefix, known_BK + self.class_tokens], dim=1)
        index_BSC = kept_BS.unsqueeze(-1).expand(-1, -1, self.config.width)

        embedded = self.embed_values(tokens_BLD)
        classes = classes_BC.unsqueeze(1).expand(-1, self.class_tokens, -1)
        placed = torch.cat([classes, embedded], dim=1) + self.encoder_pos_embed_learned
        encoded = self.run_encoder(self.z_proj_ln(placed.gather(1, index_BSC)))

        known = self.decoder_embed(encoded)
        masked = self.mask_token.to(known.dtype).expand(batch, self.class_tokens + num_tokens, -1)
        hidden = masked.scatter(1, index_BSC, known) + self.decoder_pos_embed_learned
        decoded = (run_blocks or self.run_blocks)(hidden)[:, self.class_tokens :]
        return decoded + self.diffusion_pos_embed_learned

    def run_encoder(self, hidden: Tensor) -> Any:
        """The encoder's blocks and norm over ``[B, P + K, C]``."""
        return run_stack(list(self.encoder_blocks), self.encoder_norm, self._dropout, hidden)


def _number_masked(masked_BL: Tensor) -> int:
    counts = set(masked_BL.sum(1).tolist())
    if len(counts) > 1:
        raise ValueError(
            f"images have {sorted(counts)} masked tokens; the mar backbone needs the same number in each"
        )
    return counts.pop() if counts else 0
