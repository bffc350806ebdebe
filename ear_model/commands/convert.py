"""``ear convert``: public EAR and MAR checkpoints to run directories, and back."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ear_model.commands.parsing import parse_command


@dataclass(frozen=True)
class Convert:
    """Turn a checkpoint of the public EAR or MAR code into a run directory, or a run directory into one of them."""

    source: Annotated[Path, tyro.conf.Positional]
    """checkpoint-last.pth of the public code, or a run directory."""
    out: Path
    """Run directory to make (from a .pth), or the .pth to write (from a run directory); must not exist."""
    num_heads: int | None = None
    """Attention heads, which no tensor shows; needed for sizes other than B, L and H."""
    data: Literal["digits", "cache", "npz"] | None = None
    """Data set of the new run. What the checkpoint says if not given, else npz."""
    data_path: str | None = None
    """Directory of that data set."""
    epoch: int | None = None
    """Last finished epoch to write into the .pth. Counted from steps and data set if not given."""


def run(arguments: list[str]) -> int:
    """The command; returns the exit status."""
    command = parse_command(Convert, arguments, "ear convert")
    from ear_model.training import public_checkpoint

    if command.source.is_dir():
        for name in ("num_heads", "data", "data_path"):
            if getattr(command, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} is for a .pth; {command.source} is a run directory")
        print(public_checkpoint.export_run(command.source, command.out, epoch=command.epoch))
        return 0
    if command.epoch is not None:
        raise ValueError("--epoch is for writing a .pth; this reads one")
    report = public_checkpoint.import_run(
        command.source, command.out, num_heads=command.num_heads, data=command.data, data_path=command.data_path
    )
    print(report)
    return 0
