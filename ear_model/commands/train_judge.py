"""``ear train-judge``: train the classifier that scores samples."""

import glob
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ear_model.commands.parsing import parse_command
from ear_model.evaluation.config import JudgeConfig

if TYPE_CHECKING:
    import torch

    from ear_model.data.image_tree import ImageTree


@dataclass(frozen=True)
class TrainJudge:
    """Train a small ResNet on an image tree, DIR/<class>/<image>, to score samples with."""

    tree: tyro.conf.Positional[Path]
    """Image tree to learn from."""
    out: Path
    """Judge to write, safetensors."""
    test: Path | None = None
    """Image tree to test the judge on; a tenth of every class of the first tree is held out if not given."""
    image_size: int = 0
    """Images are resized to this; the first image's shorter side if 0."""
    allow_empty: bool = False
    """Take folders without images as classes too."""
    max_per_class: int = 0
    """At most so many images of a class; all of them if 0."""
    config: Annotated[JudgeConfig, tyro.conf.arg(name="")] = field(default_factory=JudgeConfig)
    """The network and its training."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""


def run(arguments: list[str]) -> int:
    """The command; returns the exit status. Raises ValueError for trees that a judge can't be trained on."""
    command = parse_command(TrainJudge, arguments, "ear train-judge")
    from ear_model.data.image_tree import find_images
    from ear_model.data.images import first_image_size
    from ear_model.devices import resolve_device
    from ear_model.files import writing

    device = resolve_device(command.device)
    found = find_images(command.tree, allow_empty=command.allow_empty)
    size = command.image_size or first_image_size(found)
    if size < 8 or command.max_per_class < 0:
        raise ValueError(
            f"image_size is {size} and max_per_class {command.max_per_class}; they must be at least 8 and 0"
        )
    with writing(command.out):
        _train(command, found, size, device)
    return 0


def _train(command: TrainJudge, found: "ImageTree", size: int, device: "torch.device") -> None:
    """Train the judge, write and report it."""
    from ear_model.data.image_tree import find_images
    from ear_model.data.images import load_tree, split_classes
    from ear_model.evaluation.judge import train_judge
    from ear_model.files import remove_temporaries

    remove_temporaries(command.out.parent, glob.escape(command.out.name))
    config = command.config
    tree = load_tree(found, size, command.max_per_class, config.seed)
    if command.test is not None:
        test = find_images(command.test, allow_empty=command.allow_empty)
        train, held_out = tree, load_tree(test, size, command.max_per_class, config.seed)
    else:
        smallest = int(tree.labels.unique(return_counts=True)[1].min())
        if smallest < 2:
            raise ValueError(f"{command.tree} has a class of {smallest} images; give more, or --test TREE")
        held, kept = split_classes(tree.labels, max(1, smallest // 10), config.seed)
        train, held_out = tree.select(kept), tree.select(held)
    judge = train_judge(train, held_out, config, device=device, log=print)
    judge.save(command.out)
    parameters = sum(parameter.numel() for parameter in judge.model.parameters())
    print(
        f"{parameters:,} parameters, {len(train.labels):,} training images of "
        f"{len(train.class_names)} classes; accuracy on {judge.num_held_out:,} held-out images "
        f"{judge.accuracy:.4f}: {command.out}"
    )
