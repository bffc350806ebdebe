"""Training from a latent cache of the public EAR and MAR code: ``<class>/<file>.npz``."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ear_model.data.cache import draw_latents
from ear_model.data.images import find_images
from ear_model.npz_files import read_npz
from ear_model.tokenizers.config import KL16_LATENT_SCALE, check_latent_scale

KEYS = ("moments", "moments_flip")
CHECKED_SIZES = 1000


class NpzCache:
    """A public cache as training data; a :class:`ear_model.data.batches.TrainingData`.

    Every file holds ``moments`` and ``moments_flip``, mean and log variance ``[2 c, h, w]``, for KL-16 float32
    ``[32, 16, 16]``. One of the two is taken at random, drawn from, and scaled.

    On opening, one file of each class and of each file size is read (files of one resolution have one size unless
    they are compressed), up to 1,000 sizes; the shape of every file is checked whenever it is read.

    Args:
        path: the directory with a folder a class.
        latent_scale: of the tokenizer that made it; KL-16's by default.

    Raises:
        ValueError: no such tree, a damaged file, missing arrays, mixed resolutions, a latent scale out of its range.
    """

    def __init__(self, path: str | Path, latent_scale: float = KL16_LATENT_SCALE) -> None:
        self.tree = find_images(path, (".npz",))
        check_latent_scale(latent_scale)
        self.latent_scale = latent_scale
        self._labels = torch.from_numpy(self.tree.labels)
        self._shape: tuple[int, ...] | None = None
        firsts = np.unique(self.tree.labels, return_index=True)[1].tolist()
        sizes: dict[int, int] = {}
        for index, name in enumerate(self.tree.paths):
            sizes.setdefault((self.tree.root / name).stat().st_size, index)
        for index in [*firsts, *list(sizes.values())[:CHECKED_SIZES]]:
            for key in KEYS:
                channels, height, width = self._load(index, key).shape
        self.image_shape, self.num_classes = (channels // 2, height, width), len(self.tree.classes)

    def __len__(self) -> int:
        return len(self.tree)

    def gather(self, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """See :class:`ear_model.data.batches.TrainingData`: float32 latents ``[b, c, h, w]``, labels ``[b]``.

        Raises:
            ValueError: a damaged file or one of another resolution, named.
        """
        flips = torch.randint(2, indices.shape, generator=generator).tolist()
        chosen = [self._load(index, KEYS[flip]) for index, flip in zip(indices.tolist(), flips, strict=True)]
        moments = torch.from_numpy(np.stack(chosen))
        return draw_latents(moments, generator, self.latent_scale), self._labels[indices]

    def _load(self, index: int, key: str) -> np.ndarray:
        path = self.tree.root / self.tree.paths[index]
        try:
            (values,) = read_npz(path, (key,))
        except ValueError as error:
            raise ValueError(
                f"{error}; {path.name} is no file of an EAR or MAR latent cache, write it again"
            ) from error
        if values.ndim != 3 or values.shape[0] % 2 or values.dtype.kind != "f" or 0 in values.shape:
            raise ValueError(f"{path}: {key} is {values.dtype} {values.shape}; floating-point [2 c, h, w] is needed")
        if self._shape is None:
            self._shape = values.shape
        if values.shape != self._shape:
            raise ValueError(
                f"{path}: {key} is {values.shape}, the cache's other files are {self._shape}; "
                "a cache can't mix resolutions: cache those images again"
            )
        values = values.astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: {key} holds NaN or infinite values; write it again")
        return values


def load_npz_cache(path: Path, tokenizer: Path | None = None) -> NpzCache:
    """A public cache for training, with the latent scale of the tokenizer that will decode samples (KL-16's if None).

    Raises:
        ValueError: as :class:`NpzCache`, a bad tokenizer file, or one of other latents than the cache's.
    """
    if tokenizer is None:
        return NpzCache(path)
    from ear_model.tokenizers.latent import load_latent_tokenizer

    loaded = load_latent_tokenizer(tokenizer)
    cache = NpzCache(path, loaded.latent_scale)
    if cache.image_shape[0] != loaded.latent_channels:
        raise ValueError(
            f"{path} has latents of {cache.image_shape[0]} channels, {tokenizer} of {loaded.latent_channels}; "
            "give the tokenizer that the cache was made with"
        )
    return cache
