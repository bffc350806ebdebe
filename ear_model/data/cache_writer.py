"""Writing a latent cache, a shard at a time, so that a run that was killed goes on from its last whole shard.

Several processes (``torchrun``) share the shards out among them by number and need no other word with each other:
whoever finds all of them finished writes the manifest.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ear_model.data.cache_format import BUILD, DTYPES, MANIFEST, Manifest, Shard, file_sha256, save_manifest
from ear_model.data.config import CacheOptions
from ear_model.data.images import ImageTree, UnreadableImageError, find_images, read_image, to_float
from ear_model.files import read_json, remove_temporaries, require_writable, write_json
from ear_model.processes import worker_initializer
from ear_model.progress import Progress
from ear_model.tensor_files import write_tensors
from ear_model.tokenizers.latent import AutoencoderTokenizer

SHOWN_ERRORS = 20

_Batch = tuple[Tensor | None, list[str]]  # images, None if some can't be read; what can't be read


class CacheWriter:
    """Encodes a tree of images into a cache directory.

    Args:
        images: the tree, a folder a class.
        cache: the directory to write; new, empty, or one that the same call began.
        tokenizer: what encodes; None keeps pixels.
        description: how the manifest describes it: "tokenizer", "weights" and "weights_sha256".
        options: what to cache, and how to work through it.
        rank, world_size: this process among those that share the work.

    Raises:
        ValueError: a bad tree; sizes that don't fit; a directory that holds something else, or a cache of another
            tree or other options; too little space.
    """

    def __init__(
        self,
        images: Path,
        cache: Path,
        tokenizer: AutoencoderTokenizer | None,
        description: dict[str, str],
        options: CacheOptions,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}; it must be in 0..{world_size - 1}")
        factor = 1 if tokenizer is None else tokenizer.downsampling
        if options.image_size % factor:
            raise ValueError(f"image size is {options.image_size}; this tokenizer needs a multiple of {factor}")
        self.cache, self.tokenizer, self.options, self.shard_size = cache, tokenizer, options, options.shard_size
        self.rank, self.world_size = rank, world_size
        self.tree: ImageTree = find_images(images)
        side = options.image_size // factor
        self.manifest = Manifest(
            kind="pixels" if tokenizer is None else "moments",
            tokenizer=description["tokenizer"],
            weights=description["weights"],
            weights_sha256=description["weights_sha256"],
            latent_scale=1.0 if tokenizer is None else tokenizer.latent_scale,
            downsampling=factor,
            image_size=options.image_size,
            image_shape=(3 if tokenizer is None else tokenizer.latent_channels, side, side),
            dtype="uint8" if tokenizer is None else options.dtype,
            flips=options.flips,
            classes=self.tree.classes,
            shards=(),
        )
        self._prepare()

    def _bounds(self, shard: int) -> tuple[int, int]:
        return shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.tree))

    @property
    def num_shards(self) -> int:
        return -(-len(self.tree) // self.shard_size)

    def _record(self, shard: int) -> Path:
        return self.cache / BUILD / f"shard-{shard:05d}.json"

    def _prepare(self) -> None:
        """Refuse another plan's directory; write this one's."""
        plan: dict[str, Any] = asdict(self.manifest)
        for name in ("shards", "classes", "weights"):  # the names' digest and the weights' checksum say it
            del plan[name]
        plan["image_shape"] = list(plan["image_shape"])
        plan |= {
            "num_images": len(self.tree),
            "names_sha256": self.tree.names_digest(),
            "shard_size": self.shard_size,
        }
        path = self.cache / BUILD / "plan.json"
        if path.is_file():
            stored = read_json(path)
            changed = [name for name in plan if stored.get(name) != plan[name]]
            if "names_sha256" in changed:
                raise ValueError(
                    f"{self.cache} was begun with another tree: images or classes were added, removed or renamed "
                    f"({stored.get('num_images')} images then, {len(self.tree)} now); give a new --out"
                )
            if changed:
                was = ", ".join(f"{name} {stored.get(name)!r}, now {plan[name]!r}" for name in changed)
                raise ValueError(f"{self.cache} was begun with other options ({was}); use those or give a new --out")
        elif self.cache.exists() and (
            # Another process of a torchrun may just be making the build directory.
            not self.cache.is_dir() or any(entry.name != BUILD for entry in self.cache.iterdir())
        ):
            raise ValueError(f"{self.cache} exists and is no cache that was begun; give a new --out")
        self._todo = [shard for shard in range(self.num_shards) if self._finished(shard) is None]
        row_bytes = DTYPES[self.manifest.dtype].itemsize
        for side in self.manifest.row_shape():
            row_bytes *= side
        missing = sum(last - first for first, last in map(self._bounds, self._todo))
        require_writable(path, needed_bytes=missing * row_bytes)
        if not path.is_file():
            write_json(path, plan)
        if self._todo:
            (self.cache / MANIFEST).unlink(missing_ok=True)

    def _finished(self, shard: int, *, compare: bool = True) -> Shard | None:
        """The shard if it is written and whole; ``compare``: and if its images are what they were."""
        record = self._record(shard)
        if not record.is_file():
            return None
        values = read_json(record)
        files_sha256 = values.pop("files_sha256", None)
        if compare and files_sha256 != self.tree.files_digest(*self._bounds(shard)):
            first = self.tree.paths[self._bounds(shard)[0]]
            raise ValueError(
                f"{self.cache}: images of shard {shard} (from {first} on) were changed since it was written; remove "
                f"{record} to write that shard anew, or give a new --out"
            )
        found = Shard(**values)
        path = self.cache / found.file
        return found if path.is_file() and path.stat().st_size == found.size else None

    def run(self, *, quiet: bool = False) -> Manifest | None:
        """Write what is missing of this process's part.

        Returns:
            The manifest if the cache is whole, None while other processes still work on their parts.

        Raises:
            ValueError: images that can't be read, all of them named (the first 20); the other shards are kept.
        """
        mine = [shard for shard in self._todo if shard % self.world_size == self.rank]
        batches = [batch for shard in mine for batch in self._batches(shard)]
        # Threads of a worker would only compete with the other workers.
        loader = DataLoader(
            _Decoded(self.tree, self.manifest.image_size),
            batch_sampler=batches,
            num_workers=min(self.options.workers, len(batches)),
            collate_fn=_collate,
            persistent_workers=False,
            worker_init_fn=worker_initializer(),
        )
        errors: list[str] = []
        total = len(self.tree)
        done = total - sum(last - first for first, last in map(self._bounds, self._todo))
        share = sum(last - first for first, last in map(self._bounds, mine))
        with Progress(done + share, done, "image", quiet=quiet) as progress:
            decoded = iter(loader) if batches else iter(())
            for shard in mine:
                errors += self._write_shard(shard, decoded, progress)
            next(decoded, None)  # asked for more than there is, the loader ends its workers
        if errors:
            shown = "; ".join(errors[:SHOWN_ERRORS])
            more = f"; and {len(errors) - SHOWN_ERRORS} more" if len(errors) > SHOWN_ERRORS else ""
            raise ValueError(
                f"{len(errors)} images can't be read: {shown}{more}. Shards without them are written. Put readable "
                "files in their place and run the same command again, or remove them and give a new --out"
            )
        shards = [self._finished(shard, compare=False) for shard in range(self.num_shards)]
        whole = tuple(shard for shard in shards if shard is not None)
        if len(whole) < self.num_shards:
            return None
        manifest = Manifest(**{**vars(self.manifest), "shards": whole})
        save_manifest(self.cache, manifest)
        # What killed processes left. Every shard is there; another process may just be writing the manifest, too.
        remove_temporaries(self.cache, "*" if self.world_size == 1 else "shard-*")
        remove_temporaries(self.cache / BUILD)
        return manifest

    def _batches(self, shard: int) -> list[list[int]]:
        first, last = self._bounds(shard)
        size = self.options.batch_size
        return [list(range(start, min(start + size, last))) for start in range(first, last, size)]

    def _write_shard(self, shard: int, decoded: Iterator[_Batch], progress: Progress) -> list[str]:
        """Encode and write one shard; returns what could not be read, and then writes nothing."""
        first, last = self._bounds(shard)
        name = f"shard-{shard:05d}.safetensors"
        for leftover in self.cache.glob(f".tmp-*-{name}"):  # of a killed run; this shard is ours alone
            leftover.unlink(missing_ok=True)
        # Before the images are read: one that changes while we read must be noticed.
        files_sha256 = self.tree.files_digest(first, last)
        rows = torch.empty((last - first, *self.manifest.row_shape()), dtype=DTYPES[self.manifest.dtype])
        errors: list[str] = []
        for batch in self._batches(shard):
            images, failed = next(decoded)
            errors += failed
            if images is not None and not errors:
                rows[batch[0] - first : batch[-1] + 1 - first] = self._encode(images)
            progress.update(len(batch))
        if errors:
            return errors
        if rows.is_floating_point() and not rows.isfinite().all():
            raise ValueError(
                f"the tokenizer gives moments that are not finite in {self.manifest.dtype} for images "
                f"{self.tree.paths[first]} ... {self.tree.paths[last - 1]}; use --dtype fp32 or other weights"
            )
        tensors = {self.manifest.key: rows, "labels": torch.from_numpy(self.tree.labels[first:last].copy())}
        path = self.cache / name
        write_tensors(path, tensors)
        written = Shard(name, last - first, path.stat().st_size, file_sha256(path))
        write_json(self._record(shard), {**asdict(written), "files_sha256": files_sha256})
        return []

    def _encode(self, images: Tensor) -> Tensor:
        """uint8 ``[b, 3, H, W]`` to rows of a shard."""
        if self.tokenizer is None:
            return images
        floats = to_float(images.to(self.tokenizer.device))
        if not self.manifest.flips:
            return self.tokenizer.encode(floats).unsqueeze(1).cpu()
        both = self.tokenizer.encode(torch.cat([floats, floats.flip(3)]))
        return torch.stack(both.chunk(2), dim=1).cpu()


class _Decoded(Dataset):
    """Images of a tree as uint8 tensors, or why they can't be read, in words."""

    def __init__(self, tree: ImageTree, size: int) -> None:
        self.tree, self.size = tree, size

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return read_image(self.tree.root / self.tree.paths[index], self.size)
        except UnreadableImageError as error:
            return str(error)


def _collate(items: list[Tensor | str]) -> _Batch:
    errors = [item for item in items if isinstance(item, str)]
    images = [item for item in items if isinstance(item, Tensor)]
    return (None if errors else torch.stack(images)), errors
