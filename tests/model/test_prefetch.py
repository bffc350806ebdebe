"""Batches read ahead: the same ones, in order, and no thread left behind."""

import threading
import time

import pytest
import torch

from ear_model.data.batches import Batches
from ear_model.data.digits import load_digits
from ear_model.data.prefetch import Prefetcher


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("threads", [1, 3])
def test_same_batches_in_order(threads):
    batches = Batches(load_digits()[0], 500, seed=2)  # epochs end within batches
    with Prefetcher(Batches(load_digits()[0], 500, seed=2), 3, threads=threads) as prefetcher:
        for index in range(3, 15):
            images, labels = next(prefetcher)
            assert torch.equal(images, batches[index][0])
            assert torch.equal(labels, batches[index][1])
        assert _threads()
    assert not _threads()
    with pytest.raises(StopIteration):
        next(prefetcher)


class _Breaks:
    """Good batches up to one that can't be read."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def __getitem__(self, index):
        self.reads.append(index)
        if index == 2:
            raise ValueError("shard 7 is gone")
        return torch.full((1, 1, 1, 1), float(index)), torch.tensor([index])


def test_an_exception_comes_at_its_batch_and_ends_the_threads():
    prefetcher = Prefetcher(_Breaks(), depth=3)
    assert [next(prefetcher)[1].item() for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match="shard 7 is gone"):
        next(prefetcher)
    assert not _threads()


def test_reads_ahead_but_no_further_than_its_depth():
    batches = _Breaks()
    with Prefetcher(batches, 10, depth=4) as prefetcher:
        next(prefetcher)
        deadline = time.monotonic() + 20
        while len(batches.reads) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert batches.reads == [10, 11, 12, 13]


def test_bad_options():
    with pytest.raises(ValueError, match="start_index is -1"):
        Prefetcher(_Breaks(), -1)
    with pytest.raises(ValueError, match="threads is 5 and depth 4"):
        Prefetcher(_Breaks(), threads=5)
