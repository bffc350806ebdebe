"""Files of weights: safetensors in the key layout of the public EAR code, the configuration in the metadata."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from ear_model.config import ModelConfig, from_dict, to_dict
from ear_model.files import write_atomically

_GENERATOR_PREFIX, _PUBLIC_GENERATOR_PREFIX = "score.generator.", "scoreloss.net."


def public_key(name: str) -> str:
    """The public checkpoint's key (spec 6) of one of our parameters."""
    if name.startswith(_GENERATOR_PREFIX):
        return _PUBLIC_GENERATOR_PREFIX + name.removeprefix(_GENERATOR_PREFIX)
    return name.removeprefix("backbone.")


def our_key(key: str) -> str:
    """The inverse of :func:`public_key`."""
    if key.startswith(_PUBLIC_GENERATOR_PREFIX):
        return _GENERATOR_PREFIX + key.removeprefix(_PUBLIC_GENERATOR_PREFIX)
    return f"backbone.{key}"


def save_weights(path: Path, tensors: dict[str, Tensor], config: ModelConfig) -> None:
    """Write parameters (our names) as safetensors in the public layout, the configuration in the metadata."""
    public = {public_key(name): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "ear_model", "config": json.dumps(to_dict(config))}
    write_atomically(path, lambda temporary: safetensors.torch.save_file(public, temporary, metadata))


def load_weights(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and parameters (our names) of a weight file.

    Raises:
        ValueError: not there, damaged, not written by this program, or of another version.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "ear_model" or "config" not in metadata:
                raise ValueError(f"{path} is not a weight file of ear_model (no configuration in its metadata)")
            try:
                stored = json.loads(metadata["config"])
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: the configuration in its metadata is damaged ({error})") from error
            config = from_dict(ModelConfig, stored, str(path))
            tensors = {our_key(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error})") from error
    return config, tensors


def check_fit(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError unless the parameters (our names) are those of the model, and say what does not fit."""
    own = dict(model.named_parameters())
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or unknown:
        raise ValueError(
            f"{path} does not fit the model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}"
        )
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(
                f"{path}: {public_key(name)} has shape {tuple(tensors[name].shape)}; "
                f"the model needs {tuple(parameter.shape)}"
            )


def load_into(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load parameters into a model, or raise ValueError saying what does not fit."""
    check_fit(model, tensors, path)
    model.load_state_dict(tensors)
