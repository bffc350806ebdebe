"""The Triton energy loss against the reference: values, gradients, and composition with the rest of PyTorch."""

import os

import pytest
import torch
from hypothesis import given

from ear_kernels import energy_loss
from ear_kernels.ops.energy_loss import reference
from ear_kernels.testing import assert_close_to_eager
from tests.kernels.conftest import HAS_GPU
from tests.kernels.problems import Problem
from tests.kernels.strategies import gpu_problems, problems

PROBLEMS = gpu_problems if HAS_GPU else problems
gpu_only = pytest.mark.gpu
DTYPES = [
    torch.float32,
    torch.float16,
    # The interpreter's bfloat16 arithmetic is wrong.
    pytest.param(torch.bfloat16, marks=gpu_only),
    torch.float64,
]


@pytest.fixture(autouse=True)
def _backend(triton_backend):
    """Every test here asks for Triton; ``evaluate`` asks for others by name."""


def evaluate(
    backend: str, arguments: dict, options: dict, upcast: bool = False, incoming=None, operation=energy_loss
):
    """(loss, gradient of samples, gradient of target) of one backend."""
    up = (lambda t: t.double() if t is not None and t.is_floating_point() else t) if upcast else (lambda t: t)
    given_ = {name: up(tensor) for name, tensor in arguments.items()}
    samples, target = (given_[name].detach().requires_grad_() for name in ("samples", "target"))
    previous = os.environ.get("EAR_KERNELS_BACKEND", "auto")
    os.environ["EAR_KERNELS_BACKEND"] = backend
    try:
        loss = operation(
            samples, target, given_["mask"], weights=given_["weights"], feature_weights=given_["feature_weights"],
            **options,
        )  # fmt: skip
        (loss if incoming is None else loss * up(incoming)).sum().backward()
    finally:
        os.environ["EAR_KERNELS_BACKEND"] = previous
    return loss.detach(), samples.grad, target.grad


def loss_scale(arguments: dict, options: dict, sample_dim: int) -> float:
    """Magnitude of the terms of the loss, which may cancel: fidelity plus diversity."""
    samples = arguments["samples"].double().movedim(sample_dim, -2)
    fw = None if arguments["feature_weights"] is None else arguments["feature_weights"].double()
    rows = reference.energy_loss_rows(
        samples, arguments["target"].double(), options["alpha"], -options["tau"], fw, options["eps"],
        fair=options["fair"],
    )  # fmt: skip
    rows = rows.nan_to_num(0.0, 0.0, 0.0)
    return (rows.sum() if options["reduction"] == "sum" else rows.max()).item() if rows.numel() else 0.0


def gradient_scale(arguments: dict, problem: Problem) -> float:
    """Magnitude of the pulls of single pairs that the gradients sum up, which may cancel."""
    samples, target = arguments["samples"].double().movedim(problem.sample_dim, -2), arguments["target"].double()
    n, m, eps = samples.shape[-2], target.shape[-2], problem.options()["eps"]
    root = 1.0 if arguments["feature_weights"] is None else arguments["feature_weights"].double().sqrt()

    def pulls(differences: torch.Tensor) -> torch.Tensor:
        length = ((differences * root).square().sum(-1, keepdim=True) + eps**2).sqrt()
        slope = torch.where(length > 0, problem.alpha * length ** (problem.alpha - 2), 0.0)
        return slope * differences.abs() * root**2

    to_targets = 2 * pulls(samples.unsqueeze(-2) - target.unsqueeze(-3)) / (n * m)
    to_samples = 2 * problem.tau * pulls(samples.unsqueeze(-2) - samples.unsqueeze(-3)) / (n * (n - 1))
    rows = (to_targets.sum(-2) + to_samples.sum(-2)).amax((-2, -1)).maximum(to_targets.sum(-3).amax((-2, -1)))
    weights = torch.ones_like(rows)
    for name in ("mask", "weights"):
        if arguments[name] is not None:
            weights = weights * arguments[name].double()
    rows = torch.where(weights > 0, rows * weights, 0.0).nan_to_num(0.0, 0.0, 0.0)
    total = weights.sum().item() if problem.reduction == "mean" else 1.0
    return rows.max().item() / total if rows.numel() and total else 0.0


def check(problem: Problem, dtype: torch.dtype, device) -> None:
    arguments = problem.build(dtype, device)
    options = {**problem.options(), "sample_dim": problem.sample_dim}
    exact = evaluate("eager", arguments, options, upcast=True)
    eager = evaluate("eager", arguments, options)
    ours = evaluate("triton", arguments, options)
    scale = loss_scale(arguments, problem.options(), problem.sample_dim)
    assert_close_to_eager("loss", ours[0], eager[0], exact[0], scale)
    for name, a, b, c in zip(("samples.grad", "target.grad"), ours[1:], eager[1:], exact[1:], strict=True):
        # In float64 eager's result is the exact one itself, to its last bit: what cancels counts as what it was.
        pulled = gradient_scale(arguments, problem) if dtype == torch.float64 else 0.0
        assert_close_to_eager(name, a, b, c, pulled)
    if problem.mask == "nothing":
        assert not ours[0].any()
        assert not ours[1].any()
        assert not ours[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(dtype, device):
    @given(PROBLEMS())
    def run(problem):
        check(problem, dtype, device)

    run()


@pytest.mark.parametrize("magnitude", [1e25, 1e-25])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("features", [1, 16, 5000])
def test_extreme_differences(features, alpha, magnitude, device, poisoned_empty):
    # Powers that float32 cannot hold are nobody's: 1e25 ** 1.3 is, its sum over rows is too.
    problem = Problem(
        (3,), 3, 2, features, -2, False, alpha, 0.9, 0.0, "mean", "some", False, False, True, magnitude, 5
    )
    check(problem, torch.float32, device)


@pytest.mark.parametrize(("n", "features"), [(2, 16), (8, 128), (16, 1), (4, 5000)])
@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0, 1.5, 2.0])
def test_all_points_coincide(n, features, alpha, device):
    """A head that starts at zero: no NaN, and a gradient of exactly 0."""
    samples = torch.zeros(3, n, features, device=device, requires_grad=True)
    target = torch.zeros(3, features, device=device, requires_grad=True)
    loss = energy_loss(samples, target, alpha=alpha)
    loss.backward()
    assert loss.item() == 0
    assert not samples.grad.any()
    assert not target.grad.any()


def test_coincident_pair_beside_a_tiny_and_a_huge_one(device):
    """Every pair has its own scale: a huge difference does not hide a tiny one beside it, or in the same row."""
    samples = torch.zeros(4, 3, 16, dtype=torch.float32, device=device)
    samples[0, 0] = 1e25
    samples[1, 1] = 1e-25
    samples[2, 0], samples[2, 1] = 1e20, 1e-20
    arguments = {
        "samples": samples, "target": torch.zeros(4, 1, 16, device=device), "mask": None, "weights": None,
        "feature_weights": None,
    }  # fmt: skip
    # With tau = 1 the two terms of such rows cancel, and what is left is rounding.
    options = {"alpha": 1.0, "tau": 0.5, "reduction": "none"}
    exact, ours = evaluate("eager", arguments, options, upcast=True), evaluate("triton", arguments, options)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [(0,), (3, 0), (1,), (1, 1)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_row_and_one_row(rows, reduction, device, poisoned_empty):
    samples = torch.randn(*rows, 3, 5, device=device, requires_grad=True)
    target = torch.randn(*rows, 5, device=device)
    loss = energy_loss(samples, target, reduction=reduction)
    loss.sum().backward()
    assert loss.shape == (rows if reduction == "none" else ())
    assert torch.isfinite(loss).all()
    assert samples.grad.shape == samples.shape
    assert torch.isfinite(samples.grad).all()


def test_no_copy_of_strided_samples(device):
    """Samples in front, and four leading dimensions in the stored order: the kernel gets the caller's memory."""
    from ear_kernels.ops.energy_loss import launch

    samples = torch.randn(8, 2, 3, 4, 16, device=device).movedim(0, -2)
    layout = launch.layout_of((samples, None))
    assert layout.row_sizes == (24,)
    assert layout.strides == ((16, 24 * 16, 1), None)
    assert launch.gradient_like(samples, True, "mean").stride() == samples.stride()


def test_leading_dimensions_that_do_not_collapse(device):
    base = torch.randn(2, 3, 2, 3, 2, 4, 5, device=device)
    samples = base.permute(4, 2, 0, 3, 1, 5, 6)
    target = torch.randn(*samples.shape[:-2], 5, device=device)
    strided, dense = samples.detach().requires_grad_(), samples.contiguous().requires_grad_()
    losses = [energy_loss(x, target) for x in (strided, dense)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(strided.grad, dense.grad)
