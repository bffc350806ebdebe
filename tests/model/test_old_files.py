"""Files that the code of commit 95433da wrote (fixtures_95433da/make.py): each loads, and its runs go on."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ear_model import cli
from ear_model.data.cache import load_cache
from ear_model.ear import EAR
from ear_model.evaluation.judge import Judge
from ear_model.model.weights import load_weights
from ear_model.run_dir import checkpoint_steps, latest_checkpoint, load_config
from ear_model.sampling.decoder import Decoder
from ear_model.tokenizers.latent import load_latent_tokenizer
from ear_model.training.checkpoint import load_checkpoint
from ear_model.training.trainer import Trainer

FIXTURES = Path(__file__).with_name("fixtures_95433da")
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())
RUNS = ["digits", "latents"]


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A copy to write to, and the working directory: the runs name their cache and tokenizer relative to it."""
    shutil.copytree(FIXTURES, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


def sampled(run: Path) -> torch.Tensor:
    model = EAR.from_pretrained(run)
    generator = torch.Generator().manual_seed(1)
    return model.sample(torch.arange(3), steps=4, guidance=1.5, temperature=0.7, generator=generator)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_where_it_stopped(files, name) -> None:
    trainer = Trainer(load_config(files / name), files / name, resume=True, device="cpu")
    assert trainer.step == 3
    loss, norm = trainer.train_step()
    assert float(loss) == pytest.approx(EXPECTED[name]["loss"], rel=1e-4)
    assert torch.isfinite(norm)
    trainer.stop_reading()
    trainer.save()
    assert checkpoint_steps(files / name) == [4]
    assert load_checkpoint(files / name).trainer_state["step"] == 4


@pytest.mark.parametrize("name", RUNS)
def test_weights_sample_the_same_images(files, name) -> None:
    images = sampled(files / name)
    torch.testing.assert_close(images.flatten(), torch.tensor(EXPECTED[name]["samples"]), rtol=1e-3, atol=1e-4)
    side = {"digits": 8, "latents": 16}[name]
    assert Decoder(load_config(files / name))(images).shape[2:] == (side, side)


def test_the_cache_and_its_tokenizer_belong_together(files) -> None:
    cache = load_cache(files / "cache", tokenizer=files / "tokenizer.safetensors")
    assert (len(cache), cache.classes, cache.image_shape) == (12, ("a", "b", "c"), (2, 8, 8))
    latents, labels = cache.gather(torch.tensor([0, 11, 5]), torch.Generator().manual_seed(0))
    assert labels.tolist() == [0, 2, 1]
    tokenizer = load_latent_tokenizer(files / "tokenizer.safetensors")
    assert tokenizer.latent_scale == cache.manifest.latent_scale == 0.7
    assert tokenizer.decode(latents).shape == (3, 3, 16, 16)


def test_a_converted_checkpoint_comes_back(files) -> None:
    assert cli.main(["convert", "public.pth", "--out", "back"]) == 0
    for name in ("model.safetensors", "ema.safetensors"):
        stored, whole = (load_weights(latest_checkpoint(files / run) / name) for run in ("back", "digits"))
        assert stored[0] == whole[0]
        assert all(torch.equal(tensor, whole[1][key]) for key, tensor in stored[1].items())
    assert Trainer(load_config(files / "back"), files / "back", resume=True, device="cpu").step == 3


def test_the_judge_classifies(files) -> None:
    judge = Judge.load(files / "judge.safetensors")
    assert (judge.class_names, judge.image_size) == (("a", "b", "c"), 16)
    features, _ = judge.classify(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert features.shape == (2, 2)


def test_directories_of_images_are_known(files, capsys) -> None:
    """Glyphs to be whole, samples to be drawn in another way: they are not mixed with others."""
    sample = ["sample", "digits", "--num", "3", "--classes", "3", "7", "--images-out", "samples", "--device", "cpu"]
    before = {path: path.read_bytes() for path in sorted((files / "samples").rglob("*.*"))}
    assert cli.main(sample) == 1
    assert "samples holds another set of sampled images (batch_size is 64 there" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in sorted((files / "samples").rglob("*.*"))} == before
    assert cli.main(["glyphs", "--out", "glyphs", "--num-per-class", "1", "--classes", "2", "--size", "16"]) == 0
    assert "2 classes, 0 drawn now" in capsys.readouterr().out
