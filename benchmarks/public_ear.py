"""A stand-in for the public EAR code: its key layout, its arithmetic and its waste, our lines.

In training all tokens, masked or not, go through the head and are multiplied by 0 afterwards; ``input_proj`` runs on
z repeated for every sample; SiLU(c) is computed in every block. In sampling all hidden states of both classes are
computed in every step, for which orders, counts and positions go from the host to the device and back. Names and
arguments of the methods are the public ones. ``accelerate`` recognises it.
"""

import math
from functools import partial

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from tqdm import tqdm

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

    def sample(self, z: Tensor, infer_temperature: float = 1.0, cfg: float | Tensor = 1.0) -> Tensor:
        """Tokens in float32, one a row of ``z``; with ``cfg`` other than 1 its second half is of the null class."""
        if cfg != 1.0:
            of_class, of_null = z.chunk(2, dim=0)
            z = cfg * of_class + (1 - cfg) * of_null
        noise = torch.rand((z.shape[0], self.noise_channels), dtype=z.dtype, device=z.device) - 0.5
        return self.net(z, noise, infer_temperature).float()


def mask_by_order(mask_len: Tensor, order: Tensor, bsz: int, seq_len: int) -> Tensor:
    """Boolean ``[bsz, seq_len]``: the first ``mask_len`` of each order; slicing by a tensor waits for its value."""
    ones = torch.ones(bsz, seq_len).to(order.device)
    mask = torch.zeros(bsz, seq_len).to(order.device)
    return mask.scatter(-1, order[:, : mask_len.long()], ones).bool()


class PublicEAR(nn.Module):
    """The public model; in training ``score_batch_mul`` draws of two samples a token."""

    def __init__(self, config: ModelConfig, score_batch_mul: int = 2) -> None:
        super().__init__()
        width, tokens = config.width, config.num_tokens
        self.config, self.score_batch_mul, self.buffer_size = config, score_batch_mul, config.class_tokens
        self.seq_h = self.seq_w = config.image_size // config.patch_size
        self.seq_len, self.token_embed_dim = tokens, config.token_dim
        self.patch_size, self.vae_embed_dim = config.patch_size, config.channels
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

    def patchify(self, x: Tensor) -> Tensor:
        """``[B, channels, H, W]`` to tokens ``[B, L, channels * patch_size**2]``."""
        size = self.patch_size
        x = x.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`patchify`."""
        size = self.patch_size
        x = x.unflatten(2, (self.vae_embed_dim, size, size)).unflatten(1, (self.seq_h, self.seq_w))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def sample_orders(self, bsz: int) -> Tensor:
        """Random orders ``[bsz, L]``, shuffled one after another on the host."""
        orders = [np.arange(self.seq_len) for _ in range(bsz)]
        for order in orders:
            np.random.shuffle(order)
        return torch.Tensor(np.array(orders)).to(self.mask_token.device).long()

    def forward_mae_decoder(self, x: Tensor, mask: Tensor, class_embedding: Tensor) -> Tensor:
        """Hidden states ``[B, L, C]`` of tokens ``x [B, L, D]``; ``nonzero`` waits for the mask."""
        x = self.z_proj(x)
        batch, _, width = x.shape
        x = torch.cat([torch.zeros(batch, self.buffer_size, width, device=x.device), x], dim=1)
        known = 1 - torch.cat([torch.zeros(batch, self.buffer_size, device=x.device), mask], dim=1)
        if self.training:
            dropped = (torch.rand(batch) < self.config.label_dropout).unsqueeze(-1).to(x.device).to(x.dtype)
            class_embedding = dropped * self.fake_latent + (1 - dropped) * class_embedding
        x[:, : self.buffer_size] = class_embedding.unsqueeze(1)
        x = x[known.nonzero(as_tuple=True)].reshape(batch, -1, width)
        padded = self.mask_token.repeat(*known.shape, 1).to(x.dtype).clone()
        padded[known.nonzero(as_tuple=True)] = x.flatten(0, 1)
        x = padded + self.decoder_pos_embed_learned
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.buffer_size :]

    def forward_loss(self, z: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        count = self.score_batch_mul
        z, target = (t.reshape(-1, t.shape[-1]).repeat(count, 1) for t in (z, target))
        return self.scoreloss(z=z, target=target, mask=mask.reshape(-1).repeat(count))

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        x = self.patchify(latents)
        count = draw_num_masked(self.seq_len, self.config.min_mask_ratio)
        orders = torch.rand(x.shape[:2], device=x.device).argsort(dim=-1)
        mask = torch.zeros(x.shape[:2], device=x.device).scatter(1, orders[:, :count], 1.0)
        z = self.hidden_states(x, mask, self.class_emb(labels))
        return self.forward_loss(z=z, target=x.detach(), mask=mask)

    def hidden_states(self, tokens: Tensor, mask: Tensor, classes: Tensor) -> Tensor:
        """``[B, L, C]`` of tokens ``[B, L, D]``, known where ``mask [B, L]`` is 0."""
        return self.forward_mae_decoder(tokens, mask, classes)

    def sample_rows(self, z: Tensor, temperature: float, cfg: float | Tensor) -> Tensor:
        """Tokens of the rows ``z`` that a step predicts, one for both halves with guidance."""
        return self.scoreloss.sample(z, temperature, cfg)

    def sample_tokens(
        self,
        bsz: int,
        num_iter: int = 64,
        cfg: float = 1.0,
        cfg_schedule: str = "linear",
        labels: Tensor | None = None,
        infer_temperature: float = 1.0,
        progress: bool = False,
    ) -> Tensor:
        """Latents ``[bsz, channels, H, W]`` in float32; call it in eval mode and without gradients.

        Args:
            bsz: images.
            num_iter: decoding steps.
            cfg: guidance scale; 1 is none.
            cfg_schedule: "linear" or "constant".
            labels: int64 ``[bsz]``; None for the null class.
            infer_temperature: factor on the generator's shifts.
            progress: whether to show a bar.

        Raises:
            ValueError: another ``cfg_schedule``.
        """
        if cfg_schedule not in ("linear", "constant"):
            raise ValueError(f"cfg_schedule is {cfg_schedule!r}; it must be 'linear' or 'constant'")
        device, guided = self.mask_token.device, cfg != 1.0
        mask = torch.ones(bsz, self.seq_len).to(device)
        tokens = torch.zeros(bsz, self.seq_len, self.token_embed_dim).to(device)
        orders = self.sample_orders(bsz)
        for step in tqdm(range(num_iter), disable=not progress):
            known = tokens.clone()
            classes = self.fake_latent.repeat(bsz, 1) if labels is None else self.class_emb(labels)
            if guided:
                tokens, mask = torch.cat([tokens, tokens]), torch.cat([mask, mask])
                classes = torch.cat([classes, self.fake_latent.repeat(bsz, 1)])
            z = self.hidden_states(tokens, mask, classes)

            wanted = np.floor(self.seq_len * np.cos(math.pi / 2 * (step + 1) / num_iter))
            keep = torch.minimum(mask.sum(dim=-1, keepdim=True) - 1, torch.Tensor([wanted]).to(device))
            keep = torch.maximum(torch.Tensor([1]).to(device), keep)[0]
            next_mask, mask = mask_by_order(keep, orders, bsz, self.seq_len), mask[:bsz].bool()
            predicted = mask if step == num_iter - 1 else mask.logical_xor(next_mask)
            mask = next_mask

            rows = torch.cat([predicted, predicted]) if guided else predicted
            scale = 1 + (cfg - 1) * (self.seq_len - keep) / self.seq_len if cfg_schedule == "linear" else cfg
            sampled = self.sample_rows(z[rows.nonzero(as_tuple=True)], infer_temperature, scale)
            known[predicted.nonzero(as_tuple=True)] = sampled
            tokens = known.clone()
        return self.unpatchify(tokens)


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
