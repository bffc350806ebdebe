"""Batches read ahead of the training step."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ear_model.data.batches import Batches


class Prefetcher:
    """Batches ``start_index``, ``start_index + 1``, ... on ``device``, read by background threads.

    The batches are those of ``batches[index]``, in order, whatever the number of threads: a batch is a function of
    its index alone. On a GPU they pass through pinned memory and are copied without waiting. An exception in a thread
    is raised by the ``next`` that would have returned its batch. Close it (or use ``with``) to stop the threads.

    Args:
        batches: what to read.
        start_index: first batch.
        device: where the batches go.
        threads: readers; one is enough for a latent cache, decoding images takes more.
        depth: batches ready or being read, at least ``threads``.
    """

    def __init__(
        self,
        batches: Batches,
        start_index: int = 0,
        device: torch.device | str = "cpu",
        *,
        threads: int = 1,
        depth: int = 4,
    ) -> None:
        if start_index < 0:
            raise ValueError(f"start_index is {start_index}; it must not be negative")
        if not 1 <= threads <= depth:
            raise ValueError(f"threads is {threads} and depth {depth}; needed is 1 <= threads <= depth")
        self.batches, self.device = batches, torch.device(device)
        self._next, self._depth = start_index, depth
        self._pool = ThreadPoolExecutor(threads, "prefetch", initializer=self._start_thread)
        self._pending: deque[Future[tuple[Tensor, Tensor]]] = deque()
        self._closed = False

    def _start_thread(self) -> None:
        if self.device.type == "cuda" and self.device.index is not None:
            # Pinning works in the thread's own context: without this every process would open one on GPU 0.
            torch.cuda.set_device(self.device)

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.batches[index]
        if self.device.type == "cuda":
            return images.pin_memory(), labels.pin_memory()
        return images, labels

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """The next batch: images ``[b, channels, height, width]`` and int64 labels ``[b]`` on the device."""
        if self._closed:
            raise StopIteration
        while len(self._pending) < self._depth:
            self._pending.append(self._pool.submit(self._read, self._next))
            self._next += 1
        try:
            images, labels = self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        return images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Stop the threads, after the batch that each is reading; what was read ahead is dropped."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
