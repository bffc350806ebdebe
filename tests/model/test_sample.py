"""Many samples as files, and latents decoded to images."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from ear_model import cli
from ear_model.config import SamplingConfig
from ear_model.data.cache_format import class_names
from ear_model.ear import EAR
from ear_model.plots import to_bytes
from ear_model.run_dir import save_config
from ear_model.sampling.decoder import Decoder
from ear_model.sampling.images import Sampler, class_labels
from ear_model.training import checkpoint
from tests.model.conftest import TINY, randomise, tiny_run


def identity(images: torch.Tensor) -> torch.Tensor:
    return images


def test_bytes_are_rounded_clipped_and_rgb():
    images = torch.tensor([-1.0, 0.0, 1.0, 3.0, -2.0, 2 * 7.4 / 255 - 1]).view(1, 1, 2, 3)
    assert to_bytes(images).shape == (1, 3, 2, 3)
    assert to_bytes(images)[0, 1].flatten().tolist() == [0, 128, 255, 255, 0, 7]
    with pytest.raises(ValueError, match="16 channels"):
        to_bytes(torch.zeros(1, 16, 4, 4))


def test_a_batch_depends_on_its_place_alone(tiny_model):
    labels = class_labels(range(10), 20, 10)
    sampler = Sampler(tiny_model.eval(), identity, SamplingConfig(2, 1.0), seed=3, batch_size=8)
    whole = dict(sampler.batches(labels))
    assert sorted(whole) == [0, 8, 16]
    last = dict(sampler.batches(labels, skip=lambda first, _: first < 16))
    assert list(last) == [16]
    assert torch.equal(last[16], whole[16])
    assert not torch.equal(whole[0], whole[8])


def test_the_tree_is_whole_balanced_and_resumed(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "images"
    model = randomise(EAR(TINY))
    run.mkdir()
    save_config(run, tiny_run())
    checkpoint.save_checkpoint(run, 1, model, dict(model.named_parameters()), {})
    command = ["sample", str(run), "--num", "20", "--images-out", str(out), "--batch-size", "6", "--device", "cpu"]
    assert cli.main(command) == 0
    assert "20 images, 20 of them new" in capsys.readouterr().out
    files = sorted(out.glob("*/*.png"))
    assert [path.parent.name for path in files] == [f"{label:04d}" for label in range(10) for _ in range(2)]
    assert Image.open(files[0]).mode == "RGB"
    assert Image.open(files[0]).size == (8, 8)
    before = {path: path.read_bytes() for path in files}
    assert len(set(before.values())) > 10
    files[7].unlink()
    assert cli.main(command) == 0
    assert "20 images, 6 of them new" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in sorted(out.glob("*/*.png"))} == before
    assert not list(tmp_path.rglob(".tmp-*"))
    assert cli.main([*command, "--out", "grid.png"]) == 1
    assert "give one of them" in capsys.readouterr().err
    assert cli.main([*command, "--seed", "1"]) == 1
    assert "holds another tree of sampled images" in capsys.readouterr().err
    assert cli.main([*command[:-6], "--images-out", str(run)]) == 1
    assert "is no tree of sampled images" in capsys.readouterr().err


def test_class_names_name_the_directories(tiny_model, tmp_path):
    names = [f"class {index}" for index in range(10)]
    labels = class_labels([3, 7], 2, 10)
    assert Sampler(tiny_model, identity, SamplingConfig(2)).write(labels, tmp_path / "out", names) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["class 3", "class 7"]


def test_class_names_come_from_the_cache(tmp_path):
    config = dataclasses.replace(tiny_run(), data="cache", data_path=str(tmp_path))
    assert class_names(config) is None
    for stored, expected in (
        ('{"classes": ["a", "b b"]}', ("a", "b b")),
        ('{"classes": ["a", "../b"]}', None),
        ('{"classes": ["a", "a"]}', None),
        ('{"classes": 3}', None),
        ('["a"]', None),
        ("no json", None),
    ):
        (tmp_path / "manifest.json").write_text(stored)
        assert class_names(config) == expected
    assert class_names(tiny_run()) is None


@pytest.fixture
def latent_run():
    return dataclasses.replace(tiny_run(), model=dataclasses.replace(TINY, channels=16))


def test_latents_are_decoded_by_the_runs_tokenizer(latent_run, tmp_path, monkeypatch):
    weights = tmp_path / "tokenizer.safetensors"
    weights.write_bytes(b"weights")

    class Doubling:
        """In the place of an autoencoder."""

        downsampling = 2

        def decode(self, latents):
            assert latents.shape[0] <= 32
            return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)

    monkeypatch.setattr(
        "ear_model.sampling.decoder.load_latent_tokenizer",
        lambda path, device: Doubling() if path == str(weights) else None,
    )
    run, config = tmp_path / "run", dataclasses.replace(latent_run, tokenizer=str(weights))
    model = randomise(EAR(config.model))
    run.mkdir()
    save_config(run, config)
    checkpoint.save_checkpoint(run, 1, model, dict(model.named_parameters()), {})
    latents = torch.randn(40, 16, 8, 8)
    decoder = Decoder(config)
    assert decoder.image_size == 16
    images = decoder(latents)
    assert images.shape == (40, 3, 16, 16)
    torch.testing.assert_close(images[:, :, ::2, 1::2], latents[:, :3])
    assert cli.main(["sample", str(run), "--num", "10", "--images-out", str(tmp_path / "out"), "--steps", "2"]) == 0
    assert np.asarray(Image.open(tmp_path / "out" / "0003" / "000003.png")).shape == (16, 16, 3)
    assert cli.main(["sample", str(run), "--num", "10", "--steps", "2"]) == 0
    assert Image.open(run / "grid.png").size[0] > 8 * 16


def test_latents_without_a_tokenizer_are_refused(latent_run):
    with pytest.raises(ValueError, match="latents of 16 channels and its run names no tokenizer"):
        Decoder(latent_run)
    with pytest.raises(ValueError, match="nowhere is not there"):
        Decoder(dataclasses.replace(latent_run, tokenizer="nowhere"))
    assert Decoder(tiny_run())(torch.ones(1, 1, 8, 8)).sum() == 64
