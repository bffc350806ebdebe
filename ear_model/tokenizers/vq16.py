"""VQ-16, the public autoencoder over a codebook, in the layout of LlamaGen's ``vq_ds16_c2i.pt``.

KL-16's encoder and decoder, with attention at the lowest resolution of both; between them latents of D numbers that
become the nearest of K codes, latents and codes scaled to length 1. (Layout and maths: FoundationVision/LlamaGen,
tokenizer/tokenizer_image/vq_model.py.)
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ear_model.model.weights import on_meta
from ear_model.tensor_files import check_numbers, usable_weights
from ear_model.tokenizers.codebook import nearest_codes
from ear_model.tokenizers.config import AutoencoderConfig
from ear_model.tokenizers.kl16 import LOGVAR_RANGE, AutoencoderKL, ConvDecoder, ConvEncoder
from ear_model.tokenizers.public_files import autoencoder_shape

EMBEDDING = "quantize.embedding.weight"
_BOOKKEEPING = "quantize.codebook_used"


class VqAutoencoder(AutoencoderKL):
    """An autoencoder over a codebook; its latents are codes.

    Args:
        config: the shape; ``latent_channels`` is D.
        inner_channels: channels that encoder and decoder have in the place of latents; even.
        codes: K.
    """

    def __init__(self, config: AutoencoderConfig, inner_channels: int, codes: int) -> None:
        nn.Module.__init__(self)
        self.config = config
        # An encoder has a mean and a log variance a latent channel.
        self.encoder = ConvEncoder(replace(config, latent_channels=inner_channels // 2))
        self.decoder = ConvDecoder(replace(config, latent_channels=inner_channels))
        self.quant_conv = nn.Conv2d(inner_channels, config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, inner_channels, 1)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(codes, config.latent_channels)})

    @property
    def codes(self) -> Tensor:
        """``[K, D]``, each of length 1."""
        embedding: Any = self.quantize["embedding"]
        return F.normalize(embedding.weight, dim=1)

    def indices(self, images: Tensor) -> Tensor:
        """int64 ``[B, H / f, W / f]`` of images ``[B, 3, H, W]`` in -1..1. Raises ValueError for other shapes."""
        latents = F.normalize(super().moments(images), dim=1)
        return nearest_codes(latents.movedim(1, -1), self.codes)

    def vectors(self, indices: Tensor) -> Tensor:
        """The latents ``[B, D, h, w]`` of indices ``[B, h, w]``."""
        return self.codes[indices].movedim(-1, 1)

    def moments(self, images: Tensor) -> Tensor:
        """The codes of images as posteriors without width, ``[B, 2 D, H / f, W / f]``: a cache takes them as such."""
        vectors = self.vectors(self.indices(images))
        return torch.cat([vectors, torch.full_like(vectors, LOGVAR_RANGE[0])], dim=1)


def read_vq(path: Path, tensors: dict[str, Any]) -> VqAutoencoder:
    """The autoencoder of a public state dict; one that has EMBEDDING.

    Raises:
        ValueError: tensors that are missing, unknown, of another shape, not floating-point or not finite, named.
    """
    tensors = {name: value for name, value in tensors.items() if name != _BOOKKEEPING}
    check_numbers(path, tensors)
    numbers = (re.match(r"decoder\.conv_blocks\.(\d{1,4})\.", name) for name in tensors)
    levels = 1 + max((int(found[1]) for found in numbers if found), default=0)
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = _renamed(name, levels)
        if ours in renamed:
            raise ValueError(f"{path}: {name} is there twice")
        renamed[ours] = tensor
    shape, embedding = autoencoder_shape(path, renamed), renamed[EMBEDDING]
    if embedding.ndim != 2 or 0 in embedding.shape or shape.latent_channels % 2:
        raise ValueError(
            f"{path} is no VQ autoencoder that we know: {EMBEDDING} has shape {tuple(embedding.shape)}, the decoder "
            f"reads {shape.latent_channels} channels"
        )
    if shape.residual_blocks > len(renamed):  # before so many are made
        raise ValueError(f"{path}: it has {shape.residual_blocks} residual blocks and {len(renamed)} tensors")
    codes, dim = embedding.shape
    config = replace(shape, latent_channels=dim)
    autoencoder = on_meta(lambda: VqAutoencoder(config, shape.latent_channels, codes), path)
    autoencoder.load_state_dict(usable_weights(path, autoencoder.state_dict(), renamed), assign=True)
    return autoencoder


def _renamed(name: str, levels: int) -> str:
    """KL-16's name of one of the layout's."""
    name = re.sub(r"^encoder\.conv_blocks\.(\d+)\.", r"encoder.down.\1.", name)
    name = re.sub(r"^decoder\.conv_blocks\.(\d+)\.", lambda found: f"decoder.up.{levels - 1 - int(found[1])}.", name)
    name = re.sub(r"^(encoder\.down|decoder\.up)\.(\d+)\.res\.", r"\1.\2.block.", name)
    middle = {"0": "block_1", "1": "attn_1", "2": "block_2"}
    return re.sub(r"^((?:en|de)coder)\.mid\.([012])\.", lambda found: f"{found[1]}.mid.{middle[found[2]]}.", name)
