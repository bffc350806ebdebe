"""Training from a cache of `ear cache`, by memory map."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ear_model.data.cache_format import DTYPES, Manifest, Verify, file_sha256, load_manifest, verify_shards
from ear_model.data.images import random_flips, to_float
from ear_model.processes import local_rank
from ear_model.tensor_files import read_tensors
from ear_model.tokenizers.kl16 import LOGVAR_RANGE


def draw_latents(moments: Tensor, generator: torch.Generator, latent_scale: float) -> Tensor:
    """Latents drawn from posteriors, times the latent scale: float32 ``[b, c, h, w]``.

    Args:
        moments: mean and log variance ``[b, 2 c, h, w]``, floating point; the log variance is clamped to -30..20.
        generator: of the moments' device.
        latent_scale: factor on the drawn latents.
    """
    mean, logvar = moments.float().chunk(2, dim=1)
    noise = torch.empty_like(mean, memory_format=torch.contiguous_format).normal_(generator=generator)
    deviation = logvar.clamp(*LOGVAR_RANGE).mul_(0.5).exp_()
    return noise.mul_(deviation).add_(mean).mul_(latent_scale)


class LatentCache:
    """A cache as training data (:class:`ear_model.data.batches.TrainingData`): rows of mapped shards, by index.

    Moments: one of the two flips at random and a draw from its posterior, times the latent scale. Pixels: -1..1,
    mirrored at random. All randomness comes from the generator given to :meth:`gather`.

    Args:
        path: the directory.
        verify: see :func:`ear_model.data.cache_format.verify_shards`.

    Raises:
        ValueError: no cache, an unfinished or damaged one, another version's; shards that are missing, of wrong
            checksum, of another resolution or dtype than the manifest's; labels beyond its classes.
    """

    def __init__(self, path: str | Path, verify: Verify = "full") -> None:
        self.path = Path(path)
        self.manifest = load_manifest(self.path)
        self.image_shape, self.classes = self.manifest.image_shape, self.manifest.classes
        self.num_classes = len(self.classes)
        verify_shards(self.path, self.manifest, verify)
        opened = [_open_shard(self.path, self.manifest, index) for index in range(len(self.manifest.shards))]
        self._rows: list[Tensor] = [rows for rows, _ in opened]
        self.labels = torch.cat([labels for _, labels in opened])
        counts = torch.tensor([len(rows) for rows in self._rows])
        self._ends = counts.cumsum(0)
        self._starts = self._ends - counts

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See :class:`ear_model.data.batches.TrainingData`: float32 images ``[b, c, h, w]``, int64 labels ``[b]``.

        Raises:
            IndexError: indices outside ``0 .. len - 1``.
        """
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(
                f"indices reach from {indices.min()} to {indices.max()}; the cache has {len(self)} images"
            )
        labels = self.labels[indices]
        if self.manifest.kind == "pixels":
            images = to_float(self._read(indices, lambda rows: rows))
            return (random_flips(images, generator) if self.manifest.flips else images), labels
        flips = torch.zeros_like(indices)
        if self.manifest.flips:
            flips = torch.randint(2, indices.shape, generator=generator)
        # The flips of an image are neighbours: seen as rows, image i's are 2 i and 2 i + 1.
        copies = 1 + int(self.manifest.flips)
        moments = self._read(indices, lambda rows: rows.flatten(0, 1), copies, flips)
        return draw_latents(moments, generator, self.manifest.latent_scale), labels

    def _read(
        self, indices: Tensor, view: Callable[[Tensor], Tensor], copies: int = 1, offsets: Tensor | None = None
    ) -> Tensor:
        """The rows of ``indices`` in their order; one read a shard, ascending within it, as a disk likes it."""
        order = indices.argsort()
        ascending = indices[order]
        shards = torch.searchsorted(self._ends, ascending, right=True)
        within = (ascending - self._starts[shards]) * copies
        if offsets is not None:
            within += offsets[order]
        row_shape = view(self._rows[0]).shape[1:]
        out = torch.empty((len(indices), *row_shape), dtype=self._rows[0].dtype)
        present, counts = shards.unique_consecutive(return_counts=True)
        for shard, rows, places in zip(
            present.tolist(), within.split(counts.tolist()), order.split(counts.tolist()), strict=True
        ):
            out[places] = view(self._rows[shard]).index_select(0, rows)
        return out


def _open_shard(cache: Path, manifest: Manifest, index: int) -> tuple[Tensor, Tensor]:
    """Memory-mapped rows ``[n, ...]`` and labels ``[n]`` (copied) of a shard, checked against the manifest."""
    shard = manifest.shards[index]
    path = cache / shard.file
    tensors = read_tensors(path)[1]
    if tensors.keys() != {manifest.key, "labels"}:
        raise ValueError(f"{path} is no shard of a {manifest.kind} cache (it holds {sorted(tensors)}); copy it again")
    rows, labels = tensors[manifest.key], tensors["labels"].clone()
    dtype = DTYPES[manifest.dtype]
    expected = (shard.count, *manifest.row_shape())
    if tuple(rows.shape) != expected or rows.dtype != dtype:
        raise ValueError(
            f"{path} holds {manifest.key} {tuple(rows.shape)} of {rows.dtype}, another resolution, count or dtype "
            f"than the manifest's {expected} of {dtype}; a cache can't mix them: write it anew by `ear cache`"
        )
    if labels.dtype != torch.int64 or tuple(labels.shape) != (shard.count,):
        raise ValueError(
            f"{path} has labels {tuple(labels.shape)} of {labels.dtype}; int64 ({shard.count},) is needed"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(manifest.classes):
        raise ValueError(
            f"{path} has labels {low}..{high}; the manifest names {len(manifest.classes)} classes, 0.."
            f"{len(manifest.classes) - 1}: write the cache anew by `ear cache`"
        )
    return rows, labels


def load_cache(path: Path, tokenizer: Path | None = None) -> LatentCache:
    """A cache for training, checked in full by the first process of a machine.

    Args:
        path: the directory.
        tokenizer: weights that samples will be decoded with; must be those that made the cache.

    Raises:
        ValueError: as :class:`LatentCache`, or another tokenizer.
    """
    # The other processes of a torchrun would all read the same files; the first one's error ends the job.
    cache = LatentCache(path, "full" if local_rank() == 0 else "size")
    manifest = cache.manifest
    if tokenizer is not None:
        if manifest.kind == "pixels":
            raise ValueError(f"{path} holds pixels, which need no tokenizer; leave {tokenizer} out")
        if not tokenizer.is_file():
            raise ValueError(
                f"tokenizer weights {tokenizer} are not there; the cache was made with {manifest.weights}"
            )
        if file_sha256(tokenizer) != manifest.weights_sha256:
            raise ValueError(
                f"{tokenizer} is not the tokenizer of {path}, which was made with {manifest.weights} of sha256 "
                f"{manifest.weights_sha256[:16]}...; samples decoded with it would be wrong"
            )
    return cache
