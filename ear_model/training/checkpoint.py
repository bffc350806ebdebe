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

from ear_model.config import ModelConfig, TrainConfig
from ear_model.ear import EAR
from ear_model.errors import shown
from ear_model.files import flush, remove_temporaries, write_atomically
from ear_model.model.weights import check_fit, check_same_score, load_weights, on_meta, save_weights
from ear_model.run_dir import (
    AVERAGES_FILE,
    CHECKPOINTS,
    CONFIG_FILE,
    WEIGHTS_FILE,
    checkpoint_dir,
    checkpoint_steps,
    latest_checkpoint,
    load_config,
    step_of,
)
from ear_model.torch_files import read_torch
from ear_model.training import optim
from ear_model.training.optimizer_state import is_number, moments_by_name, number_moments

TRAINER_FILE = "trainer.pt"


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
        save_weights(temporary / WEIGHTS_FILE, weights or dict(model.named_parameters()), model.config)
        save_weights(temporary / AVERAGES_FILE, averages, model.config)
        write_atomically(temporary / TRAINER_FILE, lambda path: torch.save(trainer_state, path))
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
    """What :func:`save_checkpoint` wrote as ``trainer_state``; no code in the file is ever run.

    Raises:
        ValueError: not there, damaged or foreign.
    """
    state = read_torch(path / TRAINER_FILE)
    if not isinstance(state, dict):
        raise ValueError(f"{path / TRAINER_FILE} is damaged or foreign: it holds no dict")
    return state


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
        ValueError: none is there; a file is missing, damaged, foreign, or of another model or training than the
            run's; an entry of the trainer's state that does not fit its parameter.
    """
    path = latest_checkpoint(run_dir)
    run = load_config(run_dir)
    tensors = []
    for name in (WEIGHTS_FILE, AVERAGES_FILE):
        config, named = load_weights(path / name)
        check_same_score(config, run.model, path / name, run_dir)
        if config != run.model:
            raise ValueError(f"{path / name} holds another architecture than {run_dir / CONFIG_FILE}")
        model = on_meta(lambda: EAR(run.model), path / name)
        tensors.append(check_fit(model, named, path / name))
    state = load_trainer_state(path)
    _check_state(state, model, run.train, path)
    weights, averages = tensors
    return Checkpoint(path, run.model, weights, averages, state)


def _check_state(state: dict[str, Any], model: EAR, train: TrainConfig, path: Path) -> None:
    """Raise ValueError unless a trainer can go on from this; its moments become float32."""
    where = str(path / TRAINER_FILE)
    missing = {"optimizer", "step", "cpu_rng", "cuda_rng"} - state.keys()
    if missing:
        raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
    step = state["step"]
    if type(step) is not int or step != step_of(path):
        raise ValueError(f"{where}: step is {shown(step)}; {path.name} is the directory of another")
    moments = moments_by_name(state["optimizer"], model, train.parameter_groups, where)
    if step and not moments:
        raise ValueError(f"{where}: the optimiser has no state after {step} steps")
    states, numbers = number_moments(moments, model, train.parameter_groups)
    groups, own = state["optimizer"]["param_groups"], optim.make_optimizer(model, train).state_dict()["param_groups"]
    for group, expected, indices in zip(groups, own, numbers, strict=True):
        if group["params"] != indices:
            raise ValueError(f"{where}: params of the optimiser are not numbered from 0 on")
        for name in ("weight_decay", "lr_scale", "betas", "eps"):
            found = tuple(group[name]) if isinstance(group.get(name), list) else group.get(name)
            if isinstance(found, Tensor) or found != expected[name]:
                raise ValueError(
                    f"{where}: {name} of the optimiser is {shown(found)}; {CONFIG_FILE} says {expected[name]}"
                )
        if not is_number(group.get("lr")):
            raise ValueError(f"{where}: lr of the optimiser is {shown(group.get('lr'))}; it must be a number")
    state["optimizer"]["state"] = states
    _check_generators(state, "", where)
    others = state.get("process_rng", [None])
    if not isinstance(others, list) or not all(other is None or isinstance(other, dict) for other in others):
        raise ValueError(f"{where}: process_rng is no list of states of random generators")
    for index, other in enumerate(others):
        if other is not None:
            _check_generators(other, f" of process {index}", where)
    check_public(state.get("public"), where)


def _check_generators(state: dict[str, Any], of: str, where: str) -> None:
    found = state.get("cpu_rng")
    try:
        torch.Generator().set_state(found)  # type: ignore[arg-type]
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{where}: cpu_rng{of} is no state of a random generator") from error
    on_gpu = state.get("cuda_rng")
    # Seed and offset; which GPU there is does not matter.
    if on_gpu is not None and not (
        isinstance(on_gpu, Tensor) and on_gpu.dtype == torch.uint8 and tuple(on_gpu.shape) == (16,)
    ):
        raise ValueError(f"{where}: cuda_rng{of} is no state of a random generator")


def check_public(public: Any, where: str) -> None:
    """Raise ValueError unless this is what a converted run keeps of its public checkpoint, or None."""
    if public is None:
        return
    if not isinstance(public, dict):
        raise ValueError(f"{where}: public is no dict")
    for name in ("epoch", "step"):
        if type(public.get(name)) is not int or not 0 <= public[name] < 2**31:
            raise ValueError(f"{where}: {name} of public is {shown(public.get(name))}; it must be a count")
    for name in ("scaler", "args"):
        if not isinstance(public.get(name), (dict, type(None))):
            raise ValueError(f"{where}: {name} of public is {shown(public[name])}; it must be a dict")
    groups = public.get("param_groups")
    if groups is not None and not (
        isinstance(groups, list) and len(groups) in (2, 3) and all(isinstance(group, dict) for group in groups)
    ):
        raise ValueError(f"{where}: param_groups of public are no two or three groups of an optimiser")
