"""``ear glyphs``: draw an image tree of characters."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ear_model.commands.parsing import parse_command
from ear_model.config_checks import check_range


@dataclass(frozen=True)
class Glyphs:
    """Draw characters in matplotlib's fonts, random colours and poses: OUT/<class>/<index>.png."""

    out: Path
    """Directory of the image tree; the same call completes an interrupted one."""
    num_per_class: int
    """Images of every class."""
    classes: int = 48
    """How many of the 48 characters: digits, lower case, upper case, in this order."""
    size: int = 64
    """Height and width in pixels."""
    seed: int = 0
    """The same seed gives the same images."""
    split: Literal["train", "test"] = "train"
    """train or test: draws that never coincide."""
    workers: int = 0
    """Processes to draw with; 0 is one a core."""

    def __post_init__(self) -> None:
        check_range(self, "from 0 to 1024", "workers")


def run(arguments: list[str]) -> int:
    """The command; returns the exit status. Raises ValueError for options out of range."""
    command = parse_command(Glyphs, arguments, "ear glyphs")
    from ear_model.data.glyphs import write_tree

    shape: Any = {"num_classes": command.classes, "size": command.size}
    draws: Any = {"seed": command.seed, "split": command.split, "workers": command.workers or os.cpu_count() or 1}
    drawn = write_tree(command.out, command.num_per_class, **shape, **draws)
    total = command.classes * command.num_per_class
    print(f"{total:,} images of {command.classes} classes, {drawn:,} drawn now: {command.out}")
    return 0
