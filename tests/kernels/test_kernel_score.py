"""The kernel score: both backends against a double loop, float64 and finite differences; extremes and refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from ear_kernels import GaussianTarget, kernel_score_loss
from ear_kernels.ops.energy_loss import reference
from ear_kernels.testing import assert_close_to_eager
from tests.kernels.conftest import EXAMPLES, HAS_GPU
from tests.kernels.problems import Problem
from tests.kernels.strategies import gpu_problems, problems
from tests.kernels.test_energy_loss_triton import DTYPES, evaluate
from tests.strategies import EnergyLossCase, energy_loss_cases

PROBLEMS = gpu_problems if HAS_GPU else problems
KERNELS = ("gaussian", "laplace")
LITERAL = {"gaussian": lambda r, h: math.exp(-r * r / (2 * h * h)), "laplace": lambda r, h: math.exp(-r / h)}

pytestmark = pytest.mark.parametrize("kernel", KERNELS)


@pytest.fixture
def backends(monkeypatch):
    """Calls a function under each backend."""

    def both(function) -> list:
        results = []
        for backend in ("eager", "triton"):
            monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
            results.append(function())
        return results

    return both


def literal(case: EnergyLossCase, kernel: str, bandwidth: float) -> Tensor:
    """The row losses, a pair at a time, from the formula; 0 for masked rows."""
    rows = case.samples.shape[:-2]
    n, features = case.samples.shape[-2:]
    weights = torch.ones(features).double() if case.feature_weights is None else case.feature_weights

    def k(a: Tensor, b: Tensor) -> float:
        return LITERAL[kernel](math.sqrt((weights * (a - b) ** 2).sum().item()), bandwidth)

    losses = []
    flat = case.samples.reshape(-1, n, features), case.target.reshape(-1, case.target.shape[-2], features)
    mask = torch.ones(rows) if case.mask is None else case.mask.expand(rows)
    for x, y, keep in zip(*flat, mask.reshape(-1).tolist(), strict=True):
        between = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        to_target = sum(k(a, b) for a in x for b in y) / (n * len(y))
        losses.append(between - 2 * to_target if keep else 0.0)
    return torch.tensor(losses, dtype=torch.float64).reshape(rows)


@settings(max_examples=15, deadline=None)
@given(energy_loss_cases())
def test_values_match_the_double_loop(kernel, case):
    rows = literal(case, kernel, 1.7)
    weights = torch.ones(rows.shape).double() if case.weights is None else case.weights.expand(rows.shape)
    if case.mask is not None:
        weights = torch.where(case.mask.expand(rows.shape), weights, 0.0)
    total, weight = (rows * weights).sum(), weights.sum()
    wanted = {"none": rows * weights, "sum": total, "mean": total / weight if weight > 0 else total}
    for reduction, value in wanted.items():
        loss = kernel_score_loss(
            case.samples, case.target, case.mask, weights=case.weights, feature_weights=case.feature_weights,
            kernel=kernel, bandwidth=1.7, reduction=reduction,
        )  # fmt: skip
        torch.testing.assert_close(loss, value, rtol=1e-11, atol=1e-12)


def test_derivatives_match_finite_differences(kernel):
    inputs = tuple(torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def loss(x, y):
        return kernel_score_loss(x, y, kernel=kernel, bandwidth=1.3)

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def check(problem: Problem, kernel: str, bandwidth: float, dtype: torch.dtype, device) -> None:
    """The kernels are about as close to float64 as eager in the same dtype is; ``bandwidth`` in units of the data."""
    arguments = problem.build(dtype, device)
    options = {
        "kernel": kernel, "bandwidth": bandwidth * problem.magnitude * math.sqrt(problem.features),
        "reduction": problem.reduction, "sample_dim": problem.sample_dim,
    }  # fmt: skip
    given_ = arguments, options
    exact = evaluate("eager", *given_, upcast=True, operation=kernel_score_loss)
    eager = evaluate("eager", *given_, operation=kernel_score_loss)
    ours = evaluate("triton", *given_, operation=kernel_score_loss)
    # The two terms of a row may cancel; together they are at most 3.
    count = math.prod(problem.rows)
    assert_close_to_eager("loss", ours[0], eager[0], exact[0], 3.0 * (count if problem.reduction == "sum" else 1))
    # Pulls of a sample or target cancel, too; no slope is steeper than 1 / h, and those of one of n samples or m
    # targets add up to 2 / n or 2 / m of that at most. An eighth of it: two units, not 16.
    steepest = 0.25 / (options["bandwidth"] * (count if problem.reduction == "mean" else 1))
    scales = steepest / problem.n, steepest / problem.m
    for name, *results, scale in zip(
        ("samples.grad", "target.grad"), ours[1:], eager[1:], exact[1:], scales, strict=True
    ):
        assert_close_to_eager(name, *results, scale)
    if problem.mask == "nothing":
        assert not any(each.any() for each in ours)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_are_as_close_to_float64_as_eager(kernel, dtype, device):
    @settings(max_examples=EXAMPLES // 2)  # of each kernel
    @given(PROBLEMS())
    def run(problem):
        check(problem, kernel, 0.4 + 2 * (problem.seed % 97) / 97, dtype, device)

    run()


@pytest.mark.parametrize("magnitude", [1e25, 1e-25])
@pytest.mark.parametrize("features", [1, 16, 5000])
def test_extreme_differences_of_the_size_of_the_bandwidth(kernel, features, magnitude, device, poisoned_empty):
    """D = 5000 is split over programs."""
    problem = Problem(
        (3,), 3, 2, features, -2, False, 1.0, 1.0, 0.0, "mean", "some", False, False, True, magnitude, 5
    )
    check(problem, kernel, 0.8, torch.float32, device)


@pytest.mark.parametrize("features", [1, 3, 5000])
def test_differences_far_from_the_bandwidth(kernel, features, device, backends):
    """Much larger than it: the kernel and its gradient are 0, not NaN. Much smaller: the kernel is 1."""
    points = torch.randn(2, 3, features, device=device)

    def loss_and_gradient(size: float, bandwidth: float):
        samples = (points * size).requires_grad_()
        target = (points.flip(-2)[:, :2] * size + size).detach()
        loss = kernel_score_loss(samples, target, kernel=kernel, bandwidth=bandwidth)
        loss.backward()
        return loss.item(), samples.grad

    for size, bandwidth in ((1e35, 1.0), (1e35, 1e-30), (1e4, 1e-30)):
        for loss, gradient in backends(lambda size=size, h=bandwidth: loss_and_gradient(size, h)):
            assert loss == 0
            assert not gradient.any()
    for loss, gradient in backends(lambda: loss_and_gradient(1e-25, 1.0)):
        assert loss == pytest.approx(-1.0, abs=1e-6)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("n", "features"), [(2, 16), (8, 128), (16, 1), (4, 5000)])
def test_all_points_coincide(kernel, n, features, device, backends):
    def loss_and_gradients():
        samples = torch.zeros(3, n, features, device=device, requires_grad=True)
        target = torch.zeros(3, features, device=device, requires_grad=True)
        loss = kernel_score_loss(samples, target, kernel=kernel)
        loss.backward()
        return loss.item(), samples.grad, target.grad

    for loss, *gradients in backends(loss_and_gradients):
        assert loss == pytest.approx(-1.0, abs=1e-6)
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("rows", [(0,), (3, 0), (1,), (1, 1)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_row_and_one_row(kernel, rows, reduction, device, triton_backend, poisoned_empty):
    samples = torch.randn(*rows, 3, 5, device=device, requires_grad=True)
    loss = kernel_score_loss(samples, torch.randn(*rows, 5, device=device), kernel=kernel, reduction=reduction)
    loss.sum().backward()
    assert loss.shape == (rows if reduction == "none" else ())
    assert samples.grad.shape == samples.shape
    assert torch.isfinite(loss).all()
    assert torch.isfinite(samples.grad).all()


def test_backward_again_and_twice(kernel, device, triton_backend):
    samples = torch.randn(5, 2, 16, device=device, requires_grad=True)
    target = torch.randn(5, 16, device=device)
    loss = kernel_score_loss(samples, target, kernel=kernel)
    (once,) = torch.autograd.grad(loss, samples, retain_graph=True)
    (again,) = torch.autograd.grad(loss, samples, torch.tensor(3.0, device=device))
    torch.testing.assert_close(again, 3 * once)
    with pytest.raises(RuntimeError, match=r"kernel_score_loss: .*second-order"):
        torch.autograd.grad(kernel_score_loss(samples, target, kernel=kernel), samples, create_graph=True)


def test_under_compile_and_transforms(kernel, device, triton_backend, monkeypatch):
    samples, target = torch.randn(5, 2, 16, device=device), torch.randn(5, 16, device=device)

    def loss(x):
        return kernel_score_loss(x, target, kernel=kernel)

    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(samples), loss(samples))
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "auto")
    leaf = samples.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(samples), wanted)
    direction = torch.randn_like(samples)
    _, forward = torch.func.jvp(loss, (samples,), (direction,))
    torch.testing.assert_close(forward, (wanted * direction).sum(), rtol=1e-4, atol=1e-6)


def test_halves_are_subtracted_in_float32(kernel, backends, device):
    samples = torch.randn(50, 2, 64).half().to(device).requires_grad_()
    target = torch.randn(50, 64).half().to(device)
    options = {"kernel": kernel, "bandwidth": 8.0, "reduction": "none"}
    exact = reference.kernel_score_loss(samples.double(), target.double().unsqueeze(-2), None, None, None, **options)
    for loss in backends(lambda: kernel_score_loss(samples, target, **options)):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=0, atol=2e-6)
        (gradient,) = torch.autograd.grad(loss.sum(), samples)
        assert gradient.dtype == torch.float16
        assert gradient.any()


def test_bad_arguments(kernel):
    samples, target = torch.randn(5, 3, 4), torch.randn(5, 4)
    for bad, message in (
        ({"kernel": "cauchy"}, "kernel is 'cauchy'; it must be one of gaussian, laplace"),
        ({"bandwidth": 0.0}, "bandwidth is 0.0; it must be positive"),
        ({"bandwidth": float("nan")}, "bandwidth is nan"),
        ({"bandwidth": 1e31}, "from 1e-30 to 1e30"),
        ({"reduction": "max"}, "reduction is 'max'"),
        ({"weights": torch.ones(3)}, "weights has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            kernel_score_loss(samples, target, **{"kernel": kernel, **bad})
    with pytest.raises(TypeError, match="bandwidth is '1'"):
        kernel_score_loss(samples, target, kernel=kernel, bandwidth="1")
    with pytest.raises(ValueError, match=r"1 sample\(s\).*the kernel score needs at least 2"):
        kernel_score_loss(samples[:, :1], target, kernel=kernel)
    with pytest.raises(ValueError, match="target has shape"):
        kernel_score_loss(samples, target[:, :3], kernel=kernel)
    with pytest.raises(TypeError, match=r"target is a GaussianTarget; it must be a torch.Tensor"):
        kernel_score_loss(samples, GaussianTarget(target, target, 2), kernel=kernel)
