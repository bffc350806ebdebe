"""What is where in a run directory; training/checkpoint.py writes the checkpoints themselves.

RUN/config.json                        the configuration
RUN/metrics.jsonl                      a line of loss, rate and speed now and then
RUN/checkpoints/step_00000250/         the last whole checkpoint
    model.safetensors                  weights, in the key layout of the public EAR code
    ema.safetensors                    their moving average, same layout
    trainer.pt                         optimiser, random generators, position in the data
"""

import json
import re
from pathlib import Path
from typing import Any

from ear_model.config import RunConfig, from_dict, to_dict
from ear_model.files import read_json, write_json

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
WEIGHTS_FILE, AVERAGES_FILE = "model.safetensors", "ema.safetensors"
_STEP_NAME = re.compile(r"step_(\d{8,})")


def save_config(run_dir: Path, config: RunConfig) -> None:
    """Write RUN/config.json."""
    write_json(run_dir / CONFIG_FILE, to_dict(config))


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


def latest_checkpoint(run_dir: Path) -> Path:
    """The last whole checkpoint. Raises ValueError if there is none."""
    load_config(run_dir)
    steps = checkpoint_steps(run_dir)
    if not steps:
        raise ValueError(f"{run_dir} has no checkpoint yet; train it first")
    return checkpoint_dir(run_dir, steps[-1])


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl; a last line that was cut off is left out."""
    lines = []
    for text in (run_dir / METRICS_FILE).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
