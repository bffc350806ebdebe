"""What is where in a run directory; training/checkpoint.py writes the checkpoints themselves.

RUN/config.json                        the configuration
RUN/metrics.jsonl                      a line of loss, rate and speed now and then
RUN/checkpoints/step_00000250/         the last whole checkpoint
    model.safetensors                  weights, in the key layout of the public EAR code
    ema.safetensors                    their moving average, same layout
    trainer.pt                         optimiser, random generators, position in the data
"""

import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ear_model.config import RunConfig, from_dict, to_dict
from ear_model.files import write_json
from ear_model.json_files import parse_json, read_json

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
WEIGHTS_FILE, AVERAGES_FILE = "model.safetensors", "ema.safetensors"
_LOGGED = ("step", "loss")  # what every line of metrics has
# What may change when a run goes on. How a model is spread over processes does not show in a checkpoint.
EXTENDING = ("data_path", "tokenizer", "train.steps", "train.checkpoint_every", "train.log_every", "train.parallel")
_STEP_NAME = re.compile(r"step_(\d{8,})")


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The configuration with its paths absolute, so that they hold in any working directory."""
    paths = {name: getattr(config, name) for name in ("data_path", "tokenizer", "codebook")}
    return replace(config, **{name: os.path.abspath(path) for name, path in paths.items() if path})


def save_config(run_dir: Path, config: RunConfig) -> None:
    """Write RUN/config.json, paths absolute."""
    write_json(run_dir / CONFIG_FILE, to_dict(with_absolute_paths(config)))


def check_resumable(run_dir: Path, config: RunConfig) -> None:
    """Raise ValueError, naming the options, if a run can't go on as ``config``: it differs in more than EXTENDING."""
    stored, wanted = _flat(load_config(run_dir)), _flat(config)
    changed = [name for name in wanted if name not in EXTENDING and stored[name] != wanted[name]]
    if changed:
        options = ", ".join(
            f"--{name.replace('_', '-')} is {wanted[name]!r}, the run was begun with {stored[name]!r}"
            for name in changed
        )
        raise ValueError(
            f"{run_dir} can't go on so: {options}; --resume takes {', '.join(EXTENDING).replace('_', '-')}"
        )


def _flat(config: RunConfig) -> dict[str, Any]:
    """Every field by its name on the command line, such as "train.lr"."""
    flat: dict[str, Any] = {}
    for name, value in asdict(with_absolute_paths(config)).items():
        flat |= (
            {f"{name}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {name: value}
        )
    return flat


def load_config(run_dir: Path) -> RunConfig:
    """Read RUN/config.json. Raises ValueError unless ``run_dir`` is a run directory of this version."""
    path = run_dir / CONFIG_FILE
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a directory; give the --out directory of an `ear train`")
    if not path.is_file():
        raise ValueError(f"{run_dir} is not a run directory (it has no {CONFIG_FILE})")
    return from_dict(RunConfig, read_json(path), str(path))


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of the whole checkpoints, ascending."""
    directory = run_dir / CHECKPOINTS
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(match[1]) for match in map(_STEP_NAME.fullmatch, names) if match)


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of that step is."""
    return run_dir / CHECKPOINTS / f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Steps of the checkpoint in that directory."""
    match = _STEP_NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def latest_checkpoint(run_dir: Path) -> Path:
    """The last whole checkpoint. Raises ValueError if there is none."""
    load_config(run_dir)
    steps = checkpoint_steps(run_dir)
    if not steps:
        raise ValueError(f"{run_dir} has no checkpoint yet; train it first")
    return checkpoint_dir(run_dir, steps[-1])


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl, each with a "step" and a "loss"; a last line that was cut off is left out.

    Raises:
        ValueError: not there, or a line that is something else.
    """
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, 1):
        try:
            line = parse_json(text, f"{path}, line {number},")
            if not isinstance(line, dict) or not all(type(line.get(name)) in (int, float) for name in _LOGGED):
                raise ValueError(f"{path}, line {number}, is damaged (no step and loss)")
        except ValueError:
            if number == len(texts):
                break
            raise
        lines.append(line)
    return lines
