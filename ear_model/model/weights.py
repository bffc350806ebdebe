"""Files of weights: safetensors in the key layout of the public EAR code, the configuration in the metadata."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ear_model.config import ModelConfig, from_dict, to_dict
from ear_model.json_files import parse_json
from ear_model.tensor_files import read_tensors, usable_weights, write_tensors

BLOCKS, GENERATOR_BLOCKS = "backbone.decoder_blocks.", "score.generator.res_blocks."
Module = TypeVar("Module", bound=nn.Module)

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
        ValueError: not there, damaged, not written by this program, of another version, or of a configuration that
            is not that of as many blocks.
    """
    metadata, tensors = read_tensors(path)
    if metadata.get("format") != "ear_model" or "config" not in metadata:
        raise ValueError(f"{path} is not a weight file of ear_model (no configuration in its metadata)")
    stored = parse_json(metadata["config"], f"{path}: the configuration in its metadata")
    config = from_dict(ModelConfig, stored, str(path))
    named = {our_key(key): tensor for key, tensor in tensors.items()}
    check_blocks(config, named, path)
    return config, named


def check_blocks(config: ModelConfig, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError unless a configuration has as many blocks as the tensors (our names).

    To be called before the model is made on the meta device, where all other sizes can be compared.
    """
    for field, prefix in (("depth", BLOCKS), ("generator_depth", GENERATOR_BLOCKS)):
        there, said = count_blocks(tensors, prefix), getattr(config, field)
        if said != there:
            raise ValueError(f"{path}: {field} of its configuration is {said}; it holds {there} blocks")


def count_blocks(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Number of different words that follow a prefix of the tensors' names."""
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def on_meta(build: Callable[[], Module], where: Path | str) -> Module:
    """A module without memory: names and shapes. Raises ValueError for sizes beyond what any tensor can have."""
    try:
        with torch.device("meta"):
            return build()
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ValueError(f"{where}: its sizes are beyond those of any model") from error


def check_fit(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The parameters (our names) in float32.

    Raises:
        ValueError: unless they are those of the model, floating-point and finite; says what is not.
    """
    return usable_weights(path, dict(model.named_parameters()), tensors)


def load_into(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load parameters into a model, or raise ValueError saying what does not fit."""
    model.load_state_dict(check_fit(model, tensors, path))
