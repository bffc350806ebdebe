"""Many samples, whatever the batches, and latents decoded to images; files of them are in test_sample_files.py."""

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ear_model import cli
from ear_model.config import SamplingConfig, with_score
from ear_model.data.cache_format import class_names
from ear_model.ear import EAR
from ear_model.errors import RunError
from ear_model.plots import to_bytes
from ear_model.presets import DIGITS, EAR_BASE, EAR_HUGE, EAR_LARGE, GLYPHS
from ear_model.run_dir import save_config
from ear_model.sampling.decoder import Decoder
from ear_model.sampling.images import Sampler, class_labels, even_size, sample_images
from ear_model.sampling.memory import automatic_batch_size, batch_that_fits, busy_batch, sampling_bytes
from ear_model.tokenizers.config import SMALL
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


def test_batches_are_of_the_images_asked_for(tiny_model):
    labels = class_labels(range(10), 20, 10)
    sampler = Sampler(tiny_model.eval(), identity, SamplingConfig(2, 1.0), seed=3, batch_size=8)
    whole = {
        index: image for own, images in sampler.batches(labels) for index, image in zip(own, images, strict=True)
    }
    assert sorted(whole) == list(range(20))
    assert len({image.numpy().tobytes() for image in whole.values()}) > 10
    wanted = [19, 3, 4, 11]
    ((own, images),) = sampler.batches(labels, wanted)
    assert list(own) == wanted
    assert all(torch.equal(image, whole[index]) for index, image in zip(own, images, strict=True))
    assert list(sampler.batches(labels, [])) == []


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_image_i_depends_on_the_seed_and_i_alone(tiny_model, guidance):
    """Batch sizes 1, 7 and 64, and the indices in another order, to the last bits of float32."""
    labels, options = torch.arange(70) % 10, {"steps": 5, "guidance": guidance, "precision": "fp32"}

    def images(batch_size, seed=5, indices=None):
        chosen = labels if indices is None else labels[indices]
        return sample_images(tiny_model, chosen, seed=seed, batch_size=batch_size, indices=indices, **options)

    expected = images(64)
    assert expected.shape == (70, 1, 8, 8)
    for batch_size in (1, 7):
        torch.testing.assert_close(images(batch_size), expected, atol=1e-5, rtol=0)
    order = torch.randperm(70).tolist()[:30]
    torch.testing.assert_close(images(7, indices=order), expected[order], atol=1e-5, rtol=0)
    several = [images(64, seed)[:3] for seed in (5, 6, 2**32 + 5, 2**64 + 5, 2**200, 2**200 + 1)]
    for index, one in enumerate(several):
        assert all((one - other).abs().max() > 1e-3 for other in several[:index])


def test_numbers_that_make_no_sense_are_named(tiny_model):
    labels = torch.tensor([1, 2])
    for options, named in (
        ({"seed": -1}, "seed is -1; it must not be negative"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"indices": [1]}, "1 indices were given for 2 labels"),
        ({"precision": "fp7"}, "precision is 'fp7'"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
    ):
        with pytest.raises(ValueError, match=named):
            sample_images(tiny_model, labels, **options)
    with pytest.raises(TypeError, match=r"seed is 1\.5"):
        sample_images(tiny_model, labels, seed=1.5)
    assert sample_images(tiny_model, labels[:0]).shape == (0, 1, 8, 8)
    for options in ({"steps": 1}, {"steps": 40}, {"guidance": 1.0000001}, {"temperature": 0.0}):
        assert sample_images(tiny_model, torch.tensor([3, 3]), **options).isfinite().all()


def test_images_that_are_not_finite_are_an_error(tiny_model):
    sampler = Sampler(tiny_model, lambda images: images / 0, SamplingConfig(2))
    with pytest.raises(RunError, match="decoder makes images that are not finite"):
        list(sampler.batches(torch.tensor([1, 2])))
    with torch.no_grad():
        tiny_model.backbone.mask_token[0, 0, 3] = float("nan")
    with pytest.raises(RunError, match="values that are not finite"):
        sample_images(tiny_model, torch.tensor([1, 2]))


def out_of_memory_above(most, work, calls, error):
    def limited(batch, *arguments, **options):
        calls.append(len(batch))
        if len(batch) > most:
            raise error
        return work(batch, *arguments, **options)

    return limited


OUT_OF_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: the capture of memory failed due to a previous error"),
]
OUT_OF_MEMORY[-1].__context__ = OUT_OF_MEMORY[0]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_a_batch_that_does_not_fit_is_halved(tiny_model, monkeypatch, capsys, error):
    labels, calls, released = torch.arange(20) % 10, [], []
    expected = sample_images(tiny_model, labels, seed=1, steps=2)
    monkeypatch.setattr(tiny_model, "release", lambda: released.append(1))
    whole = tiny_model.sample
    monkeypatch.setattr(tiny_model, "sample", out_of_memory_above(5, whole, calls, error))
    images = sample_images(tiny_model, labels, seed=1, steps=2, batch_size=17)
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    assert calls == [10, 5, 5, 5, 5]
    assert len(released) == 1
    assert capsys.readouterr().err == "memory does not suffice for sampling 10 images at a time; going on with 5\n"
    monkeypatch.setattr(tiny_model, "sample", out_of_memory_above(0, whole, calls, error))
    with pytest.raises(RunError, match=r"does not suffice for sampling one image at a time: .*memory") as caught:
        sample_images(tiny_model, labels, steps=2)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(tiny_model, "sample", out_of_memory_above(0, whole, calls, RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        sample_images(tiny_model, labels, steps=2)


def test_decoding_that_does_not_fit_is_halved(tiny_model, capsys):
    calls, labels = [], torch.arange(20) % 10
    decoder = out_of_memory_above(3, identity, calls, OUT_OF_MEMORY[0])
    images = [images for _, images in Sampler(tiny_model, decoder, SamplingConfig(2), batch_size=9).batches(labels)]
    expected = [
        images for _, images in Sampler(tiny_model, identity, SamplingConfig(2), batch_size=9).batches(labels)
    ]
    assert torch.equal(torch.cat(images), torch.cat(expected))
    assert calls == [7, 3, 3, 1, 3, 3, 1, 3, 3]  # batches of 7, 7 and 6
    assert capsys.readouterr().err.splitlines()[0].endswith("decoding 7 images at a time; going on with 3")


def test_the_plan_of_a_batch():
    mega = 2**20
    guided = sampling_bytes(EAR_BASE, guided=True, itemsize=2)
    # 640 rows; of the width 768: 2 streams of 4 bytes, and 2 x 3 + 4 + 2 x 4 numbers of 2; 256 tokens' modulations.
    assert guided == 640 * 768 * (8 + 18 * 2) + 256 * (2 * 20 * 1024 + 4 * (64 + 48))
    assert guided > sampling_bytes(EAR_BASE, guided=False, itemsize=2) > guided / 2
    mixture = sampling_bytes(with_score(EAR_BASE, "mixture"), guided=True, itemsize=2)
    assert guided - mixture == 256 * (2 * 20 * 1024 + 4 * 64)
    assert 1000 * mega < 64 * guided < 2500 * mega
    assert [busy_batch(model, guided=True) for model in (EAR_BASE, EAR_LARGE, EAR_HUGE)] == [64] * 3
    assert 256 < busy_batch(GLYPHS, guided=True) < busy_batch(DIGITS, guided=True) == 1024
    # 80 % of 1,000 less 100 leaves 700.
    assert batch_that_fits(1000, 100, 10, 64) == 64
    assert batch_that_fits(1000, 100, 70, 64) == 10
    assert batch_that_fits(1000, 100, 71, 64) == 9
    assert batch_that_fits(50, 100, 10, 64) == 1
    assert [even_size(20, most) for most in (8, 20, 64, 1, 19)] == [7, 20, 20, 1, 10]
    cpu = {"guided": True, "itemsize": 4, "decoding_bytes": 0, "image_size": 256}
    assert automatic_batch_size(EAR_HUGE, torch.device("cpu"), **cpu) == 16


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_a_cpu(tiny_model, tmp_path):
    """Graphs, a last batch that is filled up, and decoding on a stream of its own: at most a grey level apart."""
    labels = torch.arange(70) % 10

    def images(device, batch_size):
        model = copy.deepcopy(tiny_model).to(device)
        weights = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(1)).to(device)

        def slow(output):
            for _ in range(50 if device == "cuda" else 1):
                decoded = torch.nn.functional.conv2d(output, weights, padding=1).tanh()
            return decoded

        sampler = Sampler(model, slow, SamplingConfig(5, 2.0), 4, batch_size, "fp32")
        found = {i: image for own, part in sampler.batches(labels) for i, image in zip(own, part, strict=True)}
        return torch.stack([found[index] for index in range(70)]).int()

    expected = images("cpu", 64)
    for batch_size in (1, 7, 33, 64):
        assert (images("cuda", batch_size) - expected).abs().max() <= 1


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
        autoencoder = SimpleNamespace(config=SMALL)

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
    assert decoder.bytes_per_image == 6 * 4 * 64 * 16 * 16  # SMALL's second level has 64 channels
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
    assert Decoder(tiny_run()).bytes_per_image == 0
    with pytest.raises(ValueError, match="nowhere is not there"):
        Decoder(dataclasses.replace(latent_run, tokenizer="nowhere"))
    assert Decoder(tiny_run())(torch.ones(1, 1, 8, 8)).sum() == 64
