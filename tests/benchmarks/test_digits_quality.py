"""The digits benchmark at two steps: scores, variances and the summary."""

import json
from dataclasses import replace

import torch

from benchmarks import digits_quality
from ear_model.presets import RUNS


def test_a_run_is_scored_and_its_noise_measured(monkeypatch):
    monkeypatch.setattr(digits_quality, "DRAWS", 3)
    monkeypatch.setattr(digits_quality, "ROWS", 1024)
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "eager")
    digits = RUNS["digits"]
    short = replace(digits, train=replace(digits.train, steps=2), sampling=replace(digits.sampling, steps=2))
    threads = torch.get_num_threads()
    first = digits_quality.train(short, "auto", 1, 0, num=20)
    shared = digits_quality.train(short, "auto", 4, 0, num=20)
    torch.set_num_threads(threads)
    assert first["gradient_variance"][1] == 1
    assert all(0 < value < float("inf") for value in first["gradient_variance"].values())
    assert "gradient_variance" not in shared
    text = digits_quality.summary(json.loads(json.dumps([first, shared])))
    assert text.count("guidance 1, temperature 1: consistency 0.") == 2
    assert "R/K= 4 guidance 2, temperature 0.7" in text
