"""The digits and the order of their batches."""

import numpy as np
import torch

from ear_model.data.batches import Batches
from ear_model.data.digits import load_digits, to_pixels


def test_digits_split():
    train, held_out = load_digits()
    assert (len(train), len(held_out)) == (1347, 450)
    assert train.images.shape[1:] == (1, 8, 8)
    assert train.images.min() == -1
    assert train.images.max() == 1
    assert set(train.labels.tolist()) == set(held_out.labels.tolist()) == set(range(10))
    again, _ = load_digits()
    assert torch.equal(train.images, again.images)


def test_split_covers_every_digit_once():
    from sklearn.datasets import load_digits as original

    both = torch.cat([to_pixels(part.images) for part in load_digits()]).numpy()
    expected = original().images.reshape(-1, 64)
    assert np.array_equal(np.array(sorted(both.tolist())), np.array(sorted(expected.tolist())))


def test_batches_depend_on_seed_and_position_alone():
    train, _ = load_digits()
    walked = Batches(train, 100, seed=3)
    batches = [walked[index] for index in range(30)]
    images, labels = Batches(train, 100, seed=3)[25]
    assert torch.equal(images, batches[25][0])
    assert torch.equal(labels, batches[25][1])
    assert not torch.equal(Batches(train, 100, seed=4)[25][1], labels)


def test_every_epoch_sees_every_image_once():
    train, _ = load_digits()
    batches = Batches(train, 3 * 1347 // 9, seed=0)  # nine batches are three epochs, every third one reaches over
    for epoch in range(3):
        images = torch.cat([batches[3 * epoch + part][0] for part in range(3)])
        assert torch.equal(images.sum(dim=(1, 2, 3)).sort().values, train.images.sum(dim=(1, 2, 3)).sort().values)
    small = Batches(train, 1000, seed=0)
    assert len(small[1][1]) == 1000
