"""Files of weights: safetensors in the key layout of the public EAR code, the configuration in the metadata."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ear_model.config import ModelConfig, from_dict, to_dict
from ear_model.json_files import parse_json
from ear_model.score_names import score_entry
from ear_model.tensor_files import read_tensors, usable_weights, write_tensors

BLOCKS, ENCODER_BLOCKS = "backbone.decoder_blocks.", "backbone.encoder_blocks."
_BACKBONE, _SCORE = "backbone.", "score."
Module = TypeVar("Module", bound=nn.Module)


def public_key(name: str, score: str = "energy") -> str:
    """The public checkpoint's key (docs/model.md, "Public files") of one of our parameters, of a model of this score.

    A parameter of a score for which no public code has a name keeps its own, which begins with ``score.``.
    """
    ours, public = score_entry(score).public_names or ("", _SCORE)
    if name.startswith(_SCORE + ours):
        return public + name.removeprefix(_SCORE + ours)
    return name.removeprefix(_BACKBONE)


def our_key(key: str, score: str = "energy") -> str:
    """The inverse of :func:`public_key`."""
    ours, public = score_entry(score).public_names or ("", _SCORE)
    if key.startswith(public):
        return _SCORE + ours + key.removeprefix(public)
    return key if key.startswith(_SCORE) else _BACKBONE + key


def generator_blocks(score: str) -> str:
    """What the names of the residual blocks of a score's MLP begin with."""
    ours = (score_entry(score).public_names or ("generator.",))[0]
    return f"{_SCORE}{ours}res_blocks."


def save_weights(path: Path, tensors: dict[str, Tensor], config: ModelConfig) -> None:
    """Write parameters (our names) as safetensors in the public layout, the configuration in the metadata."""
    public = {public_key(name, config.score): tensor for name, tensor in tensors.items()}
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
    named = {our_key(key, config.score): tensor for key, tensor in tensors.items()}
    check_blocks(config, named, path)
    return config, named


def check_blocks(config: ModelConfig, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError unless a configuration has as many blocks as the tensors (our names).

    To be called before the model is made on the meta device, where all other sizes can be compared.
    """
    fields = [("depth", BLOCKS)]
    if config.backbone == "mar":
        fields.append(("encoder_depth", ENCODER_BLOCKS))
    if "generator_depth" in score_entry(config.score).options:
        fields.append(("generator_depth", generator_blocks(config.score)))
    for field, prefix in fields:
        there, said = count_blocks(tensors, prefix), getattr(config, field)
        if said != there:
            raise ValueError(f"{path}: {field} of its configuration is {said}; it holds {there} blocks")


def check_same_score(found: ModelConfig, wanted: ModelConfig, path: Path, run_dir: Path) -> None:
    """Raise ValueError, naming both, unless a weight file is of the score and order that its run is of."""
    for name in ("score", "order"):
        there, said = getattr(found, name), getattr(wanted, name)
        if there != said:
            raise ValueError(f"{path} holds a model of {name} {there!r}; the run {run_dir} is of {name} {said!r}")


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
