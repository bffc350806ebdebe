"""Energy distance and energy score against literal formulas."""

import pytest
import torch

from ear_kernels import energy_distance, energy_score
from tests.kernels.conftest import HAS_GPU

BACKENDS = ["triton", "eager"]


def literal(x, y, alpha):
    x, y = x.double().cpu(), y.double().cpu()

    def mean(a, b, same):
        d = (a[:, None] - b[None]).square().sum(-1).sqrt() ** alpha
        return (d.sum() - d.diagonal().sum()) / (len(a) * (len(a) - 1)) if same else d.mean()

    return 2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [1.0, 2.0, 0.7])
@pytest.mark.parametrize(("m", "n", "features"), [(2, 2, 1), (150, 70, 3), (131, 200, 16), (70, 140, 40)])
def test_against_the_formula(m, n, features, alpha, backend, device, monkeypatch):
    monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
    x, y = torch.randn(m, features, device=device), 1.2 * torch.randn(n, features, device=device) + 0.1
    wanted = literal(x, y, alpha)
    scale = literal(x, y + 100, alpha) / 200 + 1
    assert abs(energy_distance(x, y, alpha).item() - wanted.item()) < 2e-6 * scale * features**0.5


@pytest.mark.parametrize("magnitude", [1e25, 1e-25, 1.0])
def test_points_far_from_the_origin_duplicates_and_extremes(magnitude, device, monkeypatch):
    """Where the product form would cancel: clusters, equal points, a common offset."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    base = torch.randn(5, 32, device=device)
    x = (base.repeat(30, 1) + 1e-3 * torch.randn(150, 32, device=device) + 3) * magnitude
    y = (base.repeat(20, 1) + 1e-3 * torch.randn(100, 32, device=device) + 3) * magnitude
    y[:10] = x[:10]
    wanted = literal(x, y, 1.0).item()
    assert abs(energy_distance(x, y).item() - wanted) < 3e-6 * magnitude


def test_float64(device, monkeypatch):
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    x, y = (torch.randn(40, 20, device=device, dtype=torch.float64) for _ in range(2))
    assert abs(energy_distance(x, y).item() - literal(x, y, 1.0).item()) < 1e-13


def test_equal_distributions_are_zero_in_the_mean(device):
    values = torch.stack([energy_distance(torch.randn(60, 4), torch.randn(50, 4)) for _ in range(60)])
    assert abs(values.mean()) < 4 * values.std() / 60**0.5


def test_refusals():
    with pytest.raises(ValueError, match="N >= 2"):
        energy_distance(torch.randn(1, 3), torch.randn(4, 3))
    with pytest.raises(ValueError, match="features"):
        energy_distance(torch.randn(4, 2), torch.randn(4, 3))
    with pytest.raises(TypeError, match="floating"):
        energy_distance(torch.ones(4, 2, dtype=torch.int64), torch.randn(4, 2))


@pytest.mark.parametrize("fair", [True, False])
def test_energy_score(fair, device):
    x, y = torch.randn(6, 5, 3, device=device), torch.randn(6, 3, device=device)
    pairs = (x[:, :, None] - x[:, None]).norm(dim=-1).sum(dim=(1, 2)) / (5 * 4 if fair else 25)
    wanted = ((x - y[:, None]).norm(dim=-1).mean(dim=1) - 0.5 * pairs).mean()
    torch.testing.assert_close(energy_score(x, y, fair=fair), wanted)


@pytest.mark.gpu
@pytest.mark.slow
def test_large_sets_and_memory(device, monkeypatch):
    """50,000 points each: 0.1 GB, and the result of float64 cdist."""
    assert HAS_GPU
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    x, y = torch.randn(50_000, 64, device=device), torch.randn(50_000, 64, device=device) * 1.02
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ours = energy_distance(x, y)
    assert torch.cuda.max_memory_allocated() - before < 0.1e9
    total = [
        sum(torch.cdist(a[i : i + 1000].double(), b.double()).sum() for i in range(0, 50_000, 1000))
        for a, b in ((x, y), (x, x), (y, y))
    ]
    wanted = 2 * total[0] / 50_000**2 - (total[1] + total[2]) / (50_000 * 49_999)
    assert abs(ours - wanted) < 2e-6 * 12
