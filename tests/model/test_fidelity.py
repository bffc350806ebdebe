"""FID and Inception Score with an extractor that stands in for Inception, whose weights need a network."""

import builtins
import json
import sys
import types

import numpy as np
import pytest
import torch

from ear_model import cli
from ear_model.config import SamplingConfig
from ear_model.ear import EAR
from ear_model.evaluation.fidelity import evaluate_fidelity, inception_score, load_statistics, report_fidelity
from ear_model.evaluation.judged import feature_statistics, frechet_distance
from ear_model.evaluation.precision_recall import precision_recall
from ear_model.run_dir import save_config
from ear_model.sampling.decoder import Decoder
from ear_model.sampling.images import Sampler, class_labels
from ear_model.training import checkpoint
from tests.model.conftest import tiny_run, write_tree


def fake_extractor(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Six features and five logits of uint8 RGB images."""
    assert images.dtype == torch.uint8
    assert images.shape[1] == 3
    scaled = images.float() / 255
    features = torch.stack([scaled[:, 0, index, index] for index in range(6)], dim=1)
    return features, features[:, :5] * 8


@pytest.fixture
def statistics_file(tmp_path):
    path = tmp_path / "statistics.npz"
    np.savez(path, mu=np.full(6, 0.4), sigma=np.diag(np.linspace(0.01, 0.1, 6)))
    return path


@pytest.fixture
def fake_fidelity(monkeypatch):
    """A torch_fidelity that is installed, with the fake in Inception's place."""
    asked = {}

    def create_feature_extractor(name, list_features, cuda=True, **options):
        asked.update(name=name, list_features=list_features, cuda=cuda)
        return fake_extractor

    package, utils = types.ModuleType("torch_fidelity"), types.ModuleType("torch_fidelity.utils")
    utils.create_feature_extractor = create_feature_extractor
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.utils", utils)
    return asked


def test_inception_score_is_its_definition():
    logits = torch.randn(83, 7, dtype=torch.float64)
    order = np.random.RandomState(2020).permutation(83)
    scores = []
    for split in range(10):
        part = logits[order][split * 83 // 10 : (split + 1) * 83 // 10].softmax(dim=1).numpy()
        scores.append(np.exp(np.mean([np.sum(p * np.log(p / part.mean(axis=0))) for p in part])))
    assert inception_score(logits) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)
    certain = torch.eye(4).repeat(50, 1) * 1000  # four sure, equally frequent classes
    assert inception_score(certain, splits=1)[0] == pytest.approx(4)
    assert inception_score(torch.zeros(20, 4))[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="at least that many"):
        inception_score(logits[:9])


def test_batches_do_not_matter(statistics_file):
    images = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8)
    statistics = load_statistics(statistics_file)
    setting = SamplingConfig(2, 1.0, "linear", 1.0)
    whole = evaluate_fidelity([images], fake_extractor, statistics, setting, where="here")
    parts = evaluate_fidelity(images.split(7), fake_extractor, statistics, setting, where="here")
    assert whole == parts
    expected = frechet_distance(*feature_statistics(fake_extractor(images)[0]), *statistics)
    assert whole.fid == pytest.approx(expected)
    with pytest.raises(ValueError, match="has 3 features; the extractor gives 6"):
        evaluate_fidelity([images], fake_extractor, (np.zeros(3), np.eye(3)), setting, where="here")


def test_precision_and_recall_of_real_images(statistics_file):
    images, real = (torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8) for count in (50, 30))
    setting, statistics = SamplingConfig(2, 1.0, "linear", 1.0), load_statistics(statistics_file)
    found = evaluate_fidelity([images], fake_extractor, statistics, setting, where="here", real=real.split(9))
    assert (found.precision, found.recall) == precision_recall(fake_extractor(images)[0], fake_extractor(real)[0])
    assert f"precision {found.precision:.3f}, recall {found.recall:.3f}" in report_fidelity([found])
    without = evaluate_fidelity([images], fake_extractor, statistics, setting, where="here")
    assert (without.precision, without.recall) == (None, None)
    assert "precision" not in report_fidelity([without])


def test_the_command_with_real_images(fake_fidelity, statistics_file, tiny_model, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    save_config(run, tiny_run())
    checkpoint.save_checkpoint(run, 1, tiny_model, dict(tiny_model.named_parameters()), {})
    write_tree(tmp_path / "tree", {"cat": 12, "dog": 12}, size=16)
    options = ["--fidelity", str(statistics_file), "--num", "20", "--device", "cpu", "--real"]
    assert cli.main(["evaluate", str(run), *options, str(tmp_path / "tree")]) == 0
    scores = json.loads((run / "evaluation.json").read_text())["fidelity"]
    assert 0 <= scores["precision"] <= 1
    assert 0 <= scores["recall"] <= 1
    write_tree(tmp_path / "few", {"cat": 3}, size=16)
    assert cli.main(["evaluate", str(run), *options, str(tmp_path / "few")]) == 1
    assert "has 3 images; precision and recall need at least 4" in capsys.readouterr().err


def test_the_command(fake_fidelity, statistics_file, tiny_model, tmp_path, capsys):
    run = tmp_path / "run"
    config = tiny_run()
    run.mkdir()
    save_config(run, config)
    checkpoint.save_checkpoint(run, 1, tiny_model, dict(tiny_model.named_parameters()), {})
    options = ["--fidelity", str(statistics_file), "--num", "40", "--batch-size", "16", "--device", "cpu"]
    assert cli.main(["evaluate", str(run), *options]) == 0
    assert "Inception Score" in capsys.readouterr().out
    assert fake_fidelity == {
        "name": "inception-v3-compat",
        "list_features": ["2048", "logits_unbiased"],
        "cuda": False,
    }
    scores = json.loads((run / "evaluation.json").read_text())["fidelity"]
    sampling = config.sampling
    assert (scores["guidance"], scores["temperature"]) == (sampling.guidance, sampling.temperature)
    sampler = Sampler(EAR.from_pretrained(run), Decoder(config), sampling, batch_size=16)
    batches = sampler.batches(class_labels(range(10), 40, 10))
    samples = torch.cat([images for _, images in batches])
    features = fake_extractor(samples)[0]
    expected = frechet_distance(*feature_statistics(features), *load_statistics(statistics_file))
    assert scores["fid"] == pytest.approx(expected, rel=1e-6)
    assert scores["num_samples"] == 40


def test_what_is_missing_is_named_before_sampling(statistics_file, tiny_model, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    save_config(run, tiny_run())
    real_import = builtins.__import__

    def without_fidelity(name, *arguments, **options):
        if name.startswith("torch_fidelity"):
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without_fidelity)
    other, text = tmp_path / "other.npz", tmp_path / "text.npz"
    np.savez(other, mu=np.zeros(3), sigma=np.eye(4))
    text.write_text("no archive")
    cases = [
        (statistics_file, "torch-fidelity, which is not installed; pip install"),
        (other, "mu has shape (3,) and sigma (4, 4)"),
        (text, "is no statistics file"),
        (tmp_path / "nowhere.npz", "is not there"),
    ]
    for path, named in cases:
        assert cli.main(["evaluate", str(run), "--fidelity", str(path)]) == 1
        captured = capsys.readouterr()
        assert named in captured.err
        assert captured.err.count("\n") == 1
