"""The loader of latent caches: batches of 64 KL-16 latents, posterior drawn and scaled. Needs no GPU, 0.3 GB of disk.

OMP_NUM_THREADS=1 python -m benchmarks.bench_loader --out FILE.json
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from benchmarks import harness
from benchmarks.clocks import Call
from benchmarks.harness import EAGER, OURS, Row
from ear_model.data.batches import Batches
from ear_model.data.cache import LatentCache, draw_latents
from ear_model.data.cache_format import Manifest, Shard, file_sha256, save_manifest
from ear_model.data.prefetch import Prefetcher

IMAGES, SHARD, BATCH, BATCHES, SCALE = 8_192, 4_096, 64, 20, 0.2325
CASE = f"loader, {BATCHES} batches of {BATCH}"


def write_latents(root: Path, images: int, side: int = 16, classes: int = 1000) -> None:
    """A cache of random moments in the layout of `ear cache --tokenizer kl16`.

    Their variances are tiny and mirror images are alike, so it does not show what is drawn of them.
    """
    shards, generator = [], torch.Generator().manual_seed(0)
    for first in range(0, images, SHARD):
        count, file = min(SHARD, images - first), root / f"shard-{first // SHARD:05d}.safetensors"
        moments = torch.randn(count, 1, 32, side, side, generator=generator).half()
        moments[:, :, 16:] = -25
        moments = moments.repeat(1, 2, 1, 1, 1)
        labels = torch.arange(first, first + count) * classes // images
        safetensors.torch.save_file({"moments": moments, "labels": labels}, file)
        os.sync()
        shards.append(Shard(file.name, count, file.stat().st_size, file_sha256(file)))
    names = tuple(f"{label:03d}" for label in range(classes))
    description = ("moments", "kl16", "kl16.ckpt", "", SCALE, 16, 16 * side, (16, side, side), "fp16", True)
    save_manifest(root, Manifest(*description, names, tuple(shards)))


@functools.cache
def folder() -> tempfile.TemporaryDirectory:
    made = tempfile.TemporaryDirectory()
    write_latents(Path(made.name), IMAGES)
    return made


def shard_files() -> list[Path]:
    return sorted(Path(folder().name).glob("shard-*"))


def batches() -> Batches:
    return Batches(LatentCache(Path(folder().name), verify="size"), BATCH, seed=0)


def in_memory() -> Sequence[Call]:
    made = batches()
    return [lambda: [made[index] for index in range(BATCHES)]]


def from_disk() -> Sequence[Call]:
    """The page cache is emptied of the files each time."""

    def call() -> None:
        for file in shard_files():
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        in_memory()[0]()

    return [call]


def read_ahead(threads: int) -> Sequence[Call]:
    """As a training loop sees it that takes no time of its own."""
    reader = Prefetcher(batches(), threads=threads)
    return [lambda: [next(reader) for _ in range(BATCHES)]]


def draw() -> Sequence[Call]:
    moments, generator = torch.randn(BATCH, 32, 16, 16).half(), torch.Generator().manual_seed(0)
    return [lambda: draw_latents(moments, generator, SCALE)]


def read(rival: str) -> Sequence[Call]:
    """Random rows of one shard, in the page cache."""
    rows = torch.randint(SHARD, (BATCH,), generator=torch.Generator().manual_seed(0)).sort().values
    opened = safetensors.safe_open(shard_files()[0], framework="pt")
    whole, part = opened.get_tensor("moments").flatten(0, 1), opened.get_slice("moments")

    def by_index() -> torch.Tensor:
        return whole.index_select(0, rows * 2)

    def by_slice() -> torch.Tensor:
        return torch.cat([part[row : row + 1, :1] for row in rows.tolist()])

    assert torch.equal(by_index(), by_slice().flatten(0, 1))
    return [by_index if rival == OURS else by_slice]


def row(case: str, rival: str, prepare, images: int) -> Row:
    return Row(case, rival, prepare, work={"images": images}, on_host=True)


ROWS = [
    row(CASE, "in the training loop", in_memory, BATCH * BATCHES),
    *(row(CASE, f"{n} reading threads", functools.partial(read_ahead, n), BATCH * BATCHES) for n in (1, 2)),
    row(CASE, "page cache emptied before", from_disk, BATCH * BATCHES),
    row("posterior draw of a batch", OURS, draw, BATCH),
    row("reading of a batch", f"{EAGER}, slices of safetensors", functools.partial(read, EAGER), BATCH),
    row("reading of a batch", f"{OURS}, index_select on a map", functools.partial(read, OURS), BATCH),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_loader(row: Row, run_row) -> None:
    run_row(row)


if __name__ == "__main__":
    sys.exit(harness.main(ROWS, __doc__))
