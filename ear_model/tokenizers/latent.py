"""Weight files of latent tokenizers: the public ``kl16.ckpt`` and our own safetensors.

No code in a file is ever run: pickles are read with ``weights_only=True``, which refuses everything but tensors and
plain containers.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ear_model.errors import shown
from ear_model.json_files import parse_json
from ear_model.model.weights import on_meta
from ear_model.tensor_files import read_tensors, usable_weights, without_wrappers, write_tensors
from ear_model.tokenizers.config import KL16, KL16_LATENT_SCALE, AutoencoderConfig, check_latent_scale
from ear_model.tokenizers.kl16 import AutoencoderKL, Posterior
from ear_model.tokenizers.public_files import IGNORED_PREFIXES, read_public
from ear_model.tokenizers.vq16 import EMBEDDING, read_vq
from ear_model.torch_files import read_torch

# One entry of the metadata: safetensors writes several in a random order, and a file's checksum would change with it.
METADATA_KEY = "ear_model_autoencoder"
FORMAT_VERSION = 1
# Fields that stored shapes may lack: added later, with the value for what was done before.
_ADDED_FIELDS = {"decoder_attention": False}
# Where pickles keep a state dict: MAR's file and latent-diffusion's; diffusers' is the file itself.
STATE_KEYS = ("model", "state_dict")


@dataclass
class AutoencoderTokenizer:
    """What turns images into latents and latents into images: an autoencoder in eval mode, without gradients."""

    autoencoder: AutoencoderKL
    latent_scale: float
    """Factor on the latents that the model reads; about 1 / standard deviation."""

    def __post_init__(self) -> None:
        check_latent_scale(self.latent_scale)
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
            public file, safetensors or pickle, in the layout of latent-diffusion (``kl16.ckpt``, ``state_dict``
            files, whole diffusion models) or of diffusers' AutoencoderKL. Its latent scale is the file's
            ``scale_factor``, or ``scaling_factor`` of a ``config.json`` beside it; else KL-16's for that shape, and
            diffusers' default 0.18215 in that layout. Entries that no image passes through are ignored. Or a pickle
            in the layout of VQ-16 (:mod:`ear_model.tokenizers.vq16`), of latent scale 1.
        device: where to put it.

    Raises:
        ValueError: not there, damaged, a pickle that is more than tensors, or a latent scale that is
            not known, or tensors that are missing, unknown, of another shape or not finite, named.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"tokenizer weights {path} are not there; give the file, such as kl16.ckpt")
    if path.suffix == ".safetensors":
        config, scale, tensors = _read_safetensors(path)
    else:
        tensors, is_kl16 = _read_pickle(path)
        if EMBEDDING in tensors:
            return AutoencoderTokenizer(read_vq(path, tensors).to(device), 1.0)
        config, scale = KL16, KL16_LATENT_SCALE
        if not is_kl16:
            config, scale, tensors = read_public(path, tensors)
    try:
        check_latent_scale(scale)
    except ValueError as error:
        raise ValueError(f"{path}: its {error}") from error
    if config.residual_blocks > len(tensors):  # before so many are made
        raise ValueError(f"{path}: residual_blocks is {config.residual_blocks}; it holds {len(tensors)} tensors")
    # Every weight comes from the file: no time is spent on an initialisation.
    autoencoder = on_meta(lambda: AutoencoderKL(config), path)
    weights = usable_weights(path, autoencoder.state_dict(), tensors)
    autoencoder.load_state_dict(weights, assign=True)
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


def _read_pickle(path: Path) -> tuple[dict[str, Any], bool]:
    """The tensors, and whether they are under the key of ``kl16.ckpt``, which is of KL-16 alone."""
    try:
        stored = read_torch(path)
    except ValueError as error:
        raise ValueError(
            f"{error}; a file that is damaged, or a pickle that wants to run code, which is refused: give kl16.ckpt "
            "or a .safetensors file of `ear train-tokenizer`"
        ) from error
    tensors = next((stored[key] for key in STATE_KEYS if key in stored), stored) if isinstance(stored, dict) else None
    if not isinstance(tensors, dict) or not any(isinstance(value, Tensor) for value in tensors.values()):
        held = sorted(map(str, stored))[:5] if isinstance(stored, dict) else type(stored).__name__
        raise ValueError(f'{path} has no dict of tensors under the key "model", as kl16.ckpt has; it holds {held}')
    named = without_wrappers({str(name): value for name, value in tensors.items()}, path)
    is_kl16 = STATE_KEYS[0] in stored
    if is_kl16:
        named = {name: value for name, value in named.items() if not name.startswith(IGNORED_PREFIXES)}
    return named, is_kl16


def _read_safetensors(path: Path) -> tuple[AutoencoderConfig, float, dict[str, Tensor]]:
    metadata, tensors = read_tensors(path)
    if METADATA_KEY not in metadata:
        return read_public(path, without_wrappers(tensors, path))
    description = parse_json(metadata[METADATA_KEY], f"{path}: {METADATA_KEY} in its metadata")
    try:
        version, values = description["version"], dict(description["config"])
        if version != FORMAT_VERSION:
            raise ValueError(f"version {shown(version)}; this program reads {FORMAT_VERSION}")
        values = {**_ADDED_FIELDS, **values}
        if set(values) != {field.name for field in fields(AutoencoderConfig)}:
            raise ValueError(f"fields {sorted(values)}")
        scale = description["latent_scale"]
        if not isinstance(scale, (int, float)) or isinstance(scale, bool):
            raise ValueError(f"latent_scale is {shown(scale)}; it must be a number")
        return AutoencoderConfig(**values), float(scale), tensors
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its metadata do not describe an autoencoder that we know ({error})") from error
