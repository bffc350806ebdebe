"""Targets drawn inside the kernel: same numbers as a reference on the same draws, and the right distribution."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ear_kernels import GaussianTarget, energy_loss
from ear_kernels.ops.energy_loss import reference
from ear_kernels.testing import assert_close_to_eager
from tests.kernels.conftest import HAS_GPU

gpu_only = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _backend(triton_backend):
    pass


def by_reference(tensors, normals, mask, weights, fw, options, dtype):
    x, mean, log_std = (t.detach().to(dtype).requires_grad_() for t in tensors)
    y = mean.unsqueeze(-2) + log_std.exp().unsqueeze(-2) * normals.to(dtype)
    weights, fw = (None if t is None else t.to(dtype) for t in (weights, fw))
    loss = reference.energy_loss(x, y, mask, weights, fw, **options)
    loss.sum().backward()
    return loss.detach(), x.grad, mean.grad, log_std.grad


STRUCTURES = [
    # rows, n, m, features, alpha, eps, reduction, masked, weighted, feature weights
    # On the interpreter, which takes a tenth of a second a target, CALM's 100 targets are 9.
    ((6,), 8, 100 if HAS_GPU else 9, 128, 1.0, 0.0, "mean", False, False, False),
    ((2, 3), 8, 6, 128, 1.0, 0.0, "mean", True, True, False),
    ((5,), 2, 3, 16, 1.0, 0.0, "sum", True, False, False),
    ((7,), 3, 4, 1, 1.0, 0.0, "none", True, True, False),
    ((4,), 5, 9, 20, 1.3, 0.0, "mean", True, False, True),
    ((4,), 4, 2, 3, 0.5, 0.1, "none", False, True, False),
    ((3,), 2, 5, 10, 2.0, 0.0, "mean", False, False, True),
    ((2,), 3, 5, 3000, 1.0, 0.0, "mean", False, False, False),
]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.float64, pytest.param(torch.bfloat16, marks=gpu_only)]
)
def test_same_draws_as_the_reference(dtype, device):
    from ear_kernels.ops.energy_loss import autograd, launch_gaussian
    from ear_kernels.ops.energy_loss.launch import Options

    @given(st.sampled_from(STRUCTURES), st.integers(0, 2**62), st.booleans())
    def run(structure, number, first_axis):
        rows, n, m, features, alpha, eps, reduction, masked, weighted, weighted_features = structure
        g = torch.Generator().manual_seed(number % 2**32)
        x = torch.randn(*rows, n, features, generator=g).to(dtype).to(device)
        if first_axis:
            x = x.movedim(-2, 0).contiguous().movedim(0, -2)
        mean = torch.randn(*rows, features, generator=g).to(dtype).to(device)
        log_std = (torch.randn(*rows, features, generator=g) * 0.5).to(dtype).to(device)
        mask = (torch.rand(rows, generator=g) < 0.6).to(device) if masked else None
        weights = torch.rand(rows, generator=g).to(device) if weighted else None
        fw = (torch.rand(features, generator=g) + 0.1).to(device) if weighted_features else None
        if masked:
            x[~mask], mean[~mask], log_std[~mask] = float("nan"), float("inf"), float("nan")
        seed = torch.tensor([number], device=device)
        options = {"alpha": alpha, "tau": 0.9, "eps": eps, "reduction": reduction}
        given_ = [t.detach().requires_grad_() for t in (x, mean, log_std)]
        loss = autograd.energy_loss_gaussian(*given_, m, mask, weights, fw, Options(**options), seed=seed)
        loss.sum().backward()
        ours = (loss.detach(), *(t.grad for t in given_))

        working = reference.working_dtype(x)
        row_count = torch.Size(rows).numel()
        normals = launch_gaussian.gaussian_normals(seed, row_count, m, features, working).view(*rows, m, features)
        if masked:
            x, mean, log_std = (
                torch.where(mask[(...,) + (None,) * k], t, 0.0) for t, k in ((x, 2), (mean, 1), (log_std, 1))
            )
        exact = by_reference((x, mean, log_std), normals, mask, weights, fw, options, torch.float64)
        eager = by_reference((x, mean, log_std), normals, mask, weights, fw, options, working)
        eager = (eager[0], *(t.to(dtype) for t in eager[1:]))
        # The terms of the loss and those of the gradient of log_std, signed draws, are larger than their sum.
        draws = log_std.double().exp().unsqueeze(-2) * normals.double()
        scales = {"loss": 4 * exact[0].abs().max().item(), "log_std": None}
        if alpha == 1.0 and reduction == "none":
            scales["log_std"] = 2 * draws.abs().max().item()
        for name, a, b, c in zip(("loss", "samples", "mean", "log_std"), ours, eager, exact, strict=True):
            assert_close_to_eager(name, a, b, c, scales.get(name) or 0.0)

    run()


def test_draws_are_standard_normal_and_independent(device):
    """Moments, tails, and no correlation between targets, features and rows."""
    from ear_kernels.ops.energy_loss import launch_gaussian

    seed = torch.tensor([1234567890123], device=device)
    z = launch_gaussian.gaussian_normals(seed, 40, 64, 100, torch.float32).double()  # 256,000 numbers
    count = z.numel()
    for power, wanted, variance in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        error = (z**power).mean().item() - wanted
        assert abs(error) < 5 * (variance / count) ** 0.5, (power, error)
    ordered = z.flatten().sort().values
    uniform = torch.special.ndtr(ordered)
    steps = (torch.arange(count, device=device) + 0.5) / count
    assert (uniform - steps).abs().max().item() < 2.0 / count**0.5  # Kolmogorov and Smirnov, p about 1e-3
    for dim in range(3):
        for lag in (1, 2, 4):
            a, b = z.narrow(dim, 0, z.shape[dim] - lag), z.narrow(dim, lag, z.shape[dim] - lag)
            assert abs((a * b).mean().item()) < 5 / a.numel() ** 0.5, (dim, lag)
            assert abs((a**2 * b**2).mean().item() - 1) < 5 * (8 / a.numel()) ** 0.5 + 0.01, (dim, lag)


def test_seeds_give_different_draws_and_follow_the_generator(device):
    samples = torch.randn(4, 3, 8, device=device)
    target = GaussianTarget(torch.zeros(4, 8, device=device), torch.zeros(4, 8, device=device), 5)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append((energy_loss(samples, target), energy_loss(samples, target)))
    assert torch.equal(losses[0][0], losses[1][0])
    assert torch.equal(losses[0][1], losses[1][1])
    assert not torch.equal(losses[0][0], losses[0][1])
    assert not torch.equal(losses[0][0], losses[2][0])


def test_both_backends_estimate_the_same_loss(device):
    """Their draws differ; the difference of their means has a standard deviation of 0.006 here."""
    samples = torch.randn(200, 2, 4, device=device)
    mean, log_std = torch.randn(200, 4, device=device), 0.3 * torch.randn(4, device=device)
    losses = []
    for backend in ("triton", "eager"):
        os.environ["EAR_KERNELS_BACKEND"] = backend
        losses.append(energy_loss(samples, GaussianTarget(mean, log_std, 1024)).item())
    assert abs(losses[0] - losses[1]) < 0.03


def test_expanded_parameters_and_sample_first_layout(device):
    samples = torch.randn(8, 6, 16, device=device, requires_grad=True)
    mean = torch.randn(16, device=device, requires_grad=True)
    loss = energy_loss(samples, GaussianTarget(mean.expand(6, 16), torch.zeros(16, device=device), 3), sample_dim=0)
    loss.backward()
    assert samples.grad.stride() == samples.stride()
    assert mean.grad.shape == mean.shape
    assert mean.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("mean", "log_std", "num_targets", "error"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 4), 0, ValueError),
        (torch.zeros(3, 4), torch.zeros(3, 4), 1.0, TypeError),
        (torch.zeros(3, 4), torch.zeros(2, 4), 1, ValueError),
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4), 1, TypeError),
        ([0.0], torch.zeros(3, 4), 1, TypeError),
    ],
)
def test_refused_targets(mean, log_std, num_targets, error):
    with pytest.raises(error):
        GaussianTarget(mean, log_std, num_targets)


def test_refused_rows(device):
    with pytest.raises(ValueError, match=r"target\.mean"):
        energy_loss(torch.randn(4, 2, 8), GaussianTarget(torch.zeros(3, 8), torch.zeros(8), 2))


@gpu_only
@pytest.mark.slow
def test_memory_of_the_calm_case(device):
    samples = torch.randn(8, 8192, 128, device=device, requires_grad=True)
    mean, log_std = torch.randn(8192, 128, device=device), torch.zeros(8192, 128, device=device)
    energy_loss(samples, GaussianTarget(mean, log_std, 100), sample_dim=0).backward()
    samples.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    energy_loss(samples, GaussianTarget(mean, log_std, 100), sample_dim=0).backward()
    assert HAS_GPU
    assert torch.cuda.max_memory_allocated() - before < 0.05e9
