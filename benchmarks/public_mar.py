"""A stand-in for the public MAR code: its key layout, its arithmetic and its waste, our lines.

Encoder over known tokens, decoder over all, and a diffusion loss whose tables are arrays of numpy: what a diffusion
step needs of them goes from the host to the device there. In sampling, 100 calls of the net for each of the steps,
with both halves of a guided batch. Names and arguments of the methods are the public ones. ``accelerate`` recognises
it.
"""

import math
from functools import partial

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from benchmarks.public_ear import FinalLayer, PublicEAR, ResBlock
from ear_model.config import ModelConfig

TIMES = 1000


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int, size: int = 256) -> None:
        super().__init__()
        self.size = size
        self.mlp = nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.size // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).to(t.device)
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class DiffusionNet(nn.Module):
    """Noisy tokens, times and conditions to the predicted noise and variance range."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.generator_width
        self.in_channels = config.token_dim
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(config.width, width)
        self.input_proj = nn.Linear(config.token_dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(config.generator_depth))
        self.final_layer = FinalLayer(width, 2 * config.token_dim)

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        x, y = self.input_proj(x), self.time_embed(t) + self.cond_embed(c)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)

    def forward_with_cfg(self, x: Tensor, t: Tensor, c: Tensor, cfg_scale: float | Tensor) -> Tensor:
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half], dim=0), t, c)
        noise, rest = out[:, : self.in_channels], out[:, self.in_channels :]
        of_class, of_null = noise.chunk(2, dim=0)
        guided = of_null + cfg_scale * (of_class - of_null)
        return torch.cat([torch.cat([guided, guided], dim=0), rest], dim=1)


class Diffusion:
    """Tables of a cosine schedule of ``TIMES`` levels, or of some of them, as arrays on the host.

    Args:
        times: levels that are used, ascending.
    """

    def __init__(self, times: list[int]) -> None:
        def share(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = np.array([min(1 - share((i + 1) / TIMES) / share(i / TIMES), 0.999) for i in range(TIMES)])
        bars = np.cumprod(1 - betas)[times]
        before = np.append(1.0, bars[:-1])
        self.betas, self.bars, self.timestep_map = 1 - bars / before, bars, times
        variance = self.betas * (1 - before) / (1 - bars)
        self.log_variance = np.log(np.append(variance[1], variance[1:]))
        self.log_betas = np.log(self.betas)
        self.of_start = self.betas * np.sqrt(before) / (1 - bars)
        self.of_x = (1 - before) * np.sqrt(1 - self.betas) / (1 - bars)

    @staticmethod
    def at(table: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
        """``[R, 1]`` of a table: copied to the device at every call."""
        return torch.from_numpy(table).to(like.device)[t].float()[:, None]

    def noisy(self, start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return self.at(np.sqrt(self.bars), t, start) * start + self.at(np.sqrt(1 - self.bars), t, start) * noise

    def posterior_mean(self, start: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.at(self.of_start, t, x) * start + self.at(self.of_x, t, x) * x

    def mean_and_log_variance(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        noise, value = output.chunk(2, dim=1)
        share = (value + 1) / 2
        low, high = self.at(self.log_variance, t, x), self.at(self.log_betas, t, x)
        start = self.at(np.sqrt(1 / self.bars), t, x) * x - self.at(np.sqrt(1 / self.bars - 1), t, x) * noise
        return self.posterior_mean(start, x, t), share * high + (1 - share) * low


class DiffLoss(nn.Module):
    def __init__(self, config: ModelConfig, num_sampling_steps: int) -> None:
        super().__init__()
        self.in_channels = config.token_dim
        self.net = DiffusionNet(config)
        self.train_diffusion = Diffusion(list(range(TIMES)))
        stride = (TIMES - 1) / max(num_sampling_steps - 1, 1)
        self.gen_diffusion = Diffusion(sorted({round(stride * i) for i in range(num_sampling_steps)}))

    def forward(self, target: Tensor, z: Tensor, mask: Tensor | None = None) -> Tensor:
        t = torch.randint(0, TIMES, (len(target),), device=target.device)
        noise = torch.randn_like(target)
        loss = self.losses(target, z, t, noise)
        return loss.mean() if mask is None else (loss * mask).sum() / mask.sum()

    def losses(self, target: Tensor, z: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``[R]``: squared error of the noise, and the bound in bits with the mean held fixed."""
        process = self.train_diffusion
        x = process.noisy(target, t, noise)
        output = self.net(x, t, z)
        predicted, value = output.chunk(2, dim=1)
        frozen = torch.cat([predicted.detach(), value], dim=1)
        mean, log_variance = process.mean_and_log_variance(frozen, x, t)
        true_mean, true_log = process.posterior_mean(target, x, t), process.at(process.log_variance, t, x)
        kl = 0.5 * (
            log_variance - true_log - 1 + (true_log - log_variance).exp()
            + (true_mean - mean).square() * (-log_variance).exp()
        )  # fmt: skip
        scale = (-0.5 * log_variance).exp()
        upper = _normal_cdf(scale * (target - mean + 1 / 255))
        lower = _normal_cdf(scale * (target - mean - 1 / 255))
        inside = torch.where(target > 0.999, 1 - lower, torch.where(target < -0.999, upper, upper - lower))
        decoded = -inside.clamp(min=1e-12).log()
        bound = torch.where(t[:, None] == 0, decoded, kl).mean(dim=1) / math.log(2.0)
        return (predicted - noise).square().mean(dim=1) + bound

    def sample(self, z: Tensor, temperature: float = 1.0, cfg: float | Tensor = 1.0) -> Tensor:
        """Tokens, one a row of ``z``; with ``cfg`` other than 1 the second halves of both are of the null class."""
        process, guided = self.gen_diffusion, cfg != 1.0
        rows = len(z) // 2 if guided else len(z)
        x = torch.randn(rows, self.in_channels, device=z.device)
        x = torch.cat([x, x], dim=0) if guided else x
        for place in reversed(range(len(process.timestep_map))):
            t = torch.tensor([place] * len(z), device=z.device)
            times = torch.tensor(process.timestep_map, device=z.device)[t]
            output = self.net.forward_with_cfg(x, times, z, cfg) if guided else self.net(x, times, z)
            mean, log_variance = process.mean_and_log_variance(output, x, t)
            keep = (t != 0).float()[:, None]
            x = mean + keep * (0.5 * log_variance).exp() * torch.randn_like(x) * temperature
        return x


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


class PublicMAR(PublicEAR):
    """The public model; in training ``diffusion_batch_mul`` noise levels a token."""

    def __init__(self, config: ModelConfig, diffusion_batch_mul: int = 4, num_sampling_steps: int = 100) -> None:
        nn.Module.__init__(self)
        width, tokens, positions = config.width, config.num_tokens, config.class_tokens + config.num_tokens
        self.config, self.diffusion_batch_mul, self.buffer_size = config, diffusion_batch_mul, config.class_tokens
        self.seq_h = self.seq_w = config.image_size // config.patch_size
        self.seq_len, self.token_embed_dim = tokens, config.token_dim
        self.patch_size, self.vae_embed_dim = config.patch_size, config.channels
        self.class_emb = nn.Embedding(config.num_classes, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.z_proj, self.z_proj_ln = nn.Linear(config.token_dim, width), nn.LayerNorm(width, eps=1e-6)
        make = partial(
            Block, width, config.num_heads, config.mlp_ratio, qkv_bias=True, proj_drop=config.dropout,
            attn_drop=config.attention_dropout, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )  # fmt: skip
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, width))
        self.encoder_blocks = nn.ModuleList(make() for _ in range(config.encoder_depth))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, positions, width))
        self.decoder_blocks = nn.ModuleList(make() for _ in range(config.depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, tokens, width))
        self.diffloss = DiffLoss(config, num_sampling_steps)

    def forward_mae_encoder(self, x: Tensor, mask: Tensor, class_embedding: Tensor) -> Tensor:
        """Hidden states ``[B, known, C]`` of the class tokens and the known ones of ``x [B, L, D]``."""
        x = self.z_proj(x)
        batch, _, width = x.shape
        x = torch.cat([torch.zeros(batch, self.buffer_size, width, device=x.device), x], dim=1)
        known = 1 - torch.cat([torch.zeros(batch, self.buffer_size, device=x.device), mask], dim=1)
        if self.training:
            dropped = (torch.rand(batch) < self.config.label_dropout).unsqueeze(-1).to(x.device).to(x.dtype)
            class_embedding = dropped * self.fake_latent + (1 - dropped) * class_embedding
        x[:, : self.buffer_size] = class_embedding.unsqueeze(1)
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned)
        x = x[known.nonzero(as_tuple=True)].reshape(batch, -1, width)
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def forward_mae_decoder(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """Hidden states ``[B, L, C]`` of all tokens from those of the encoder."""
        x = self.decoder_embed(x)
        known = 1 - torch.cat([torch.zeros(len(x), self.buffer_size, device=x.device), mask], dim=1)
        padded = self.mask_token.repeat(*known.shape, 1).to(x.dtype).clone()
        padded[known.nonzero(as_tuple=True)] = x.flatten(0, 1)
        x = padded + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.buffer_size :] + self.diffusion_pos_embed_learned

    def forward_loss(self, z: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        count = self.diffusion_batch_mul
        z, target = (t.reshape(-1, t.shape[-1]).repeat(count, 1) for t in (z, target))
        return self.diffloss(z=z, target=target, mask=mask.reshape(-1).repeat(count))

    def sample_tokens(  # type: ignore[override]
        self,
        bsz: int,
        num_iter: int = 64,
        cfg: float = 1.0,
        cfg_schedule: str = "linear",
        labels: Tensor | None = None,
        temperature: float = 1.0,
        progress: bool = False,
    ) -> Tensor:
        """Latents ``[bsz, channels, H, W]``; call it in eval mode and without gradients.

        Args:
            bsz, num_iter, cfg, cfg_schedule, labels, progress: as :meth:`PublicEAR.sample_tokens`.
            temperature: factor on the noise that a diffusion step adds.
        """
        return super().sample_tokens(bsz, num_iter, cfg, cfg_schedule, labels, temperature, progress)

    def hidden_states(self, tokens: Tensor, mask: Tensor, classes: Tensor) -> Tensor:
        return self.forward_mae_decoder(self.forward_mae_encoder(tokens, mask, classes), mask)

    def sample_rows(self, z: Tensor, temperature: float, cfg: float | Tensor) -> Tensor:
        sampled = self.diffloss.sample(z, temperature, cfg)
        return sampled if cfg == 1.0 else sampled.chunk(2, dim=0)[0]
