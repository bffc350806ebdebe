"""Trees of images, and the centre crop."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from ear_model.data.batches import Batches
from ear_model.data.images import ImageFolderData, UnreadableImageError, centre_crop, find_images, read_image
from tests.model.conftest import write_tree


def test_classes_and_images_are_sorted(tmp_path):
    write_tree(tmp_path, {"b": 3, "a": 2})
    (tmp_path / "a" / "deeper").mkdir()
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "deeper" / "x.PNG")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / ".hidden.png").write_text("no image")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "readme.png").write_text("in no class")
    tree = find_images(tmp_path)
    assert tree.classes == ("a", "b")
    assert tree.paths == ("a/1.png", "a/deeper/x.PNG", "b/0.png", "b/1.png", "b/2.png")
    assert tree.labels.tolist() == [0, 0, 1, 1, 1]


def test_trees_that_are_none(tmp_path):
    for path, match in ((tmp_path / "none", "not a directory"), (tmp_path, "no folders")):
        with pytest.raises(ValueError, match=match):
            find_images(path)
    write_tree(tmp_path, {"a": 1})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no files"):
        find_images(tmp_path)


def test_digests_notice_changes(tmp_path):
    write_tree(tmp_path, {"a": 3})
    tree = find_images(tmp_path)
    names, files = tree.names_digest(), tree.files_digest(0, 3)
    assert find_images(tmp_path).files_digest(0, 3) == files
    os.utime(tmp_path / "a" / "1.png", ns=(1, 1))
    assert tree.files_digest(0, 3) != files
    assert tree.files_digest(0, 1) == find_images(tmp_path).files_digest(0, 1)
    assert find_images(tmp_path).names_digest() == names
    (tmp_path / "a" / "1.png").rename(tmp_path / "a" / "4.png")
    assert find_images(tmp_path).names_digest() != names


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (64, 64), (300, 129), (20, 30), (257, 31)])
def test_centre_crop_is_adms(size):
    """Against its steps taken one by one on arrays, where a box filter of two is a mean of pairs."""
    target = 32
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    found = np.asarray(centre_crop(Image.fromarray(pixels), target)).astype(float)
    assert found.shape == (target, target, 3)
    halved = pixels
    while min(halved.shape[:2]) >= 2 * target:
        height, width = halved.shape[0] // 2, halved.shape[1] // 2
        if halved.shape[0] % 2 == 0 and halved.shape[1] % 2 == 0:
            mean = halved.reshape(height, 2, width, 2, 3).astype(float).mean((1, 3))
            halved = np.floor(mean + 0.5).astype(np.uint8)
        else:  # an odd side: the box is a little wider than two pixels
            halved = np.asarray(Image.fromarray(halved).resize((width, height), Image.Resampling.BOX))
    scale = target / min(halved.shape[:2])
    shape = (round(halved.shape[1] * scale), round(halved.shape[0] * scale))
    resized = np.asarray(Image.fromarray(halved).resize(shape, Image.Resampling.BICUBIC)).astype(float)
    top, left = (resized.shape[0] - target) // 2, (resized.shape[1] - target) // 2
    assert np.abs(found - resized[top : top + target, left : left + target]).max() <= 2


def test_modes_become_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    image = read_image(tmp_path / "grey.png", 8)
    assert image.dtype == torch.uint8
    assert torch.equal(image, torch.from_numpy(grey).expand(3, 8, 8))
    rgba = np.zeros((8, 8, 4), dtype=np.uint8)
    rgba[..., 0] = 200
    Image.fromarray(rgba).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png", 8)[0].min() == 200


def test_unreadable_images_are_named(tmp_path):
    write_tree(tmp_path, {"a": 1})
    whole = tmp_path / "a" / "0.png"
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:-40])
    (tmp_path / "text.png").write_text("no image")
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    for name in ("cut.png", "text.png", "deep.png", "none.png"):
        with pytest.raises(UnreadableImageError, match=name):
            read_image(tmp_path / name, 8)


def test_image_folder_is_training_data(tmp_path):
    write_tree(tmp_path, {"a": 4, "b": 5}, size=8)
    data = ImageFolderData(tmp_path, 8)
    assert (len(data), data.image_shape, data.num_classes) == (9, (3, 8, 8), 2)
    images, labels = Batches(data, 9, seed=1)[0]
    again, _ = Batches(data, 9, seed=1)[0]
    assert torch.equal(images, again)
    assert sorted(labels.tolist()) == [0] * 4 + [1] * 5
    assert images.min() >= -1
    assert images.max() <= 1
    still, order = data.read(torch.arange(9)), labels.argsort(stable=True)
    for image, label in zip(images[order], labels[order], strict=True):
        kinds = [torch.equal(image, mirror) for each in still for mirror in (each, each.flip(2))]
        assert sum(kinds) == 1  # every one is an image or its mirror image
        assert (kinds.index(True) >= 8) == bool(label)
    unflipped = ImageFolderData(tmp_path, 8, flips=False)
    assert torch.equal(unflipped.gather(torch.arange(9), torch.Generator())[0], still)
    raw = np.asarray(Image.open(tmp_path / "a" / "0.png")).astype(np.float32)
    np.testing.assert_allclose(still[0].permute(1, 2, 0).numpy(), raw / 127.5 - 1, atol=1e-6)
    with pytest.raises(ValueError, match="image size is 0"):
        ImageFolderData(tmp_path, 0)
