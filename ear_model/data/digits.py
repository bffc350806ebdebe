"""scikit-learn's handwritten digits."""

import numpy as np
import torch
from torch import Tensor

from ear_model.data.batches import Dataset

DIGITS_SPLIT_SEED = 0
PIXEL_SCALE = 8.0  # scikit-learn's digits have pixels 0..16; the model sees -1..1


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
