"""The table of docs/energy_loss.md: each user's formula, written out literally, against the energy loss.

The literal formulas are in float64 on the host; both backends must give them.
"""

import pytest
import torch

from ear_kernels import GaussianTarget, energy_loss, energy_score

pytestmark = pytest.mark.parametrize("backend", ["triton", "eager"])


@pytest.fixture(autouse=True)
def _backend(backend, monkeypatch):
    monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)


def close(actual, wanted):
    torch.testing.assert_close(actual.double().cpu(), wanted.double(), rtol=2e-5, atol=1e-6)


def data(device, *size):
    value = torch.randn(*size, dtype=torch.float64)
    return value, value.float().to(device)


@pytest.mark.parametrize(("alpha", "tau"), [(1.0, 1.0), (1.25, 0.99), (0.5, 0.7)])
def test_paper_equation_10(alpha, tau, backend, device):
    """|x1 - y|^a + |x2 - y|^a - tau |x1 - x2|^a."""
    (x64, x), (y64, y) = data(device, 6, 2, 16), data(device, 6, 16)
    wanted = torch.stack(
        [
            (x1 - t).norm() ** alpha + (x2 - t).norm() ** alpha - tau * (x1 - x2).norm() ** alpha
            for (x1, x2), t in zip(x64, y64, strict=True)
        ]
    ).mean()
    close(energy_loss(x, y, alpha=alpha, tau=tau), wanted)


def test_calm(backend, device):
    """n = 8 samples in front, m targets: 2 mean |x - y| minus the mean over the n (n - 1) ordered pairs."""
    (x64, x), (y64, y) = data(device, 8, 5, 12), data(device, 5, 7, 12)
    rows = []
    for row in range(5):
        fidelity = sum((x64[i, row] - y64[row, k]).norm() for i in range(8) for k in range(7)) / (8 * 7)
        between = sum((x64[i, row] - x64[j, row]).norm() for i in range(8) for j in range(8)) / (8 * 7)
        rows.append(2 * fidelity - between)
    close(energy_loss(x.movedim(0, -2), y), torch.stack(rows).mean())


def test_calm_with_vanishing_noise(backend, device):
    """A Gaussian target without noise is its mean."""
    (x64, x), (y64, y) = data(device, 8, 5, 12), data(device, 5, 12)
    drawn = energy_loss(x, GaussianTarget(y, torch.full_like(y, -60.0), 3), sample_dim=0)
    fidelity = (x64 - y64).norm(dim=-1).mean(dim=0)
    between = (x64[:, None] - x64[None]).norm(dim=-1).sum(dim=(0, 1)) / (8 * 7)
    close(drawn, (2 * fidelity - between).mean())


@pytest.mark.parametrize("n", [2, 5, 16])
def test_fair_crps(n, backend, device):
    """E|x - y| - 1/(2 n (n - 1)) sum |x_i - x_j| is half the loss with D = 1."""
    (x64, x), (y64, y) = data(device, 9, n), data(device, 9)
    wanted = (x64 - y64[:, None]).abs().mean(1)
    wanted = wanted - (x64[:, :, None] - x64[:, None]).abs().sum(dim=(1, 2)) / (2 * n * (n - 1))
    close(0.5 * energy_loss(x[..., None], y[..., None], reduction="none"), wanted)
    close(energy_score(x[..., None], y[..., None], reduction="none"), wanted)


def test_biased_crps(backend, device):
    """The "nrg" estimator divides by 2 n^2: tau = (n - 1) / n. Also by its quantile form, sorted ensembles."""
    n = 7
    (x64, x), (y64, y) = data(device, 9, n), data(device, 9)
    wanted = (x64 - y64[:, None]).abs().mean(1)
    wanted = wanted - (x64[:, :, None] - x64[:, None]).abs().sum(dim=(1, 2)) / (2 * n * n)
    close(0.5 * energy_loss(x[..., None], y[..., None], tau=(n - 1) / n, reduction="none"), wanted)
    close(energy_score(x[..., None], y[..., None], fair=False, reduction="none"), wanted)
    ranks = torch.arange(1, n + 1)
    quantile = (2 / n**2) * (
        (x64.sort(1).values - y64[:, None]) * (n * (y64[:, None] < x64.sort(1).values) - ranks + 0.5)
    ).sum(1)
    close(wanted, quantile)


@pytest.mark.parametrize("almost", [0.95, 1.0])
def test_almost_fair_crps(almost, backend, device):
    """AIFS-CRPS: 1/(2 n (n-1)) sum_{j != k} (|x_j - y| + |x_k - y| - (1 - eps) |x_j - x_k|), eps = (1 - a) / n."""
    n = 4
    (x64, x), (y64, y) = data(device, 9, n), data(device, 9)
    eps = (1 - almost) / n
    wanted = sum(
        (x64[:, j] - y64).abs() + (x64[:, k] - y64).abs() - (1 - eps) * (x64[:, j] - x64[:, k]).abs()
        for j in range(n)
        for k in range(n)
        if j != k
    ) / (2 * n * (n - 1))
    close(0.5 * energy_loss(x[..., None], y[..., None], tau=1 - (1 - almost) / n, reduction="none"), wanted)


def test_scoringrules_energy_score(backend, device):
    """es_ensemble(obs, fct): mean |x - y| - 1/(2 M^2) sum |x_i - x_j|; its fair form divides by M (M - 1)."""
    (x64, x), (y64, y) = data(device, 3, 4, 6, 5), data(device, 3, 4, 5)
    first = (x64 - y64[..., None, :]).norm(dim=-1).mean(-1)
    pairs = (x64[..., :, None, :] - x64[..., None, :, :]).norm(dim=-1).sum(dim=(-1, -2))
    close(energy_score(x, y, fair=False, reduction="none"), first - pairs / (2 * 36))
    close(energy_score(x, y, fair=True, reduction="none"), first - pairs / (2 * 30))


@pytest.mark.parametrize("ensemble_term_weight", [0.5, 0.3])
def test_neural_gcm(ensemble_term_weight, backend, device):
    """n = 2: mean |x - y| - w |x1 - x2|, so tau = 2 w and half the loss."""
    (x64, x), (y64, y) = data(device, 9, 2), data(device, 9)
    wanted = (x64 - y64[:, None]).abs().mean(1) - ensemble_term_weight * (x64[:, 0] - x64[:, 1]).abs()
    tau = 2 * ensemble_term_weight
    close(0.5 * energy_loss(x[..., None], y[..., None], tau=tau, reduction="none"), wanted)


def test_weighted_field(backend, device):
    """One row a field: |v|^2 = sum_d w_d v_d^2 with latitude weights."""
    (x64, x), (y64, y) = data(device, 2, 4, 300), data(device, 2, 300)
    latitude = torch.linspace(-1.5, 1.5, 300, dtype=torch.float64).cos()
    weights = latitude / latitude.sum()
    norm = lambda v: (weights * v.square()).sum(-1).sqrt()  # noqa: E731
    fidelity = norm(x64 - y64[:, None]).mean(1)
    between = norm(x64[:, :, None] - x64[:, None]).sum(dim=(1, 2)) / (4 * 3)
    close(energy_loss(x, y, feature_weights=weights.float().to(device), reduction="none"), 2 * fidelity - between)
