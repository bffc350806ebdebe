"""Checkpoints of a run directory (its files: ear_model/run_dir.py).

A checkpoint is written into a directory of a temporary name, flushed, and renamed; only then is the one before
removed. So whenever the process dies, one whole checkpoint is there.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ear_model.config import ModelConfig
from ear_model.ear import EAR
from ear_model.files import flush, remove_temporaries, write_atomically
from ear_model.model.weights import load_weights, save_weights
from ear_model.run_dir import (
    CHECKPOINTS,
    CONFIG_FILE,
    checkpoint_dir,
    checkpoint_steps,
    latest_checkpoint,
    load_config,
)


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
    try:
        temporary.mkdir(parents=True)
        save_weights(temporary / "model.safetensors", weights or dict(model.named_parameters()), model.config)
        save_weights(temporary / "ema.safetensors", averages, model.config)
        write_atomically(temporary / "trainer.pt", lambda path: torch.save(trainer_state, path))
        flush(temporary)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    flush(final.parent)
    for old in checkpoint_steps(run_dir):
        if old != step:
            shutil.rmtree(checkpoint_dir(run_dir, old))
    return final


def remove_leftovers(run_dir: Path) -> None:
    """Remove what killed processes left in a run directory; to be called by who has its lock."""
    remove_temporaries(run_dir)
    for directory in (run_dir / CHECKPOINTS).glob(".tmp-*"):
        shutil.rmtree(directory, ignore_errors=True)


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
