"""Data sets held in memory, and batches whose order depends on seed and position alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DIGITS_SPLIT_SEED = 0
PIXEL_SCALE = 8.0  # scikit-learn's digits have pixels 0..16; the model sees -1..1


@dataclass(frozen=True)
class Dataset:
    """Images ``[N, channels, size, size]`` in -1..1 and int64 labels ``[N]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


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
    """

    def __init__(self, dataset: Dataset, batch_size: int, seed: int) -> None:
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self._epoch: tuple[int, Tensor] | None = None

    def _permutation(self, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            # torch's CPU generator reads only the low 32 bits of a seed, so seed and epoch are mixed first.
            mixed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
            generator = torch.Generator().manual_seed(mixed)
            self._epoch = (epoch, torch.randperm(len(self.dataset), generator=generator))
        return self._epoch[1]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Images and labels of batch ``index``."""
        first, last = index * self.batch_size, (index + 1) * self.batch_size
        parts = []
        while first < last:
            epoch, offset = divmod(first, len(self.dataset))
            count = min(last - first, len(self.dataset) - offset)
            parts.append(self._permutation(epoch)[offset : offset + count])
            first += count
        chosen = torch.cat(parts)
        return self.dataset.images[chosen], self.dataset.labels[chosen]
