"""A stand-in for the public EAR code: its key layout, its arithmetic and its waste, our lines.

All tokens, masked or not, go through the head and are multiplied by 0 afterwards; ``input_proj`` runs on z repeated
for every sample; SiLU(c) is computed in every block. ``accelerate`` recognises it.
"""

import math
from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ear_model.config import ModelConfig
from ear_model.model.masking import draw_num_masked


class ResBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, c: Tensor, temperature: float = 1.0) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, dim=-1)
        if not self.training:
            shift = shift * temperature
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Net(nn.Module):
    """The MLP generator; its state dict is also :class:`ear_kernels.FusedMLPGenerator`'s."""

    def __init__(self, input_dim: int, width: int, output_dim: int, depth: int, noise_dim: int) -> None:
        super().__init__()
        self.noise_embed = nn.Linear(noise_dim, width)
        self.input_proj = nn.Linear(input_dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, output_dim)

    def forward(self, z: Tensor, noise: Tensor, temperature: float = 1.0) -> Tensor:
        x, c = self.input_proj(z), self.noise_embed(noise)
        for block in self.res_blocks:
            x = block(x, c, temperature)
        return self.final_layer(x, c)


class ScoreLoss(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.noise_channels, self.alpha, self.train_temperature = config.noise_dim, config.alpha, 1.0
        sizes = config.generator_width, config.token_dim, config.generator_depth, config.noise_dim
        self.net = Net(config.width, *sizes)

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        norm = (a - b).norm(dim=-1)
        return norm if self.alpha == 1 else norm.pow(self.alpha)

    def forward(self, target: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
        rows = z.shape[0]
        noise = torch.rand((2 * rows, self.noise_channels), dtype=z.dtype, device=z.device) - 0.5
        first, second = self.net(torch.cat([z, z]), noise, 1.0).split(rows)
        loss = self.distance(first, target) + self.distance(second, target)
        loss = loss - self.train_temperature * self.distance(first, second)
        return loss.mean() if mask is None else (loss * mask).sum() / mask.sum()


class PublicEAR(nn.Module):
    """The training side of the public model; ``score_batch_mul`` draws of two samples a token."""

    def __init__(self, config: ModelConfig, score_batch_mul: int = 2) -> None:
        super().__init__()
        width, tokens = config.width, config.num_tokens
        self.config, self.score_batch_mul, self.buffer_size = config, score_batch_mul, config.class_tokens
        self.class_emb = nn.Embedding(config.num_classes, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.z_proj = nn.Linear(config.token_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, config.class_tokens + tokens, width))
        self.decoder_blocks = nn.ModuleList(
            Block(
                width, config.num_heads, config.mlp_ratio, qkv_bias=True, proj_drop=config.dropout,
                attn_drop=config.attention_dropout, norm_layer=partial(nn.LayerNorm, eps=1e-6),
            )
            for _ in range(config.depth)
        )  # fmt: skip
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.scoreloss = ScoreLoss(config)

    def forward_decoder(self, x: Tensor, mask: Tensor, classes: Tensor) -> Tensor:
        x = self.z_proj(x)
        batch = x.shape[0]
        dropped = (torch.rand(batch, device=x.device) < self.config.label_dropout).unsqueeze(-1).to(x.dtype)
        classes = dropped * self.fake_latent + (1 - dropped) * classes
        x = torch.where(mask.unsqueeze(-1).bool(), self.mask_token.to(x.dtype), x)
        x = torch.cat([classes.unsqueeze(1).expand(batch, self.buffer_size, -1).to(x.dtype), x], dim=1)
        x = x + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.buffer_size :]

    def forward_loss(self, z: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        count = self.score_batch_mul
        z, target = (t.reshape(-1, t.shape[-1]).repeat(count, 1) for t in (z, target))
        return self.scoreloss(z=z, target=target, mask=mask.reshape(-1).repeat(count))

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        batch, side = latents.shape[0], math.isqrt(self.config.num_tokens)
        x = latents.reshape(batch, latents.shape[1], side * side).transpose(1, 2)
        count = draw_num_masked(self.config.num_tokens, self.config.min_mask_ratio)
        orders = torch.rand(batch, side * side, device=x.device).argsort(dim=-1)
        mask = torch.zeros(batch, side * side, device=x.device).scatter(1, orders[:, :count], 1.0)
        z = self.forward_decoder(x, mask, self.class_emb(labels))
        return self.forward_loss(z=z, target=x.detach(), mask=mask)


def initialise(model: nn.Module, seed: int = 0) -> None:
    """Weights from which every gradient is alive (the public zero-initialised linears would hide half of them)."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2)


def compile_parts(model: PublicEAR) -> None:
    """What a careful user would do: compile each transformer block and the head (the whole model fails)."""
    for block in model.decoder_blocks:
        block.compile()
    model.scoreloss.net.compile()
