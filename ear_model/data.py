"""What a run trains on, and batches whose order depends on seed and position alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ear_model.config import RunConfig

DIGITS_SPLIT_SEED = 0
PIXEL_SCALE = 8.0  # scikit-learn's digits have pixels 0..16; the model sees -1..1


class TrainingData(Protocol):
    """What a run is trained on: images or latents with their classes, read by index."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the model reads."""
        ...

    @property
    def num_classes(self) -> int:
        """Labels are 0 .. num_classes - 1."""
        ...

    def __len__(self) -> int: ...

    def gather(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images ``[b, channels, height, width]`` (floating point) and int64 labels ``[b]``, both on the CPU.

        Args:
            indices: int64 ``[b]``, any order.
            generator: where flips and draws from a posterior come from; a CPU generator.
        """
        ...


@dataclass(frozen=True)
class Dataset:
    """Images ``[N, channels, size, size]`` in -1..1 and int64 labels ``[N]``, in memory."""

    images: Tensor
    labels: Tensor

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.images.shape[1], self.images.shape[2], self.images.shape[3])

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1 if len(self.labels) else 0

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See :class:`TrainingData`; nothing here is random."""
        return self.images[indices], self.labels[indices]


def load_training_data(config: RunConfig) -> TrainingData:
    """The data set that a run names. Raises ValueError if it is not there, damaged or does not fit."""
    if config.data == "digits":
        return load_digits()[0]
    if config.data in ("cache", "npz") and not config.data_path:
        raise ValueError(f"data {config.data!r} needs data_path, the directory of the cache")
    if config.data == "cache":
        from ear_model.cache import load_cache

        return load_cache(Path(config.data_path), tokenizer=Path(config.tokenizer) if config.tokenizer else None)
    if config.data == "npz":
        from ear_model.npz import load_npz_cache

        return load_npz_cache(Path(config.data_path), tokenizer=Path(config.tokenizer) if config.tokenizer else None)
    raise ValueError(f"data {config.data!r} is unknown; use digits, cache or npz")


def load_digits() -> tuple[Dataset, Dataset]:
    """scikit-learn's 1,797 handwritten 8x8 digits: a fixed random 75 % to train on, and the held-out 25 %."""
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ValueError("the digits need scikit-learn; install ear-kernels[train]") from error
    digits = load()
    order = np.random.RandomState(DIGITS_SPLIT_SEED).permutation(len(digits.target))
    images = torch.from_numpy(digits.images[order]).float().unsqueeze(1) / PIXEL_SCALE - 1
    labels = torch.from_numpy(digits.target[order]).long()
    split = len(labels) * 3 // 4
    return Dataset(images[:split], labels[:split]), Dataset(images[split:], labels[split:])


def to_pixels(images: Tensor) -> Tensor:
    """Model images to pixels 0..16, ``[N, size * size]``, float64 on the CPU."""
    return ((images.double().cpu() + 1) * PIXEL_SCALE).clamp(0, 2 * PIXEL_SCALE).flatten(1)


class Batches:
    """An endless stream of batches; batch ``i`` is a function of the seed and ``i`` alone.

    Every epoch is a fresh permutation; a batch may reach into the next epoch, so none is dropped.

    Args:
        dataset: what to read.
        batch_size: images of a batch over all processes.
        seed: of the order and of what the data set draws.
        rank: which part of every batch is this process's; the parts of all ranks are the batch of one process.
        world_size: number of processes; must divide ``batch_size``.
    """

    def __init__(self, dataset: TrainingData, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch of {batch_size} images is not divisible by {world_size} processes")
        if len(dataset) == 0:
            raise ValueError("the data set is empty")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self._epoch: tuple[int, Tensor] | None = None

    def _generator(self, *position: int) -> torch.Generator:
        # torch's CPU generator reads only the low 32 bits of a seed, so seed and position are mixed first.
        mixed = int(np.random.SeedSequence((self.seed, *position)).generate_state(1)[0])
        return torch.Generator().manual_seed(mixed)

    def _permutation(self, epoch: int) -> Tensor:
        # A local name, since several threads of a prefetcher may ask for different epochs.
        known = self._epoch
        if known is None or known[0] != epoch:
            known = (epoch, torch.randperm(len(self.dataset), generator=self._generator(epoch)))
            self._epoch = known
        return known[1]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Images and labels of this process's part of batch ``index``."""
        first, last = index * self.batch_size, (index + 1) * self.batch_size
        parts = []
        while first < last:
            epoch, offset = divmod(first, len(self.dataset))
            count = min(last - first, len(self.dataset) - offset)
            parts.append(self._permutation(epoch)[offset : offset + count])
            first += count
        share = self.batch_size // self.world_size
        chosen = torch.cat(parts)[self.rank * share : (self.rank + 1) * share]
        return self.dataset.gather(chosen, self._generator(index, self.rank, 1))
