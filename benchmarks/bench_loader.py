"""The loader of latent caches: images/s of 64-image batches of KL-16 latents, posterior drawn and scaled.

    OMP_NUM_THREADS=1 pytest benchmarks/bench_loader.py --benchmark-only

Needs no GPU and 0.7 GB of disk. ``extra_info`` holds images/s. An H200 trains EAR-B at 800 images/s; the aim is five
times that, 4,000, from one process.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from ear_model.cache import LatentCache, draw_latents
from ear_model.cache_format import Manifest, Shard, save_manifest
from ear_model.data import Batches
from ear_model.prefetch import Prefetcher

IMAGES, SHARD, BATCH, BATCHES = 20_000, 4_096, 64, 50


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A cache of random moments in the shape and dtype of `ear cache --tokenizer kl16`."""
    root = tmp_path_factory.mktemp("cache")
    generator = torch.Generator().manual_seed(0)
    shards = []
    for first in range(0, IMAGES, SHARD):
        count = min(SHARD, IMAGES - first)
        file = root / f"shard-{first // SHARD:05d}.safetensors"
        moments = torch.randn(count, 2, 32, 16, 16, generator=generator).half()
        labels = torch.arange(first, first + count) * 1000 // IMAGES
        safetensors.torch.save_file({"moments": moments, "labels": labels}, file)
        os.sync()
        shards.append(Shard(file.name, count, file.stat().st_size, ""))
    names = tuple(f"{label:03d}" for label in range(1000))
    description = ("moments", "kl16", "kl16.ckpt", "", 0.2325, 16, 256, (16, 16, 16), "fp16", True)
    save_manifest(root, Manifest(*description, names, tuple(shards)))
    yield root
    for file in root.glob("shard-*"):
        file.unlink()


def report(benchmark, images: int) -> None:
    benchmark.extra_info["images_per_second"] = round(images / statistics.median(benchmark.stats.stats.data))
    benchmark.extra_info["torch_threads"] = torch.get_num_threads()
    benchmark.extra_info["torch"] = torch.__version__


def opened(path: Path) -> LatentCache:
    return LatentCache(path, verify="size")


def test_batches(benchmark, path) -> None:
    """In the calling thread, files in the page cache."""
    batches = Batches(opened(path), BATCH, seed=0)

    def run() -> None:
        for index in range(BATCHES):
            batches[index]

    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    report(benchmark, BATCH * BATCHES)


@pytest.mark.parametrize("threads", [1, 2])
def test_prefetcher(benchmark, path, threads: int) -> None:
    """As a training loop sees it that takes no time of its own."""
    with Prefetcher(Batches(opened(path), BATCH, seed=0), threads=threads) as prefetcher:

        def run() -> None:
            for _ in range(BATCHES):
                next(prefetcher)

        benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    report(benchmark, BATCH * BATCHES)


def test_from_disk(benchmark, path) -> None:
    """The page cache emptied of the files before every round."""

    def evict() -> tuple[tuple[Batches], dict[str, object]]:
        for file in path.glob("shard-*"):
            descriptor = os.open(file, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        return (Batches(opened(path), BATCH, seed=0),), {}

    def run(batches: Batches) -> None:
        for index in range(BATCHES):
            batches[index]

    benchmark.pedantic(run, setup=evict, rounds=3)
    report(benchmark, BATCH * BATCHES)


def test_draw(benchmark) -> None:
    """The posterior draw alone."""
    moments, generator = torch.randn(BATCH, 32, 16, 16).half(), torch.Generator().manual_seed(0)
    benchmark.pedantic(draw_latents, (moments, generator, 0.2325), rounds=5, iterations=50, warmup_rounds=1)
    report(benchmark, BATCH)


@pytest.mark.parametrize("how", ["index_select", "slices"])
def test_read(benchmark, path, how: str) -> None:
    """Random rows of one shard, in the page cache: a map's index_select against safetensors' slices."""
    file = sorted(path.glob("shard-*"))[0]
    rows = torch.randint(SHARD, (BATCH,), generator=torch.Generator().manual_seed(0)).sort().values
    with safetensors.safe_open(file, framework="pt") as opened_file:
        whole, part = opened_file.get_tensor("moments"), opened_file.get_slice("moments")

        def by_index() -> torch.Tensor:
            return whole.flatten(0, 1).index_select(0, rows * 2)

        def by_slice() -> torch.Tensor:
            return torch.cat([part[row : row + 1, :1] for row in rows.tolist()])

        assert torch.equal(by_index(), by_slice().flatten(0, 1))
        function = by_index if how == "index_select" else by_slice
        benchmark.pedantic(function, rounds=5, iterations=50, warmup_rounds=1)
    report(benchmark, BATCH)
