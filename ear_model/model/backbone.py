"""The bidirectional backbone: class tokens, image tokens, learned positions, pre-norm ViT blocks.

Parameters have the names of the public EAR checkpoint. Shapes: B images, L tokens, D token size, C width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ear_kernels.functional import (
    dropout_add_layer_norm,
    norm_gelu_mlp,
    norm_self_attention,
    project,
    self_attention,
)
from ear_kernels.head import norm_parameters
from ear_kernels.public_blocks import read_block
from ear_kernels.runtime.plain import are_modules_watched, work_together
from ear_model.config import ModelConfig
from ear_model.draws import TORCH_DRAWS, Draws
from ear_model.score_names import score_entry

# Where our kernels don't take the attention (float32, heads wider than 80): cuDNN's is the fastest on a Hopper GPU.
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


# Deviation of the sinusoid that positions start from; a known token is projected to about that much.
SINUSOID_STD = 0.25

make_norm: Any = partial(nn.LayerNorm, eps=1e-6)

# What is still to be added to the residual stream: a linear's output without its bias, and that bias.
Pending = tuple[Tensor, Tensor]


class TransformerBlock(Block):
    """timm's pre-norm ViT block, its parameters and its maths, with its memory-bound parts in our kernels.

    The MLP's dropout, residual and the next norm are one operation. So a block hands its MLP's output on as
    ``pending``, and the block after adds it. Weights are read where that is what calling the submodules would do
    (:mod:`ear_kernels.runtime.plain`); otherwise timm's forward calls them.
    """

    causal = False
    """Whether a position attends to itself and those before it alone."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, proj_drop: float = 0.0, **options: Any) -> None:
        super().__init__(width, heads, mlp_ratio, proj_drop=proj_drop, **options)
        self.rate = proj_drop
        """What is dropped of the MLP's output where the block hands it on."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, pending: Pending | None = None, seeds: Tensor | None = None
    ) -> tuple[Tensor, Pending | None]:
        """
        Args:
            hidden: the residual stream ``[B, L, C]``.
            pending: the MLP output ``[B, L, C]`` of the block before and its bias, not yet dropped out and added;
                None for the first block.
            seeds: int64 ``[3, 1]``, what the kernels' dropout draws from.

        Returns:
            The residual stream without this block's MLP, and that MLP's pending output. Where a submodule does more
            than its weights say, timm's forward runs: the whole residual stream, and None.
        """
        rate = self.rate if self.training else 0.0
        # What torch.compile makes of the operations is its own affair.
        found = None if torch.compiler.is_compiling() else read_block(self, hidden)
        if found is None or found[0].fc2_bias is None or found[1].dropouts != (rate, rate, rate):
            return self.plain_forward(hidden if pending is None else settled(hidden, pending, rate)), None
        weights: Any = found[0]
        options = found[1]
        seed = seeds.unbind() if seeds is not None else (None, None, None)
        qkv: Any = (weights.qkv_weight, weights.qkv_bias, options.heads)
        norms = (weights.norm1_weight, weights.norm1_bias), (weights.norm2_weight, weights.norm2_bias)
        if pending is None:
            norm1: Any = self.norm1
            mixed = self_attention(norm1(hidden), *qkv, dropout=options.attention_dropout, causal=self.causal)
        else:
            rates: Any = {"dropout": rate, "attention_dropout": options.attention_dropout}
            hidden, mixed = norm_self_attention(
                *(pending[0], hidden, *norms[0], pending[1], *qkv),
                **rates,
                causal=self.causal,
                eps=options.eps[0],
                seed=seed[0],
            )
        projected = project(mixed, weights.proj_weight)
        mlp = (weights.proj_bias, weights.fc1_weight, weights.fc1_bias, weights.fc2_weight, None)
        hidden, out = norm_gelu_mlp(
            projected, hidden, *norms[1], *mlp, dropout=rate, eps=options.eps[1], seeds=(seed[1], seed[2])
        )
        # A copy: FSDP frees a block's gathered parameters when it returns.
        return hidden, (out, weights.fc2_bias.clone())

    def plain_forward(self, hidden: Tensor) -> Tensor:
        """The whole residual stream ``[B, L, C]`` after the block, by calling its submodules."""
        return super().forward(hidden)


def settled(hidden: Tensor, pending: Pending, rate: float) -> Tensor:
    """The residual stream with what is pending added, after dropout."""
    branch = pending[0] + pending[1].to(pending[0].dtype)
    return hidden + nn.functional.dropout(branch, rate)


def sinusoid_2d(num_tokens: int, width: int) -> Tensor:
    """Positions of a square grid of tokens, row by row, as float32 ``[num_tokens, width]``.

    The first half of a position depends on the row, the second on the column: sine, then cosine, at ``width // 4``
    frequencies whose periods go from 4 tokens to 4 times the grid. Mean square 1, but for the ``width % 4`` last
    columns, which are 0.
    """
    side = math.isqrt(num_tokens)
    frequencies = math.pi / 2 * torch.logspace(0, -math.log2(side), width // 4, base=2)
    angles = torch.arange(side)[:, None] * frequencies
    waves = math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)
    return nn.functional.pad(torch.cat([rows, columns], dim=2).flatten(0, 1), (0, width % 4))


class TokenEmbedding(nn.Embedding):
    """A table ``weight [K, C]`` in the place of ``z_proj``, for tokens that are indices: float32 ``[B, L, 1]``.

    A token that is not finite, which whoever samples refuses in the end, is read as 0.
    """

    def forward(self, tokens_BL1: Tensor) -> Tensor:
        return super().forward(tokens_BL1.squeeze(-1).nan_to_num(0).long())


class Backbone(nn.Module):
    """Maps known and masked tokens and a class to a hidden state per token."""

    BLOCK: type[TransformerBlock] = TransformerBlock
    IS_MASKED = True
    """Whether there is a mask token."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.config, self.class_tokens = config, config.class_tokens
        self.class_emb = nn.Embedding(config.num_classes, width)
        self.fake_latent = nn.Parameter(torch.empty(1, width))
        self.z_proj = make_embedding(config)
        if self.IS_MASKED:
            self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.empty(1, config.class_tokens + config.num_tokens, width))
        self.decoder_blocks = make_blocks(config, config.depth, self.BLOCK)
        self.decoder_norm = make_norm(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal 0.02 for the embeddings, xavier-uniform linears, zero biases; ``position_init``."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        for parameter in self._embeddings():
            nn.init.normal_(parameter, std=0.02)
        if self.config.position_init == "sinusoid":
            # At 0.02 positions are a tenth of what a known token is projected to, and are learned late.
            with torch.no_grad():
                for positions in self._token_positions():
                    positions += sinusoid_2d(*positions.shape).to(positions) * SINUSOID_STD

    def _embeddings(self) -> tuple[Tensor, ...]:
        masks = (self.mask_token,) if self.IS_MASKED else ()
        tables = (self.z_proj.weight,) if isinstance(self.z_proj, TokenEmbedding) else ()
        return self.class_emb.weight, self.fake_latent, *masks, self.decoder_pos_embed_learned, *tables

    def _token_positions(self) -> list[Tensor]:
        """Views ``[L, C]`` of the positions that tokens are read at."""
        return [self.decoder_pos_embed_learned[0, self.class_tokens :]]

    def all_blocks(self) -> list[TransformerBlock]:
        """Every transformer block, in the order of the forward pass."""
        return list(self.decoder_blocks)  # type: ignore[arg-type]

    def embed_values(self, tokens_BLT: Tensor) -> Tensor:
        """Tokens as vectors of the backbone's width, ``[B, L, C]``."""
        if isinstance(self.z_proj, TokenEmbedding):  # indices: 16 bits could not hold them
            return self.z_proj(tokens_BLT)
        return self.z_proj(tokens_BLT.to(self.decoder_pos_embed_learned.dtype))

    def embed_classes(self, labels_B: Tensor) -> Tensor:
        """Class embeddings ``[B, C]``."""
        return self.class_emb(labels_B)

    def null_class(self, batch: int) -> Tensor:
        """The null class's embedding ``[B, C]``."""
        return self.fake_latent.expand(batch, -1)

    def drop_classes(self, classes_BC: Tensor, draws: Draws = TORCH_DRAWS) -> Tensor:
        """The embeddings with ``label_dropout`` of the images turned to the null class (training)."""
        dropped = draws.rand(classes_BC.shape[0], 1, device=classes_BC.device) < self.config.label_dropout
        return torch.where(dropped, self.fake_latent, classes_BC)

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
            masked_BL: which of them are masked.
            classes_BC: class embeddings.
            run_blocks: does the work of :meth:`run_blocks`, which does it if None.
            num_masked: how many are masked in every image, for backbones that compute less then. Unused here.
        """
        batch = tokens_BLD.shape[0]
        embedded_BLC = self.embed_values(tokens_BLD)
        embedded_BLC = torch.where(masked_BL.unsqueeze(-1), self.mask_token.to(embedded_BLC.dtype), embedded_BLC)
        prefix = classes_BC.to(embedded_BLC.dtype).unsqueeze(1).expand(batch, self.class_tokens, -1)
        hidden = torch.cat([prefix, embedded_BLC], dim=1) + self.decoder_pos_embed_learned
        return (run_blocks or self.run_blocks)(hidden)[:, self.class_tokens :]

    def run_blocks(self, hidden: Tensor, pending: Pending | None = None, part: slice = slice(None)) -> Any:
        """The blocks and the final norm over ``[B, class_tokens + L, C]``.

        With a ``part`` that stops before the last block: those blocks alone, from and to the stream and what is
        pending.
        """
        norm = self.decoder_norm if part.stop is None else None
        return run_stack(list(self.decoder_blocks)[part], norm, self._dropout, hidden, pending)

    @property
    def _dropout(self) -> float:
        return self.config.dropout if self.training else 0.0


def make_embedding(config: ModelConfig) -> "nn.Linear | TokenEmbedding":
    """What makes vectors of the backbone's width of tokens: a linear, or a table of a score with a vocabulary."""
    vocabulary = score_entry(config.score).vocabulary
    if vocabulary:
        return TokenEmbedding(getattr(config, vocabulary), config.width)
    return nn.Linear(config.token_dim, config.width)


def make_blocks(config: ModelConfig, depth: int, kind: type[TransformerBlock] = TransformerBlock) -> nn.ModuleList:
    """Blocks of a backbone."""
    return nn.ModuleList(
        kind(
            config.width,
            config.num_heads,
            config.mlp_ratio,
            qkv_bias=True,
            proj_drop=config.dropout,
            attn_drop=config.attention_dropout,
            norm_layer=make_norm,
        )
        for _ in range(depth)
    )


def run_stack(blocks: list[Any], norm: Any, dropout: float, hidden: Tensor, pending: Pending | None = None) -> Any:
    """Blocks and the norm after them over ``[B, S, C]``.

    Args:
        blocks: those of :func:`make_blocks`.
        norm: None for the blocks alone, from and to the stream and what is pending.
        dropout: what is dropped of the last block's MLP before the norm.
        hidden, pending: as of :class:`TransformerBlock`.
    """
    # Those of what each block hands on.
    rates = [block.rate if block.training else 0.0 for block in blocks]
    seeds = None
    if dropout and hidden.is_cuda:
        seeds = torch.randint(2**31, (3 * len(blocks) + 1, 1), device=hidden.device)
    with sdpa_kernel(ATTENTION, set_priority=True):
        for number, block in enumerate(blocks):
            own = None if seeds is None else seeds[3 * number : 3 * number + 3]
            if pending is not None and number and block.training != blocks[number - 1].training:
                hidden, pending = settled(hidden, pending, rates[number - 1]), None
            hidden, pending = block(hidden, pending, own)
    if norm is None:
        return hidden, pending
    # Guidance takes differences of what comes out: float32 as eager autocast's norms give it.
    dtype = torch.float32 if torch.is_autocast_enabled(hidden.device.type) else None
    plain = None if are_modules_watched() or rates[-1] != dropout else norm_parameters(norm, hidden.shape[-1])
    if pending is not None and plain is not None and work_together(hidden, plain):
        last = None if seeds is None else seeds[-1]
        options: dict[str, Any] = {"dropout": dropout, "eps": norm.eps, "seed": last, "dtype": dtype}
        return dropout_add_layer_norm(pending[0], hidden, plain[0], plain[1], pending[1], **options)[1]
    normed = norm(hidden if pending is None else settled(hidden, pending, rates[-1]))
    return normed if dtype is None else normed.to(dtype)
