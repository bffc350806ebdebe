"""Weight files of latent tokenizers: the public ``kl16.ckpt`` and our own safetensors.

No code in a file is ever run: pickles are read with ``weights_only=True``, which refuses everything but tensors and
plain containers.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ear_model.tensor_files import check_shapes, read_tensors, write_tensors
from ear_model.tokenizers.config import KL16, KL16_LATENT_SCALE, AutoencoderConfig
from ear_model.tokenizers.kl16 import AutoencoderKL, Posterior

# One entry of the metadata: safetensors writes several in a random order, and a file's checksum would change with it.
METADATA_KEY = "ear_model_autoencoder"
FORMAT_VERSION = 1
# Of the code that trained the public autoencoder: its discriminator and perceptual loss, no part of the model.
IGNORED_PREFIXES = ("loss.",)


@dataclass
class AutoencoderTokenizer:
    """What turns images into latents and latents into images: an autoencoder in eval mode, without gradients."""

    autoencoder: AutoencoderKL
    latent_scale: float
    """Factor on the latents that the model reads; about 1 / standard deviation."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.latent_scale) and self.latent_scale > 0):
            raise ValueError(f"latent scale is {self.latent_scale}; it must be positive and finite")
        self.latent_channels = self.autoencoder.config.latent_channels
        self.downsampling = self.autoencoder.config.downsampling
        self.autoencoder.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Unscaled mean, then log variance clamped to -30..20, ``[B, 2 c, H / f, W / f]``, of images ``[B, 3, H, W]``
        in -1..1. Raises ValueError for other shapes."""
        posterior = self.autoencoder.encode(images)
        return torch.cat([posterior.mean, posterior.logvar], dim=1)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 16) -> Tensor:
        """Images ``[B, 3, h f, w f]`` in -1..1 of scaled latents ``[B, c, h, w]``, such as a model samples.

        Args:
            latents: scaled latents.
            batch_size: images decoded at a time.

        Raises:
            ValueError: other shapes.
        """
        parts = latents.split(batch_size) if latents.ndim and len(latents) else (latents,)
        return torch.cat([self.autoencoder.decode(part / self.latent_scale).clamp(-1, 1) for part in parts])

    def sample_latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents ``[B, c, H / f, W / f]`` drawn from the posterior of images ``[B, 3, H, W]``."""
        return Posterior(self.encode(images)).sample(generator) * self.latent_scale

    @property
    def device(self) -> torch.device:
        """Where the weights are, and images and latents must be."""
        return self.autoencoder.quant_conv.weight.device


def load_latent_tokenizer(path: str | Path, device: torch.device | str = "cpu") -> AutoencoderTokenizer:
    """The tokenizer of a weight file, on ``device``.

    Args:
        path: ``*.safetensors`` of :func:`save_autoencoder` (its shape and latent scale are in the metadata), or a
            pickle with the layout of the public ``kl16.ckpt``: a dict whose "model" holds the 312 tensors of KL-16.
            Its ``loss.*`` entries, which no image passes through, are ignored.
        device: where to put it.

    Raises:
        ValueError: not there, damaged, a pickle that is more than tensors, or tensors that are missing, unknown, of
            another shape or not finite, named.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"tokenizer weights {path} are not there; give the file, such as kl16.ckpt")
    if path.suffix == ".safetensors":
        config, scale, tensors = _read_safetensors(path)
    else:
        config, scale, tensors = KL16, KL16_LATENT_SCALE, _read_public(path)
    # Every weight comes from the file: no time is spent on an initialisation.
    with torch.device("meta"):
        autoencoder = AutoencoderKL(config)
    expected = autoencoder.state_dict()
    _check_tensors(path, expected, tensors)
    autoencoder.load_state_dict({name: tensors[name].float() for name in expected}, assign=True)
    return AutoencoderTokenizer(autoencoder.to(device), scale)


def save_autoencoder(path: Path, autoencoder: AutoencoderKL, latent_scale: float) -> None:
    """Write an autoencoder as safetensors, its shape and latent scale in the metadata."""
    tensors = {name: tensor.float() for name, tensor in autoencoder.state_dict().items()}
    description = {
        "version": FORMAT_VERSION,
        "config": asdict(autoencoder.config),
        "latent_scale": float(latent_scale),
    }
    write_tensors(path, tensors, {METADATA_KEY: json.dumps(description)})


def _read_public(path: Path) -> dict[str, Tensor]:
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever the reader trips over in a foreign file, none of it was executed.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path} can't be read as tensors alone ({type(error).__name__}: {reason}); it is damaged, or a pickle "
            "that wants to run code, which is refused. Give kl16.ckpt or a .safetensors file of `ear train-tokenizer`"
        ) from error
    tensors = stored.get("model") if isinstance(stored, dict) else None
    if not isinstance(tensors, dict):
        held = sorted(map(str, stored))[:5] if isinstance(stored, dict) else type(stored).__name__
        raise ValueError(f'{path} has no dict of tensors under the key "model", as kl16.ckpt has; it holds {held}')
    return {str(name): value for name, value in tensors.items() if not str(name).startswith(IGNORED_PREFIXES)}


def _read_safetensors(path: Path) -> tuple[AutoencoderConfig, float, dict[str, Tensor]]:
    metadata, tensors = read_tensors(path)
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path} is no autoencoder of ours ({METADATA_KEY} is not in its metadata)")
    try:
        description = json.loads(metadata[METADATA_KEY])
        version, values = description["version"], description["config"]
        if version != FORMAT_VERSION:
            raise ValueError(f"version {version!r}; this program reads {FORMAT_VERSION}")
        if set(values) != {field.name for field in fields(AutoencoderConfig)}:
            raise ValueError(f"fields {sorted(values)}")
        return AutoencoderConfig(**values), float(description["latent_scale"]), tensors
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its metadata do not describe an autoencoder that we know ({error})") from error


def _check_tensors(path: Path, expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = f"a tensor of {tensor.dtype}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{path}: {name} is {kind}; it must be a floating-point tensor")
    check_shapes(path, {name: parameter.shape for name, parameter in expected.items()}, tensors)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values; the file is damaged")
