"""The energy loss, forward + backward, and the energy distance: eager, torch.compile and ours, float32.

    python -m benchmarks.bench_energy_loss --out FILE.json       # a GPU; --only "EAR 32k" for one case

The eager code is the public EAR's and CALM's, by their formulas, order of operations and intermediate tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.clocks import DEVICE, HAS_GPU, Call
from benchmarks.harness import COMPILED, EAGER, OURS, Row
from ear_kernels import GaussianTarget, energy_distance, energy_loss

CACHE_BYTES = 120 * 2**20  # twice the L2 cache of an H200


@dataclass(frozen=True)
class Shape:
    """Rows, n samples, m targets (drawn from a Gaussian or given), D features."""

    name: str
    rows: int
    n: int
    m: int
    features: int
    gaussian: bool = False

    @property
    def bytes(self) -> int:
        """What must be moved: samples, and targets or mean and log_std, read once; the samples' gradients written."""
        return 4 * self.rows * self.features * (2 * self.n + (2 if self.gaussian else self.m))


SHAPES = [
    Shape("EAR 32k", 32_768, 2, 1, 16),
    Shape("EAR 1M", 1_048_576, 2, 1, 16),
    Shape("CALM 2k", 2_048, 8, 100, 128, gaussian=True),
    Shape("CALM 8k", 8_192, 8, 100, 128, gaussian=True),
    Shape("ensemble", 1_000_000, 16, 1, 1),
    Shape("whole field", 8, 8, 1, 1_000_000),
]
SMALL_SHAPES = [Shape("EAR small", 2_048, 2, 1, 16), Shape("CALM small", 16, 8, 20, 128, gaussian=True)]
POINTS, SMALL_POINTS, POINT_FEATURES = 50_000, 1_000, 64


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).norm(dim=-1)


def public_ear(samples: Tensor, target: Tensor, reduce: bool = True) -> Tensor:
    """``[n, rows, D]`` against ``[rows, D]``: two samples one by one, as the public EAR has them, more by index."""
    n = len(samples)
    if n == 2:
        one, two = samples.unbind()
        loss = distance(one, target) + distance(two, target) - distance(one, two)
    else:
        first, second = torch.triu_indices(n, n, offset=1, device=samples.device)
        loss = 2 * distance(samples, target).mean(dim=0) - distance(samples[first], samples[second]).mean(dim=0)
    return loss.mean() if reduce else loss


def public_calm(samples: Tensor, mean: Tensor, log_std: Tensor, m: int, reduce: bool = True) -> Tensor:
    """``[n, rows, D]`` against m draws: an ``[n, m, rows, D]`` tensor of differences."""
    n = samples.shape[0]
    targets = mean + torch.exp(log_std) * torch.randn(m, *mean.shape, device=mean.device, dtype=mean.dtype)
    fidelity = (samples.unsqueeze(1) - targets.unsqueeze(0)).norm(dim=-1).mean(dim=(0, 1))
    between = (samples.unsqueeze(0) - samples.unsqueeze(1)).norm(dim=-1).sum(dim=(0, 1)) / (n * (n - 1))
    loss = 2 * fidelity - between
    return loss.mean() if reduce else loss


def cdist_distance(x: Tensor, y: Tensor, chunk: int = 10_000) -> Tensor:
    """The energy distance by ``torch.cdist`` in chunks of rows, which is what fits into memory."""
    between, first, second = (
        sum(torch.cdist(a[i : i + chunk], b).sum(dtype=torch.float64) for i in range(0, len(a), chunk))
        for a, b in ((x, y), (x, x), (y, y))
    )
    m, n = len(x), len(y)
    return 2 * between / (m * n) - first / (m * (m - 1)) - second / (n * (n - 1))


def loss_function(shape: Shape, rival: str) -> Callable[..., Tensor]:
    """A rival's loss of :func:`inputs`."""
    if rival == OURS:
        if not shape.gaussian:
            return partial(energy_loss, sample_dim=0)
        return lambda x, mean, log_std: energy_loss(x, GaussianTarget(mean, log_std, shape.m), sample_dim=0)
    eager = partial(public_calm, m=shape.m) if shape.gaussian else public_ear
    if rival != COMPILED:
        return eager
    torch._dynamo.reset()
    return torch.compile(eager, dynamic=False)


def inputs(shape: Shape, seed: int = 0) -> tuple[Tensor, ...]:
    """Samples, which want a gradient, and target; or samples, mean and log_std."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    normal = partial(torch.randn, generator=g, device=DEVICE)
    rows, features = shape.rows, shape.features
    if shape.gaussian:
        return normal(shape.n, rows, features).requires_grad_(), normal(rows, features), 0.1 * normal(rows, features)
    return normal(shape.n, rows, features).requires_grad_(), normal(rows, features)


def step(function: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the samples."""
    loss = function(*tensors)
    return loss.detach(), torch.autograd.grad(loss, tensors[0])[0]


def calls(shape: Shape, rival: str) -> Sequence[Call]:
    """Forward and backward on as many inputs as do not fit into the cache together."""
    function, copies = loss_function(shape, rival), min(64, -(-CACHE_BYTES // shape.bytes)) if HAS_GPU else 1

    def call(tensors: tuple[Tensor, ...]) -> None:
        tensors[0].grad = None
        function(*tensors).backward()

    return [partial(call, inputs(shape, seed)) for seed in range(copies)]


def check(shape: Shape, rival: str) -> float:
    """Loss and gradient against eager's; drawn targets by their distribution, then a few that all are the mean."""
    tensors = inputs(shape)
    if shape.gaussian:
        check_draws(shape, rival, tensors)
        shape, tensors = replace(shape, m=4), (*tensors[:2], torch.full_like(tensors[2], -1e4))

    def results(which: str) -> dict[str, Tensor]:
        given = tensors
        if which == "exact":
            given = tuple(tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors)
        loss, gradient = step(loss_function(shape, EAGER if which == "exact" else which), given)
        return {"loss": loss, "gradient": gradient}

    # The loss is the difference of two means of this size.
    return harness.check_results(
        results, rival, lambda name, exact: (4 if name == "loss" else 1) * float(exact.abs().max())
    )


def check_draws(shape: Shape, rival: str, tensors: tuple[Tensor, ...]) -> None:
    """With drawn targets the loss is eager's within 5 standard errors, the gradient as near as a second eager's."""
    first, second = (public_calm(*tensors, m=shape.m, reduce=False).detach() for _ in range(2))
    spread = float((first - second).std()) / shape.rows**0.5
    loss, gradient = step(loss_function(shape, rival), tensors)
    assert abs(float(loss - first.mean())) <= 5 * spread, (float(loss), float(first.mean()), spread)
    one, other = (step(loss_function(shape, EAGER), tensors)[1] for _ in range(2))
    ratio = float((gradient - one).norm() / (other - one).norm())
    assert 0.9 < ratio < 1.1, f"gradients of drawn targets are {ratio:.2f} times as far from eager's as they may be"


def distance_call(points: int, rival: str) -> Callable[[], Tensor]:
    g = torch.Generator(DEVICE).manual_seed(0)
    x, y = (torch.randn(points, POINT_FEATURES, generator=g, device=DEVICE) for _ in range(2))
    function = energy_distance if rival == OURS else cdist_distance
    return partial(function, x, 1.02 * y + 0.01)


def check_distance(points: int) -> float:
    off = abs(distance_call(points, OURS)().item() - distance_call(points, EAGER)().item())
    assert off < 1e-4, off  # of distances of about 11
    return off


def rows_of(shapes: Sequence[Shape], points: int, suffix: str = "") -> list[Row]:
    rows = []
    for shape, rival in product(shapes, (EAGER, COMPILED, OURS)):
        checked = None if rival == EAGER else partial(check, shape, rival)
        known, prepare = {"bytes": shape.bytes}, partial(calls, shape, rival)
        rows.append(Row(f"energy loss, {shape.name}", rival, prepare, checked, known))
    name = f"energy distance{suffix}"
    eager, ours = (lambda rival=rival: [distance_call(points, rival)] for rival in (EAGER, OURS))
    return [*rows, Row(name, EAGER, eager), Row(name, OURS, ours, lambda: check_distance(points))]


ROWS = harness.needs_gpu(rows_of(SHAPES, POINTS))
ROWS += [] if HAS_GPU else rows_of(SMALL_SHAPES, SMALL_POINTS, " small")


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_energy_loss(row: Row, run_row) -> None:
    run_row(row)


if __name__ == "__main__":
    sys.exit(harness.main(ROWS, __doc__))
