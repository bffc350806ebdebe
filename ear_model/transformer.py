"""The bidirectional backbone (spec 3): class tokens, image tokens, learned positions, pre-norm ViT blocks.

Parameters have the names of the public EAR checkpoint. Shapes: B images, L tokens, D token size, C width.
"""

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ear_model.config import ModelConfig


class Backbone(nn.Module):
    """Maps known and masked tokens and a class to a hidden state per token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.class_tokens = config.class_tokens
        self.label_dropout = config.label_dropout
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.class_emb = nn.Embedding(config.num_classes, width)
        self.fake_latent = nn.Parameter(torch.empty(1, width))
        self.z_proj = nn.Linear(config.token_dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, config.class_tokens + config.num_tokens, width))
        self.decoder_blocks = nn.ModuleList(
            Block(
                width,
                config.num_heads,
                config.mlp_ratio,
                qkv_bias=True,
                proj_drop=config.dropout,
                attn_drop=config.attention_dropout,
                norm_layer=norm,
            )
            for _ in range(config.depth)
        )
        self.decoder_norm = norm(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal 0.02 for the embeddings, xavier-uniform linears, zero biases (spec 3)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        embeddings = (
            self.class_emb.weight,
            self.fake_latent,
            self.mask_token,
            self.decoder_pos_embed_learned,
        )
        for parameter in embeddings:
            nn.init.normal_(parameter, std=0.02)

    def embed_classes(self, labels_B: Tensor) -> Tensor:
        """Class embeddings ``[B, C]``."""
        return self.class_emb(labels_B)

    def null_class(self, batch: int) -> Tensor:
        """The null class's embedding ``[B, C]``."""
        return self.fake_latent.expand(batch, -1)

    def drop_classes(self, classes_BC: Tensor) -> Tensor:
        """The embeddings with ``label_dropout`` of the images turned to the null class (training)."""
        dropped = torch.rand(classes_BC.shape[0], 1, device=classes_BC.device) < self.label_dropout
        return torch.where(dropped, self.fake_latent, classes_BC)

    def forward(self, tokens_BLD: Tensor, masked_BL: Tensor, classes_BC: Tensor) -> Tensor:
        """Hidden states ``[B, L, C]``; the contents of masked tokens are not read."""
        batch = tokens_BLD.shape[0]
        embedded_BLC = self.z_proj(tokens_BLD)
        embedded_BLC = torch.where(masked_BL.unsqueeze(-1), self.mask_token.to(embedded_BLC.dtype), embedded_BLC)
        prefix = classes_BC.to(embedded_BLC.dtype).unsqueeze(1).expand(batch, self.class_tokens, -1)
        hidden = torch.cat([prefix, embedded_BLC], dim=1) + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            hidden = block(hidden)
        return self.decoder_norm(hidden)[:, self.class_tokens :]
