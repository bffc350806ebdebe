"""Files of weights: safetensors in the key layout of the public EAR code, the configuration in the metadata."""

import json
from pathlib import Path

from torch import Tensor, nn

from ear_model.config import ModelConfig, from_dict, to_dict
from ear_model.tensor_files import check_shapes, read_tensors, write_tensors

_GENERATOR_PREFIX, _PUBLIC_GENERATOR_PREFIX = "score.generator.", "scoreloss.net."


def public_key(name: str) -> str:
    """The public checkpoint's key (docs/model.md, "Public files") of one of our parameters."""
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
    public = {public_key(name): tensor for name, tensor in tensors.items()}
    write_tensors(path, public, {"format": "ear_model", "config": json.dumps(to_dict(config))})


def load_weights(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Configuration and parameters (our names) of a weight file.

    Raises:
        ValueError: not there, damaged, not written by this program, or of another version.
    """
    metadata, tensors = read_tensors(path)
    if metadata.get("format") != "ear_model" or "config" not in metadata:
        raise ValueError(f"{path} is not a weight file of ear_model (no configuration in its metadata)")
    try:
        stored = json.loads(metadata["config"])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the configuration in its metadata is damaged ({error})") from error
    config = from_dict(ModelConfig, stored, str(path))
    return config, {our_key(key): tensor for key, tensor in tensors.items()}


def check_fit(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Raise ValueError unless the parameters (our names) are those of the model, and say what does not fit."""
    check_shapes(path, {name: parameter.shape for name, parameter in model.named_parameters()}, tensors)


def load_into(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load parameters into a model, or raise ValueError saying what does not fit."""
    check_fit(model, tensors, path)
    model.load_state_dict(tensors)
