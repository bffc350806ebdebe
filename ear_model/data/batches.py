"""What a run trains on, and batches whose order depends on seed and position alone."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ear_model.draws import seeded_generator


class TrainingData(Protocol):
    """What a run is trained on: images or latents with their classes, read by index."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the model reads."""

    @property
    def num_classes(self) -> int:
        """Labels are 0 .. num_classes - 1."""

    def __len__(self) -> int: ...

    def gather(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images ``[b, channels, height, width]`` (floating point) and int64 labels ``[b]``, both on the CPU.

        Args:
            indices: int64 ``[b]``, any order.
            generator: where flips and draws from a posterior come from; a CPU generator.
        """


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

    def _permutation(self, epoch: int) -> Tensor:
        # A local name, since several threads of a prefetcher may ask for different epochs.
        known = self._epoch
        if known is None or known[0] != epoch:
            known = (epoch, torch.randperm(len(self.dataset), generator=seeded_generator(self.seed, epoch)))
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
        return self.dataset.gather(chosen, seeded_generator(self.seed, index, self.rank, 1))
