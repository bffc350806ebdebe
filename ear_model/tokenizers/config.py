"""Shapes of autoencoders and how small ones are trained."""

from dataclasses import dataclass

from ear_model.config_checks import check_range, check_types


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an autoencoder; the defaults are KL-16's."""

    channels: int = 128
    """Channels of the first level; a multiple of ``norm_groups``."""
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """Factor on ``channels`` of each level; every level but the last halves height and width."""
    residual_blocks: int = 2
    """Residual blocks of an encoder level; a decoder level has one more."""
    latent_channels: int = 16
    """Channels of the latents."""
    image_channels: int = 3
    """Channels of the images."""
    attention: bool = True
    """Attention after the residual blocks of the encoder's last level; both middles always have it."""
    decoder_attention: bool = False
    """Attention after the residual blocks of the decoder's first level, at the resolution of the latents."""
    norm_groups: int = 32
    """Groups of the norms. With one channel a group, a norm would take every channel's mean away, and with it the
    colour of the whole image: leave at least four channels a group, as KL-16 does."""

    def __post_init__(self) -> None:
        # Metadata of a file gives a list.
        object.__setattr__(self, "multipliers", tuple(self.multipliers))
        check_types(self)
        counts = ("channels", "residual_blocks", "latent_channels", "image_channels", "norm_groups")
        check_range(self, "at least 1", *counts)
        if self.channels % self.norm_groups:
            raise ValueError(f"channels is {self.channels}; it must be a multiple of norm_groups, {self.norm_groups}")
        if not 1 <= len(self.multipliers) <= 16 or min(self.multipliers) < 1:
            raise ValueError(
                f"multipliers are {self.multipliers}; they must be integers of at least 1, one a level, 16 at most"
            )

    @property
    def downsampling(self) -> int:
        """f, height of an image over height of its latents."""
        return 2 ** (len(self.multipliers) - 1)


KL16 = AutoencoderConfig()
KL16_LATENT_SCALE = 0.2325  # 1 / standard deviation of KL-16's latents over ImageNet
LATENT_SCALES = (1e-6, 1e6)


def check_latent_scale(scale: float) -> None:
    """Raise ValueError unless it is in ``LATENT_SCALES``: float32 latents would be infinite or 0 beyond it."""
    low, high = LATENT_SCALES
    if not low <= scale <= high:
        raise ValueError(f"latent_scale is {scale}; it must be from {low:g} to {high:g}, 1 / standard deviation")


# 64 tokens of 8 numbers for an image of 64 pixels, which is what the recipe glyphs64 trains on.
SMALL = AutoencoderConfig(channels=32, multipliers=(1, 2, 2, 4), residual_blocks=1, latent_channels=8, norm_groups=8)


@dataclass(frozen=True)
class TokenizerTraining:
    """How a small autoencoder is trained."""

    image_size: int = 64
    """Height and width that images are scaled and cropped to."""
    steps: int = 3000
    """Optimiser steps."""
    batch_size: int = 128
    """Images a step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, after a linear warm-up of 5 % of the steps; then a cosine to zero."""
    kl_weight: float = 1e-4
    """Weight of the KL divergence, in nats per latent number, beside the absolute error per pixel in -1..1."""
    clip: float = 1.0
    """Largest gradient norm."""
    seed: int = 0
    """Of weights, held-out images, order, flips and posterior draws."""
    checkpoint_every: int = 500
    """Steps between writes of OUT.partial, from which the same command goes on."""
    cuda_graph: bool = True
    """On a GPU, replay forward and backward as one CUDA graph: launching their kernels takes longer than they run."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "at least 1", "image_size", "steps", "batch_size", "checkpoint_every")
        check_range(self, "positive and finite", "lr", "clip")
        check_range(self, "at least 0 and finite", "kl_weight")
        check_range(self, "at least 0", "seed")


@dataclass(frozen=True)
class CodebookTraining:
    """How a codebook is trained."""

    size: int = 1024
    """Number K of codes."""
    steps: int = 2000
    """Steps at most; it ends when the distortion stalls."""
    batch_size: int = 256
    """Images a step."""
    decay: float = 0.98
    """Decay a step of the moving averages that codes are made of."""
    seed: int = 0
    """Of the first codes, of the images' order and draws, and of what dead codes become."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "at least 1", "steps", "batch_size")
        check_range(self, "at least 2", "size")
        check_range(self, "at most 2^24", "size")
        check_range(self, "in [0, 1)", "decay")
        check_range(self, "at least 0", "seed")
