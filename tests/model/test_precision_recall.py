"""Precision and recall: by brute force, torch-fidelity's, and where the answer is known."""

import pytest
import torch

from ear_model.evaluation import precision_recall as module
from ear_model.evaluation.precision_recall import precision_recall


def brute_force(points, others, k):
    """The share of points in a ball of some other: its radius reaches its k-th neighbour."""
    share = 0
    for point in points:
        inside = False
        for other in others:
            radius = sorted(float((other - each).norm()) for each in others)[k]
            inside |= float((point - other).norm()) <= radius
        share += inside
    return share / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_brute_force(k, monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 5)
    samples, real = torch.randn(13, 4).double(), 1.3 * torch.randn(17, 4).double()
    expected = brute_force(samples, real, k), brute_force(real, samples, k)
    assert precision_recall(samples, real, k) == pytest.approx(expected)


def test_torch_fidelitys():
    metric_prc = pytest.importorskip("torch_fidelity.metric_prc")
    samples, real = torch.randn(300, 8), 1.2 * torch.randn(200, 8) + 0.3
    expected = metric_prc.calculate_precision_recall_full(samples, real)
    assert precision_recall(samples, real) == pytest.approx(expected, abs=1e-6)


def test_known_answers():
    real = torch.randn(200, 6)
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real + 100, real) == (0, 0)
    # Samples of a narrow part of what is real: precise, and little recalled.
    narrow = precision_recall(0.1 * torch.randn(200, 6), real)
    assert narrow[0] > 0.95
    assert narrow[1] < 0.2
    # The reverse: all is recalled and most of it is not real.
    wide = precision_recall(5 * torch.randn(2000, 6), real)
    assert wide[0] < 0.2
    assert wide[1] > 0.6
    same = torch.zeros(9, 3)
    assert precision_recall(same, same) == (1, 1)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="a set has 3 points; 3 neighbours need at least 4"):
        precision_recall(torch.randn(9, 2), torch.randn(3, 2))
    with pytest.raises(ValueError, match=r"real \(9, 3\)"):
        precision_recall(torch.randn(9, 2), torch.randn(9, 3))
