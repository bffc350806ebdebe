"""Checkpoints of a run directory.

    RUN/config.json                        the configuration
    RUN/checkpoints/step_00000250/         the last whole checkpoint
        model.safetensors                  weights, in the key layout of the public EAR code
        ema.safetensors                    their moving average, same layout
        trainer.pt                         optimiser, random generators, position in the data

A checkpoint is written into a directory of a temporary name, flushed, and renamed; only then is the one before
removed. So whenever the process dies, one whole checkpoint is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ear_model.config import ModelConfig, RunConfig, from_dict, to_dict
from ear_model.ear import EAR
from ear_model.files import flush, write_atomically

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
_STEP_NAME = re.compile(r"step_(\d{8,})")
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


def check_fit(model: EAR, tensors: dict[str, Tensor], path: Path) -> None:
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


def load_into(model: EAR, tensors: dict[str, Tensor], path: Path) -> None:
    """Load parameters into a model, or raise ValueError saying what does not fit."""
    check_fit(model, tensors, path)
    model.load_state_dict(tensors)


def save_config(run_dir: Path, config: RunConfig) -> None:
    """Write RUN/config.json."""
    text = json.dumps(to_dict(config), indent=2) + "\n"
    write_atomically(run_dir / CONFIG_FILE, lambda temporary: temporary.write_text(text))


def load_config(run_dir: Path) -> RunConfig:
    """Read RUN/config.json. Raises ValueError unless ``run_dir`` is a run directory of this version."""
    path = run_dir / CONFIG_FILE
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a directory; give the --out directory of an `ear train`")
    if not path.is_file():
        raise ValueError(f"{run_dir} is not a run directory (it has no {CONFIG_FILE})")
    try:
        stored = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    return from_dict(RunConfig, stored, str(path))


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of the whole checkpoints, ascending."""
    directory = run_dir / CHECKPOINTS
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(match[1]) for match in map(_STEP_NAME.fullmatch, names) if match)


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of that step is."""
    return run_dir / CHECKPOINTS / f"step_{step:08d}"


def latest_checkpoint(run_dir: Path) -> Path:
    """The last whole checkpoint. Raises ValueError if there is none."""
    load_config(run_dir)
    steps = checkpoint_steps(run_dir)
    if not steps:
        raise ValueError(f"{run_dir} has no checkpoint yet; train it first")
    return checkpoint_dir(run_dir, steps[-1])


def save_checkpoint(
    run_dir: Path,
    step: int,
    model: EAR,
    averages: dict[str, Tensor],
    trainer_state: dict[str, Any],
    *,
    weights: dict[str, Tensor] | None = None,
) -> Path:
    """Write the checkpoint of ``step`` and remove the ones before, in that order.

    Args:
        run_dir: the run directory.
        step: optimiser steps done.
        model: the model.
        averages: moving averages by parameter name.
        trainer_state: tensors, numbers, lists and dicts.
        weights: parameters by name, where the model's own are spread over processes.
    """
    final = checkpoint_dir(run_dir, step)
    temporary = final.with_name(f".tmp-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_weights(temporary / "model.safetensors", weights or dict(model.named_parameters()), model.config)
    save_weights(temporary / "ema.safetensors", averages, model.config)
    write_atomically(temporary / "trainer.pt", lambda path: torch.save(trainer_state, path))
    flush(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    flush(final.parent)
    for old in checkpoint_steps(run_dir):
        if old != step:
            shutil.rmtree(checkpoint_dir(run_dir, old))
    return final


def load_trainer_state(path: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote as ``trainer_state``; no code in the file is ever run."""
    try:
        return torch.load(path / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path / 'trainer.pt'} is damaged or foreign ({type(error).__name__})") from error


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, on the CPU: parameters and averages by our names, and the trainer's state."""

    path: Path
    config: ModelConfig
    weights: dict[str, Tensor]
    averages: dict[str, Tensor]
    trainer_state: dict[str, Any]


def load_checkpoint(run_dir: Path) -> Checkpoint:
    """The last checkpoint of a run.

    Raises:
        ValueError: none is there; a file is missing, damaged, foreign, or of another model than the run's.
    """
    path = latest_checkpoint(run_dir)
    expected = load_config(run_dir).model
    tensors = []
    for name in ("model.safetensors", "ema.safetensors"):
        config, named = load_weights(path / name)
        if config != expected:
            raise ValueError(f"{path / name} holds another architecture than {run_dir / CONFIG_FILE}")
        tensors.append(named)
    weights, averages = tensors
    shapes, other = ({name: tensor.shape for name, tensor in named.items()} for named in tensors)
    if shapes != other:
        raise ValueError(f"{path}: model.safetensors and ema.safetensors hold different tensors")
    state = load_trainer_state(path)
    missing = {"optimizer", "step", "cpu_rng", "cuda_rng"} - state.keys()
    if missing:
        raise ValueError(f"{path / 'trainer.pt'} lacks {', '.join(sorted(missing))}")
    return Checkpoint(path, expected, weights, averages, state)


def load_model(run_dir: Path, *, ema: bool = True) -> EAR:
    """The model of a run directory's last checkpoint, on the CPU."""
    path = latest_checkpoint(run_dir) / ("ema.safetensors" if ema else "model.safetensors")
    config, tensors = load_weights(path)
    model = EAR(config)
    load_into(model, tensors, path)
    return model
