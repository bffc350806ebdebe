"""A classifier trained on real images, by which samples are judged.

Shapes: N images, K classes, F features, S image size.
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor
from torch.nn import functional

from ear_model.data.images import LabelledImages, to_float
from ear_model.errors import shown
from ear_model.evaluation.config import JudgeConfig
from ear_model.json_files import parse_json
from ear_model.model.weights import on_meta
from ear_model.tensor_files import check_shapes, read_tensors, usable_weights, write_tensors

FORMAT = "ear_judge 1"


@dataclass
class Judge:
    """A trained classifier of 8-bit images."""

    model: ResNet
    """The network, from images scaled to -1..1 to logits."""
    class_names: tuple[str, ...]
    """A name for every logit."""
    image_size: int
    """S, of the images it was trained on."""
    config: JudgeConfig
    """How it was trained."""
    accuracy: float
    """On real images that it was not trained on."""
    num_held_out: int
    """How many those were."""

    def __post_init__(self) -> None:
        self.model.eval()

    @torch.no_grad()
    def classify(self, images: Tensor, batch_size: int = 512) -> tuple[Tensor, Tensor]:
        """Features ``[N, F]`` in float32 (pooled, before the last layer) and predicted labels ``[N]``, on the CPU.

        Raises:
            ValueError: images that are not uint8 ``[N, 3, S, S]``.
        """
        size = self.image_size
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(
                f"images are {images.dtype} {tuple(images.shape)}; this judge reads uint8 [N, 3, {size}, {size}]"
            )
        device = next(self.model.parameters()).device
        features, predictions = [], []
        for part in images.split(batch_size):
            pooled = self.model.forward_head(self.model.forward_features(to_float(part.to(device))), pre_logits=True)
            features.append(pooled.float().cpu())
            predictions.append(self.model.fc(pooled).argmax(dim=1).cpu())
        return torch.cat(features), torch.cat(predictions)

    def save(self, path: Path) -> None:
        """Write weights as safetensors, everything else in the metadata."""
        metadata = {
            "format": FORMAT,
            "class_names": json.dumps(self.class_names),
            "image_size": str(self.image_size),
            "config": json.dumps(asdict(self.config)),
            "accuracy": repr(self.accuracy),
            "num_held_out": str(self.num_held_out),
        }
        write_tensors(path, self.model.state_dict(), metadata)

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "Judge":
        """Read what :meth:`save` wrote. Raises ValueError if it is not there, damaged or something else."""
        if not path.is_file():
            raise ValueError(f"{path} is not there; `ear train-judge` writes it")
        metadata, tensors = read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is no judge (format {metadata.get('format')!r}; this program reads {FORMAT!r})")
        try:
            values = parse_json(metadata["config"], "config")
            names = parse_json(metadata["class_names"], "class_names")
            if not isinstance(values, dict) or not isinstance(values.get("channels"), list):
                raise ValueError(f"its config is {shown(values)}")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise ValueError(f"class_names are {shown(names)}; they must be a list of texts")
            if len(names) < 2 or len(set(names)) < len(names):
                raise ValueError("class_names are fewer than two, or not different")
            config = JudgeConfig(**{**values, "channels": tuple(values["channels"])})
            size, held_out = (_count(metadata, key) for key in ("image_size", "num_held_out"))
            accuracy = float(metadata["accuracy"])
            if not 0 <= accuracy <= 1:
                raise ValueError(f"accuracy is {accuracy}; it must be in 0..1")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged judge ({error})") from error
        expected = on_meta(lambda: _network(config, len(names)), path).state_dict()
        counters = {name for name, tensor in expected.items() if not tensor.is_floating_point()}
        wrong = [name for name in counters if name in tensors and tensors[name].dtype != expected[name].dtype]
        if wrong:
            raise ValueError(f"{path} is a damaged judge ({wrong[0]} is {tensors[wrong[0]].dtype})")
        check_shapes(path, {name: tensor.shape for name, tensor in expected.items()}, tensors)
        weights = usable_weights(
            path,
            {name: tensor for name, tensor in expected.items() if name not in counters},
            {name: tensor for name, tensor in tensors.items() if name not in counters},
        )
        model = _network(config, len(names))
        model.load_state_dict({**tensors, **weights})
        return cls(model.to(device), tuple(names), size, config, accuracy, held_out)


def _count(metadata: dict[str, str], key: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,8}", metadata[key], re.ASCII):
        raise ValueError(f"{key} is {shown(metadata[key])}; it must be an integer of at least 1")
    return int(metadata[key])


def _network(config: JudgeConfig, num_classes: int) -> ResNet:
    """timm's ResNet with one block a stage and a stem of three small convolutions."""
    block: Any = BasicBlock
    stem: Any = {"stem_type": "deep", "stem_width": max(1, config.channels[0] // 2)}
    return ResNet(block, (1, 1, 1, 1), num_classes=num_classes, channels=config.channels, **stem)


def train_judge(
    train: LabelledImages,
    held_out: LabelledImages,
    config: JudgeConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    log: Callable[[str], object] | None = None,
) -> "Judge":
    """Train a classifier on real images; its accuracy is that on ``held_out``. On a CPU, a seed gives one judge.

    Args:
        train: what it learns.
        held_out: real images that it is tested on, of the same classes and size.
        config: network and training; the defaults of :class:`JudgeConfig` if None.
        device: where to train.
        log: gets a line an epoch.

    Raises:
        ValueError: fewer than two classes, or trees of other classes or sizes.
    """
    config = config or JudgeConfig()
    if len(train.class_names) < 2:
        raise ValueError(f"a judge needs at least two classes; this tree has {train.class_names}")
    if held_out.class_names != train.class_names or held_out.images.shape[1:] != train.images.shape[1:]:
        raise ValueError(
            f"the held-out tree has {len(held_out.class_names)} classes of images {tuple(held_out.images.shape[1:])},"
            f" the training tree {len(train.class_names)} of {tuple(train.images.shape[1:])}; they must be the same"
        )
    if len(held_out.labels) == 0:
        raise ValueError("there are no held-out images to test the judge on")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = _network(config, len(train.class_names)).to(device)
    draws = torch.Generator().manual_seed(config.seed)
    batch_size = min(config.batch_size, len(train.labels))
    steps = -(-len(train.labels) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.epochs * steps)
    images, labels = train.images.to(device), train.labels.to(device)
    for epoch in range(config.epochs):
        model.train()
        order = torch.randperm(len(labels), generator=draws).to(device)
        total = torch.zeros((), device=device)
        for part in order.split(batch_size):
            batch = _shift(to_float(images[part]), config.shift, draws)
            loss = functional.cross_entropy(model(batch), labels[part])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(part)
        if log is not None:
            log(f"judge: epoch {epoch + 1}/{config.epochs}, loss {total.item() / len(labels):.4f}")
    judge = Judge(model, train.class_names, train.images.shape[-1], config, 0.0, len(held_out.labels))
    judge.accuracy = float((judge.classify(held_out.images)[1] == held_out.labels).double().mean())
    return judge


def _shift(images: Tensor, limit: int, draws: torch.Generator) -> Tensor:
    """Every image moved by its own random whole pixels, edge pixels repeated into what is laid open."""
    limit = min(limit, images.shape[-1] // 8)
    if limit == 0:
        return images
    count, _, height, width = images.shape
    padded = functional.pad(images, (limit,) * 4, mode="replicate")
    offsets = torch.randint(0, 2 * limit + 1, (2, count, 1), generator=draws).to(images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    batch = torch.arange(count, device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
