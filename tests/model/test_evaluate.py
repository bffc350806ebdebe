"""The scores of digits against brute force and against real digits, for which the answers are known."""

import json

import numpy as np
import pytest
import torch

from ear_model.config import SamplingConfig
from ear_model.data.digits import load_digits
from ear_model.evaluation import digits as evaluate


def test_energy_distance_is_the_u_statistic():
    a, b = torch.randn(7, 3).double(), torch.randn(5, 3).double()
    between = np.mean([np.linalg.norm(x - y) for x in a.numpy() for y in b.numpy()])

    def within(points):
        points = points.numpy()
        pairs = [np.linalg.norm(p - q) for i, p in enumerate(points) for j, q in enumerate(points) if i != j]
        return np.mean(pairs)

    assert evaluate.energy_distance(a, b).item() == pytest.approx(2 * between - within(a) - within(b), rel=1e-9)


def test_real_digits_score_as_real_digits():
    train, held_out = load_digits()
    setting = SamplingConfig(16, 1.0, "linear", 1.0)
    scores = evaluate.evaluate_samples(held_out.images, held_out.labels, train, held_out, setting)
    assert scores.classifier_test_accuracy == scores.class_consistency > 0.98
    assert abs(scores.energy_distance_floor) < 0.05
    assert scores.nearest_train_samples == scores.nearest_train_held_out > 10
    assert scores.share_below_closest_held_out < 0.02

    wrong = evaluate.evaluate_samples(held_out.images, held_out.labels.roll(1), train, held_out, setting)
    assert wrong.class_consistency < 0.3
    copies = evaluate.evaluate_samples(train.images, train.labels, train, held_out, setting)
    assert copies.nearest_train_samples == 0
    assert copies.share_below_closest_held_out == 1
    noise = evaluate.evaluate_samples(torch.rand_like(held_out.images), held_out.labels, train, held_out, setting)
    assert noise.energy_distance > 5


def test_evaluation_file(tmp_path, tiny_model):
    tiny_config_settings = [SamplingConfig(2, 1.0, "linear", 1.0), SamplingConfig(2, 2.0, "linear", 0.7)]
    results = evaluate.evaluate_digits(tiny_model, tiny_config_settings, num=30)
    evaluate.save_evaluation(tmp_path, results)
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert {"class_consistency", "energy_distance", "energy_distance_floor"} <= content.keys()
    assert (content["guidance"], content["temperature"], content["num_samples"]) == (1.0, 1.0, 30)
    assert content["other_settings"][0]["guidance"] == 2.0
    assert "SVC accuracy" in evaluate.report(results)
