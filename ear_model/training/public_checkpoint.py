"""Runs made of checkpoints of the public EAR and MAR code, and the reverse.

An optimiser's state knows its parameters by number only. The public code numbers them by group, each in the order of
the model's state dict. EAR's: (1) 1-D parameters and all biases, (2) the other backbone parameters, (3) the
generator's matrices, which have an ``lr_scale``; that is our grouping "public". MAR's: (1) 1-D parameters, biases and
all of the diffusion head, (2) the others.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ear_model.config import ModelConfig, RunConfig, from_dict, to_dict
from ear_model.data.sources import load_training_data
from ear_model.draws import seeded_generator
from ear_model.ear import EAR
from ear_model.errors import shown
from ear_model.files import require_writable, write_atomically
from ear_model.json_files import parse_json
from ear_model.model.weights import check_blocks, check_fit, on_meta, public_key
from ear_model.presets import RUNS
from ear_model.run_dir import CONFIG_FILE, load_config, save_config
from ear_model.tensor_files import check_numbers
from ear_model.training import checkpoint, optim
from ear_model.training.optimizer_state import Grouping, moments_by_name, number_moments
from ear_model.training.public_format import (
    check_public_layout,
    infer_model,
    infer_sampling,
    infer_training,
    public_arguments,
    read_public,
)

OWN_CONFIG = "ear_model_config"  # an attribute of ``args`` in files that we write
_SCALER = torch.amp.GradScaler("cpu").state_dict()
_GROUPING: dict[str, Grouping] = {"energy": "public", "diffusion": "mar"}
# The public group whose learning rate each of ours has.
_THEIR_GROUP = {"energy": (0, 1, 2), "diffusion": (0, 1, 0)}
_GROUP_DEFAULTS = torch.optim.AdamW([torch.zeros(1)], betas=(0.9, 0.95)).state_dict()["param_groups"][0]


def _public(tensors: dict[str, Tensor], score: str) -> dict[str, Tensor]:
    return {public_key(name, score): tensor for name, tensor in tensors.items()}


def _meta_model(config: ModelConfig, where: Path | str = "the model") -> EAR:
    """The model without memory: names, shapes and their order."""
    return on_meta(lambda: EAR(config), where)


def import_run(
    source: Path,
    out: Path,
    *,
    num_heads: int | None = None,
    data: Literal["digits", "cache", "npz"] | None = None,
    data_path: str | None = None,
) -> str:
    """Make a run directory of a public checkpoint, which ``ear train --resume`` goes on with. Returns a report.

    Args:
        source: a ``checkpoint-last.pth``.
        out: run directory to make.
        num_heads: attention heads, for sizes other than B, L and H of EAR and MAR.
        data: data set of the run, if not what the file says.
        data_path: its directory.

    Raises:
        ValueError: ``out`` is in use; a file that is of neither EAR nor MAR, or wants to run code; unknown heads.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already; give a new --out")
    public = read_public(source)
    own = public.args.get(OWN_CONFIG)
    if own is not None:
        where = f"{source}: {OWN_CONFIG} in args"
        if not isinstance(own, str):
            raise ValueError(f"{where} is {type(own).__name__}; it must be text")
        config = from_dict(RunConfig, parse_json(own, where), where)
        check_public_layout(config.model, where)
        if config.model.score != public.score:
            raise ValueError(f"{where} is of the score {config.model.score}; the tensors are of {public.score}")
        check_blocks(config.model, public.weights, source)
        if num_heads not in (None, config.model.num_heads):
            raise ValueError(f"--num-heads is {num_heads}; {source} was written with {config.model.num_heads}")
    else:
        check_numbers(source, public.weights)
        model_config = infer_model(public.weights, public.args, num_heads, str(source))
        cached = public.args.get("cached_path")
        if not isinstance(cached, (str, type(None))):
            raise ValueError(f"{source}: cached_path in args is {shown(cached)}; it must be text")
        sampling = infer_sampling(model_config, public.args, str(source))
        config = RunConfig(data="npz", data_path=cached or "", model=model_config, sampling=sampling)
    model = _meta_model(config.model, source)
    weights = check_fit(model, public.weights, source)
    averages = weights if public.averages is None else check_fit(model, public.averages, source)
    moments = {}
    if public.optimizer is not None:
        if list(weights) != [name for name, _ in model.named_parameters()]:
            raise ValueError(
                f"{source}: its tensors are in another order than the public code's, so the numbers of its optimiser "
                "can't be understood"
            )
        moments = moments_by_name(public.optimizer, model, _GROUPING[public.score], str(source))
    step = max((int(state["step"]) for state in moments.values()), default=0)
    if own is None:
        train = infer_training(public.args, step, public.epoch, str(source), public.score)
        if public.optimizer is not None and "betas" in public.optimizer["param_groups"][0]:
            beta1, beta2 = public.optimizer["param_groups"][0]["betas"]
            train = replace(train, beta1=float(beta1), beta2=float(beta2))
        config = replace(config, train=train)
    config = replace(config, data=data or config.data, data_path=config.data_path if data_path is None else data_path)
    states, _ = number_moments(moments, model, config.train.parameter_groups)
    groups = optim.make_optimizer(model, config.train).state_dict()["param_groups"]
    if public.optimizer is not None:
        for group, number in zip(groups, _THEIR_GROUP[public.score], strict=True):
            group["lr"] = public.optimizer["param_groups"][number].get("lr", group["lr"])
    generator = seeded_generator(config.train.seed, step)
    state = {
        "optimizer": {"state": states, "param_groups": groups},
        "step": step,
        "cpu_rng": generator.get_state(),
        "cuda_rng": None,
        "process_rng": [],
        "public": {
            "epoch": public.epoch,
            "step": step,
            "scaler": public.scaler,
            "args": public.args,
            "param_groups": None if public.optimizer is None else public.optimizer["param_groups"],
        },
    }
    checkpoint.check_public(state["public"], str(source))
    require_writable(out / CONFIG_FILE, needed_bytes=4 * _bytes(weights))
    checkpoint.save_checkpoint(out, step, model, averages, state, weights=weights)
    save_config(out, config)  # last: a directory with it and without a checkpoint is a run that begins anew
    missing = [name for name in ("averages", "optimizer") if getattr(public, name) is None]
    note = f"; the file has no {' and no '.join(missing)}, which start anew" if missing else ""
    return (
        f"{source}: {len(weights)} tensors, {sum(t.numel() for t in weights.values()):,} parameters, "
        f"epoch {public.epoch}, step {step}{note}\n"
        f"run directory: {out}   go on: ear train {next(iter(RUNS))} --out {out} --resume"
    )


def export_run(run_dir: Path, out: Path, *, epoch: int | None = None) -> str:
    """Write a run's last checkpoint as a ``checkpoint-last.pth`` of the public code. Returns a report.

    Args:
        run_dir: run directory.
        out: file to write.
        epoch: last finished epoch; counted if None.

    Raises:
        ValueError: ``out`` exists; a run of another score or order than EAR's or MAR's; no whole checkpoint; an
            epoch that can't be counted as the data set is not here.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; give a new --out")
    check_public_layout(load_config(run_dir).model, str(run_dir))
    saved = checkpoint.load_checkpoint(run_dir)
    run = load_config(run_dir)
    where, score = str(saved.path), saved.config.score
    check_public_layout(saved.config, where)
    model = _meta_model(saved.config, saved.path)
    state = saved.trainer_state
    public = state.get("public") or {}
    moments = moments_by_name(state["optimizer"], model, run.train.parameter_groups, where)
    states, numbers = number_moments(moments, model, _GROUPING[score])
    if epoch is None:
        epoch = _finished_epochs(run, state["step"], public)
    our_groups = state["optimizer"]["param_groups"]
    groups = []
    for index, group in enumerate(numbers):
        values = {**_GROUP_DEFAULTS, "betas": our_groups[index]["betas"], "eps": our_groups[index]["eps"]}
        values["weight_decay"] = our_groups[index]["weight_decay"]
        if index == 2:
            values["lr_scale"] = our_groups[index]["lr_scale"]
        if public.get("param_groups"):
            values = dict(public["param_groups"][index])
        groups.append({**values, "lr": our_groups[index]["lr"], "params": group})
    args = public.get("args") or {**public_arguments(run), OWN_CONFIG: json.dumps(to_dict(run))}
    order = [name for name, _ in model.named_parameters()]
    content = {
        "model": _public({name: saved.weights[name] for name in order}, score),
        "model_ema": _public({name: saved.averages[name] for name in order}, score),
        "optimizer": {"state": states, "param_groups": groups},
        "epoch": epoch,
        "scaler": public.get("scaler") or dict(_SCALER),
        "args": argparse.Namespace(**args),
    }
    require_writable(out, needed_bytes=4 * _bytes(saved.weights))
    write_atomically(out, lambda path: torch.save(content, path))
    note = ""
    if score == "diffusion" and run.train.generator_lr_scale != 1:
        note = "; the public code will train the diffusion head at the full rate"
    elif score == "energy" and run.train.parameter_groups == "paper":
        note = "; the public code will train the generator's biases and norms at the full rate (docs/distributed.md)"
    return f"{out}: {len(order)} tensors, epoch {epoch}, step {state['step']}{note}"


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _finished_epochs(run: RunConfig, step: int, public: dict[str, Any]) -> int:
    """The last finished epoch, counted from 0 as the public code does."""
    if public:
        if step == public["step"] or not public["step"]:
            return public["epoch"]
        return max(0, step * (public["epoch"] + 1) // public["step"] - 1)
    try:
        images = len(load_training_data(run))
    except ValueError as error:
        raise ValueError(f"can't count epochs: {error}; give --epoch") from error
    return max(0, step * run.train.batch_size // images - 1)
