"""Latent caches: what is written, what training reads, and what is refused."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from ear_model.data import cache_format
from ear_model.data.batches import Batches
from ear_model.data.cache import LatentCache, draw_latents, load_cache
from ear_model.data.cache_writer import CacheWriter
from ear_model.data.config import CacheOptions
from ear_model.data.images import ImageFolderData
from ear_model.data.npz import NpzCache
from ear_model.data.sources import load_training_data
from ear_model.tokenizers.config import AutoencoderConfig
from ear_model.tokenizers.kl16 import AutoencoderKL
from ear_model.tokenizers.latent import load_latent_tokenizer, save_autoencoder
from ear_model.training.trainer import Trainer
from tests.model.conftest import TINY, randomise, tiny_run, write_tree

SCALE = 0.6
COUNTS = {"ant": 5, "bee": 4, "cat": 2}
PIXELS = {"tokenizer": "pixels", "weights": "", "weights_sha256": ""}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    write_tree(root, COUNTS, size=18)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    torch.manual_seed(0)
    config = AutoencoderConfig(channels=32, multipliers=(1, 1, 1), residual_blocks=1, latent_channels=4)
    save_autoencoder(path, randomise(AutoencoderKL(config)), SCALE)
    return path


def write(tree, out, weights=None, *, rank=0, world_size=1, **changes):
    """A cache in this process, shards of 4 images."""
    description, tokenizer = PIXELS, None
    if weights is not None:
        checksum = cache_format.file_sha256(weights)
        description = {"tokenizer": "autoencoder", "weights": weights.name, "weights_sha256": checksum}
        tokenizer = load_latent_tokenizer(weights)
    options = CacheOptions(**{"image_size": 16, "shard_size": 4, "workers": 0, "batch_size": 3, **changes})
    writer = CacheWriter(tree, out, tokenizer, description, options, rank=rank, world_size=world_size)
    return writer.run(quiet=True)


@pytest.fixture(scope="module")
def whole(tree, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("cache") / "latents"
    write(tree, out, weights, dtype="fp32")
    return out


@pytest.fixture
def cache(whole, tmp_path):
    """A copy to break."""
    out = tmp_path / "cache"
    shutil.copytree(whole, out)
    return out


def test_moments_are_the_tokenizers(whole, tree, weights):
    manifest = cache_format.load_manifest(whole)
    assert [shard.count for shard in manifest.shards] == [4, 4, 3]
    assert manifest.classes == tuple(COUNTS)
    assert (manifest.latent_scale, manifest.downsampling, manifest.image_shape) == (SCALE, 4, (4, 4, 4))
    stored = [safetensors.torch.load_file(whole / shard.file) for shard in manifest.shards]
    labels = torch.cat([shard["labels"] for shard in stored])
    assert labels.tolist() == [0] * 5 + [1] * 4 + [2] * 2
    images = ImageFolderData(tree, 16).read(torch.arange(11))
    tokenizer = load_latent_tokenizer(weights)
    moments = torch.cat([shard["moments"] for shard in stored])
    torch.testing.assert_close(moments[:, 0], tokenizer.encode(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(moments[:, 1], tokenizer.encode(images.flip(3)), rtol=1e-4, atol=1e-5)


def test_gather_takes_a_flip_and_draws(whole):
    cache = LatentCache(whole)
    assert (len(cache), cache.image_shape, cache.num_classes, cache.classes) == (11, (4, 4, 4), 3, tuple(COUNTS))
    stored = [safetensors.torch.load_file(whole / shard.file)["moments"] for shard in cache.manifest.shards]
    moments = torch.cat(stored)
    indices = torch.tensor([10, 0, 7, 3, 3, 4, 0, 8, 3])
    latents, labels = cache.gather(indices, torch.Generator().manual_seed(5))
    assert labels.tolist() == [2, 0, 1, 0, 0, 0, 0, 1, 0]
    assert latents.dtype == torch.float32
    generator = torch.Generator().manual_seed(5)
    flips = torch.randint(2, (9,), generator=generator)
    assert 0 < flips.sum() < 9
    chosen = moments[indices, flips]
    noise = torch.randn(9, 4, 4, 4, generator=generator)
    expected = (chosen[:, :4] + (chosen[:, 4:] / 2).exp() * noise) * SCALE
    torch.testing.assert_close(latents, expected)
    assert torch.equal(cache.labels[indices], labels)
    with pytest.raises(IndexError, match="11 images"):
        cache.gather(torch.tensor([11]), generator)
    with pytest.raises(IndexError, match="11 images"):
        cache.gather(torch.tensor([-1]), generator)


def test_draw_latents_moments():
    moments = torch.zeros(1, 2, 200, 200)
    moments[:, 0], moments[:, 1] = 2.0, 2 * np.log(3.0)
    latents = draw_latents(moments.half(), torch.Generator().manual_seed(0), 0.5)
    assert latents.mean() == pytest.approx(1.0, abs=5 * 1.5 / 200)
    assert latents.std() == pytest.approx(1.5, rel=0.02)
    moments[:, 1] = -1e4  # the deviation of the clamped log variance, exp(-15), not of the stored one
    spread = draw_latents(moments, torch.Generator().manual_seed(0), 1e6) - 2e6
    assert 0 < spread.abs().max() < 3


def test_batches_walk_the_cache(whole):
    cache = LatentCache(whole)
    counts = torch.zeros(3)
    for index in range(11):
        latents, labels = Batches(cache, 6, seed=1)[index]
        assert latents.shape == (6, 4, 4, 4)
        counts += labels.bincount(minlength=3)
    assert counts.tolist() == [6 * count for count in COUNTS.values()]


def test_half_precision_and_no_flips(whole, tree, weights, tmp_path):
    write(tree, tmp_path / "half", weights, flips=False)
    half, full = LatentCache(tmp_path / "half"), LatentCache(whole)
    assert half.manifest.row_shape() == (1, 8, 4, 4)
    moments = [
        torch.cat([safetensors.torch.load_file(each.path / shard.file)["moments"] for shard in each.manifest.shards])
        for each in (half, full)
    ]
    assert moments[0].dtype == torch.float16
    torch.testing.assert_close(moments[0][:, 0].float(), moments[1][:, 0], rtol=1e-3, atol=1e-3)
    latents, _ = half.gather(torch.arange(11), torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        latents, draw_latents(moments[0][:, 0], torch.Generator().manual_seed(0), SCALE), rtol=0, atol=0
    )


def test_pixels(tree, tmp_path):
    write(tree, tmp_path / "pixels")
    cache = LatentCache(tmp_path / "pixels")
    assert (cache.image_shape, cache.manifest.dtype) == ((3, 16, 16), "uint8")
    images, _ = cache.gather(torch.arange(11), torch.Generator().manual_seed(3))
    still = ImageFolderData(tree, 16).read(torch.arange(11))
    mirrored = [torch.equal(image, plain.flip(2)) for image, plain in zip(images, still, strict=True)]
    assert all(torch.equal(i, p.flip(2) if m else p) for i, p, m in zip(images, still, mirrored, strict=True))
    assert 0 < sum(mirrored) < 11
    write(tree, tmp_path / "still", flips=False)
    assert torch.equal(LatentCache(tmp_path / "still").gather(torch.arange(11), torch.Generator())[0], still)


def test_training_reads_a_cache(whole, weights, tmp_path):
    model = replace(TINY, image_size=4, channels=4, num_classes=3, patch_size=1)
    config = replace(tiny_run(steps=2), data="cache", data_path=str(whole), tokenizer=str(weights), model=model)
    data = load_training_data(config)
    assert len(data) == 11
    trainer = Trainer(config, tmp_path / "run")
    trainer.run(quiet=True)
    assert trainer.step == 2
    with pytest.raises(ValueError, match=r"cache has images of shape \(4, 4, 4\); the model reads \(4, 8, 8\)"):
        Trainer(replace(config, model=replace(model, image_size=8)), tmp_path / "other")
    with pytest.raises(ValueError, match="cache has 3 classes; the model knows 2"):
        Trainer(replace(config, model=replace(model, num_classes=2)), tmp_path / "other")
    with pytest.raises(ValueError, match="needs data_path"):
        Trainer(replace(config, data_path=""), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_another_tokenizer_is_refused(whole, weights, tree, tmp_path):
    other = tmp_path / "other.safetensors"
    other.write_bytes(weights.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=r"is not the tokenizer of .* made with small.safetensors"):
        load_cache(whole, other)
    with pytest.raises(ValueError, match="not there"):
        load_cache(whole, tmp_path / "none")
    write(tree, tmp_path / "pixels")
    with pytest.raises(ValueError, match="pixels, which need no tokenizer"):
        load_cache(tmp_path / "pixels", weights)


def _edit_manifest(cache, **values):
    path = cache / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _replace_shard(cache, **tensors):
    """The middle shard with other tensors, and a manifest that fits its bytes."""
    path = cache / "shard-00001.safetensors"
    safetensors.torch.save_file({**safetensors.torch.load_file(path), **tensors}, path)
    stored = json.loads((cache / "manifest.json").read_text())["shards"]
    stored[1] |= {"size": path.stat().st_size, "sha256": cache_format.file_sha256(path)}
    _edit_manifest(cache, shards=stored)


def _flip_a_byte(cache):
    path = cache / "shard-00001.safetensors"
    contents = bytearray(path.read_bytes())
    contents[-9] ^= 1
    path.write_bytes(contents)


def _truncate(cache):
    path = cache / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


BROKEN = [
    (lambda cache: shutil.rmtree(cache), "is not a directory"),
    (lambda cache: (cache / "manifest.json").unlink(), "is not finished"),
    (lambda cache: (shutil.rmtree(cache / "build"), (cache / "manifest.json").unlink()), "is no cache"),
    (lambda cache: (cache / "manifest.json").write_text("{"), "is damaged"),
    (lambda cache: _edit_manifest(cache, format="x"), "no manifest of a cache"),
    (lambda cache: _edit_manifest(cache, version=7), "has version 7; this program reads 1"),
    (lambda cache: _edit_manifest(cache, shards=[]), "shards is"),
    (lambda cache: _edit_manifest(cache, latent_scale=0.0), "latent_scale is 0.0"),
    (lambda cache: _edit_manifest(cache, latent_scale=1e30), "latent_scale is 1e.30; it must be from 1e-06"),
    (lambda cache: _edit_manifest(cache, image_shape=[4, 4, 5]), "image_size is 16"),
    (lambda cache: _edit_manifest(cache, surprise=1), "surprise"),
    (lambda cache: (cache / "shard-00001.safetensors").unlink(), r"lacks shard-00001.safetensors of its 3 shards"),
    (_truncate, "bytes; it must have"),
    (_flip_a_byte, "wrong checksum of shard-00001"),
    (lambda cache: _edit_manifest(cache, classes=["a", "b"]), r"labels 1\.\.2; the manifest names 2 classes, 0\.\.1"),
    (lambda cache: _replace_shard(cache, labels=torch.tensor([0, 0, 0, -1])), r"labels -1\.\.0"),
    (lambda cache: _replace_shard(cache, labels=torch.zeros(3, dtype=torch.int64)), r"labels \(3,\)"),
    (lambda cache: _replace_shard(cache, moments=torch.zeros(4, 2, 8, 8, 8)), "another resolution"),
    (lambda cache: _replace_shard(cache, moments=torch.zeros(4, 2, 8, 4, 4).half()), "of torch.float16"),
    (lambda cache: _edit_manifest(cache, kind="pixels", dtype="uint8"), "no shard of a pixels cache"),
]


@pytest.mark.parametrize(("damage", "match"), BROKEN)
def test_broken_caches_are_refused(cache, damage, match):
    LatentCache(cache)
    damage(cache)
    with pytest.raises(ValueError, match=match):
        LatentCache(cache)


def test_checksums_are_looked_at_once_and_whenever_a_file_changes(cache, monkeypatch):
    read = []
    whole_sum = cache_format.file_sha256
    monkeypatch.setattr(cache_format, "file_sha256", lambda path: read.append(path.name) or whole_sum(path))
    (cache / "verified.json").unlink(missing_ok=True)
    LatentCache(cache, "size")
    assert read == []
    LatentCache(cache)
    assert sorted(read) == [f"shard-{shard:05d}.safetensors" for shard in range(3)]
    LatentCache(cache)
    assert len(read) == 3
    _flip_a_byte(cache)
    LatentCache(cache, "size")
    for _ in range(2):  # a wrong one is not noted as right
        with pytest.raises(ValueError, match="wrong checksum"):
            LatentCache(cache)
    assert read[3:] == ["shard-00001.safetensors"] * 2
    shutil.copytree(cache, cache.with_name("copy"))  # keeps the times and verified.json, perhaps not every byte
    with pytest.raises(ValueError, match="wrong checksum of shard-00001"):
        LatentCache(cache.with_name("copy"))
    assert len(read) == 8
    with pytest.raises(ValueError, match="verify is 'none'"):
        LatentCache(cache, "none")


def _write_npz(root, counts, shape=(8, 4, 4), **arrays):
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            stored = {key: generator.normal(size=shape).astype(np.float32) for key in ("moments", "moments_flip")}
            np.savez(root / name / f"{index}.JPEG.npz", **{**stored, **arrays})


def test_public_cache(tmp_path):
    _write_npz(tmp_path, {"n01": 3, "n02": 2})
    config = replace(tiny_run(), data="npz", data_path=str(tmp_path))
    data = load_training_data(config)
    assert (len(data), data.image_shape, data.num_classes) == (5, (4, 4, 4), 2)
    indices = torch.tensor([4, 0, 1, 1, 2, 0])
    latents, labels = data.gather(indices, torch.Generator().manual_seed(4))
    assert labels.tolist() == [1, 0, 0, 0, 0, 0]
    generator = torch.Generator().manual_seed(4)
    flips = torch.randint(2, (6,), generator=generator).tolist()
    assert 0 < sum(flips) < 6
    files = sorted(tmp_path.rglob("*.npz"))
    chosen = [
        np.load(files[index])["moments_flip" if flip else "moments"]
        for index, flip in zip(indices.tolist(), flips, strict=True)
    ]
    expected = draw_latents(torch.from_numpy(np.stack(chosen)), generator, 0.2325)
    assert torch.equal(latents, expected)


def test_public_cache_takes_the_scale_of_its_tokenizer(tmp_path, weights):
    _write_npz(tmp_path / "npz", {"a": 1})
    config = replace(tiny_run(), data="npz", data_path=str(tmp_path / "npz"), tokenizer=str(weights))
    latents = [
        load_training_data(each).gather(torch.tensor([0]), torch.Generator().manual_seed(0))[0]
        for each in (config, replace(config, tokenizer=""))
    ]
    torch.testing.assert_close(latents[0] / SCALE, latents[1] / 0.2325)
    _write_npz(tmp_path / "wide", {"a": 1}, shape=(10, 4, 4))
    with pytest.raises(ValueError, match=r"latents of 5 channels, .* of 4; give the tokenizer"):
        load_training_data(replace(config, data_path=str(tmp_path / "wide")))


def test_public_caches_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="not a directory"):
        NpzCache(tmp_path / "none")
    _write_npz(tmp_path, {"a": 2, "b": 2})
    NpzCache(tmp_path)
    with pytest.raises(ValueError, match="latent_scale is inf"):
        NpzCache(tmp_path, float("inf"))
    odd = tmp_path / "b" / "1.JPEG.npz"
    good = odd.read_bytes()
    for contents, match in [
        ({"moments": np.zeros((8, 4, 4), np.float32)}, "no 'moments_flip'"),
        ({"moments": np.zeros((8, 8, 8), np.float32), "moments_flip": np.zeros((8, 8, 8))}, "can't mix resolutions"),
        ({key: np.zeros((8, 4, 4), np.int64) for key in ("moments", "moments_flip")}, "int64"),
        ({key: np.zeros((7, 4, 4), np.float32) for key in ("moments", "moments_flip")}, r"\(7, 4, 4\)"),
        ({key: np.array([object()]) for key in ("moments", "moments_flip")}, "pickle"),
    ]:
        np.savez(odd, **contents)
        with pytest.raises(ValueError, match=match):
            NpzCache(tmp_path)
    odd.write_bytes(good[:-30])
    with pytest.raises(ValueError, match=r"1.JPEG.npz is no file"):
        NpzCache(tmp_path)
