"""The KL-regularised convolutional autoencoder (docs/model.md, "Public files"), of which KL-16 is one setting.

Images ``[B, 3, H, W]`` in -1..1 become a diagonal Gaussian over latents ``[B, c, H / f, W / f]`` and back. Module
names are those of the public latent-diffusion code, so that the public weights load by their own keys. Convolutions
pad with zeros; a downsampling pads right and below only, as the public weights expect.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ear_model.tokenizers.config import KL16, AutoencoderConfig

NORM_EPS = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)


class Posterior:
    """Diagonal Gaussian over latents, from moments ``[B, 2 c, h, w]``: the mean, then the log variance.

    The log variance is clamped to -30..20, as in the public code.
    """

    def __init__(self, moments: Tensor) -> None:
        if moments.ndim != 4 or moments.shape[1] % 2:
            raise ValueError(f"moments have shape {tuple(moments.shape)}; they must be [B, 2 c, h, w]")
        self.mean, logvar = moments.chunk(2, dim=1)
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw ``[B, c, h, w]``; ``generator`` must be of the moments' device."""
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return torch.addcmul(self.mean, torch.exp(0.5 * self.logvar), noise)

    def kl(self) -> Tensor:
        """Divergence from the standard normal in nats, summed over an image: ``[B]``."""
        terms = self.mean.square() + self.logvar.exp() - 1 - self.logvar
        return 0.5 * terms.flatten(1).sum(1)


class ResidualBlock(nn.Module):
    """``x + conv(swish(norm(conv(swish(norm(x))))))``, with a 1x1 convolution on ``x`` where the channels change."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, inputs, NORM_EPS)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, outputs, NORM_EPS)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + hidden


class AttentionBlock(nn.Module):
    """One head of attention over all positions, with a residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, NORM_EPS)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        # [B, C, h, w] to [B, 1 head, h w, C]
        q, k, v = (layer(normed).flatten(2).transpose(1, 2).unsqueeze(1) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(mixed)


class Resample(nn.Module):
    """Half or double height and width, with a 3x3 convolution."""

    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if up else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, groups)
        self.attn_1 = AttentionBlock(channels, groups)
        self.block_2 = ResidualBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks (each followed by attention if there is any), then a resampling except at the end."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, groups: int, attention: bool, resample: str | None
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(outputs if index else inputs, outputs, groups) for index in range(blocks)
        )
        self.attn = nn.ModuleList(AttentionBlock(outputs, groups) for _ in range(blocks if attention else 0))
        self.downsample = Resample(outputs, up=False) if resample == "down" else None
        self.upsample = Resample(outputs, up=True) if resample == "up" else None

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[index](x)
        for resample in (self.downsample, self.upsample):
            if resample is not None:
                x = resample(x)
        return x


class ConvEncoder(nn.Module):
    """Images ``[B, 3, H, W]`` to ``[B, 2 c, H / f, W / f]``."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.channels * factor for factor in config.multipliers]
        last, groups = len(widths) - 1, config.norm_groups
        self.conv_in = nn.Conv2d(config.image_channels, config.channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            attention, resample = config.attention and level == last, "down" if level < last else None
            inputs = widths[level - 1] if level else config.channels
            self.down.append(Level(inputs, width, config.residual_blocks, groups, attention, resample))
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class ConvDecoder(nn.Module):
    """Latents ``[B, c, h, w]`` to images ``[B, 3, h f, w f]``. ``up.0`` is the level of full resolution, the last."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = [config.channels * factor for factor in config.multipliers]
        last, groups = len(widths) - 1, config.norm_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            inputs, resample = widths[min(level + 1, last)], "up" if level else None
            attention = config.decoder_attention and level == last
            self.up.append(Level(inputs, width, config.residual_blocks + 1, groups, attention, resample))
        self.norm_out = nn.GroupNorm(groups, widths[0], NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], config.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    """ConvEncoder and decoder. The latents here are as the network makes them; the latent scale is the tokenizer's.

    Args:
        config: the shape; KL-16's by default.
    """

    def __init__(self, config: AutoencoderConfig = KL16) -> None:
        super().__init__()
        self.config = config
        self.encoder = ConvEncoder(config)
        self.decoder = ConvDecoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def moments(self, images: Tensor) -> Tensor:
        """Mean and (unclamped) log variance ``[B, 2 c, H / f, W / f]`` of images ``[B, 3, H, W]`` in -1..1.

        Raises:
            ValueError: other shapes, or a height or width that f does not divide: a stride would cut its rest off,
                and the decoded image would be smaller than the one encoded.
        """
        factor = self.config.downsampling
        if images.ndim != 4 or images.shape[1] != self.config.image_channels or 0 in images.shape:
            raise ValueError(
                f"images have shape {tuple(images.shape)}; they must be [B, {self.config.image_channels}, H, W]"
            )
        height, width = images.shape[2:]
        if height % factor or width % factor:
            raise ValueError(
                f"images are {height} x {width}; height and width must be multiples of {factor}, such as "
                f"{-(-height // factor) * factor} x {-(-width // factor) * factor}: crop, pad or resize them"
            )
        return self.quant_conv(self.encoder(images))

    def encode(self, images: Tensor) -> Posterior:
        """The Gaussian over latents ``[B, c, H / f, W / f]`` of images ``[B, 3, H, W]``; see :meth:`moments`."""
        return Posterior(self.moments(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, h f, w f]`` of unscaled latents ``[B, c, h, w]``. Raises ValueError for other shapes."""
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels or 0 in latents.shape:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; they must be [B, {self.config.latent_channels}, h, w]"
            )
        return self.decoder(self.post_quant_conv(latents))
