"""Sampling images of chosen classes from a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ear_model.ear import EAR


def resolve_device(name: str) -> torch.device:
    """ "auto" (a GPU if there is one), or a device by name. Raises ValueError for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown; use auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for, but torch finds no CUDA GPU here; use auto or cpu")
    return device


def class_labels(classes: Sequence[int], num: int, num_classes: int) -> Tensor:
    """``num`` labels spread evenly over ``classes``, in their order.

    Raises:
        ValueError: no or unknown classes, or fewer than one image.
    """
    if num < 1:
        raise ValueError(f"num is {num}; it must be at least 1")
    if not classes:
        raise ValueError("no classes were given; name at least one")
    for label in classes:
        if not 0 <= label < num_classes:
            raise ValueError(f"class {label} is out of range; this model knows 0..{num_classes - 1}")
    return torch.tensor([classes[index * len(classes) // num] for index in range(num)])


def sample_images(model: EAR, labels: Tensor, *, seed: int = 0, batch_size: int = 256, **options: Any) -> Tensor:
    """Images ``[N, channels, size, size]`` on the CPU, in batches; ``options`` go to :meth:`EAR.sample`."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    parts = [model.sample(part.to(device), generator=generator, **options).cpu() for part in labels.split(batch_size)]
    return torch.cat(parts)
