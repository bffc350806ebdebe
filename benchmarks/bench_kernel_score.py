"""The kernel score, forward + backward: eager, torch.compile and ours, float32.

python -m benchmarks.bench_kernel_score --out FILE.json       # a GPU; --only "laplace" for one kernel
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.bench_energy_loss import CACHE_BYTES, Shape, inputs, step
from benchmarks.clocks import HAS_GPU, Call
from benchmarks.harness import COMPILED, EAGER, OURS, Row
from ear_kernels import kernel_score_loss

SHAPES = [Shape("EAR 32k", 32_768, 4, 1, 16), Shape("EAR 1M", 1_048_576, 4, 1, 16), Shape("wide", 8_192, 8, 1, 128)]
SMALL_SHAPES = [Shape("EAR small", 2_048, 4, 1, 16)]


def plain(samples: Tensor, target: Tensor, kernel: str, bandwidth: float) -> Tensor:
    """By the formula: ``[n, rows, D]`` against ``[rows, D]``."""

    def value(difference: Tensor) -> Tensor:
        if kernel == "gaussian":
            return torch.exp(-difference.square().sum(dim=-1) / (2 * bandwidth**2))
        return torch.exp(-difference.norm(dim=-1) / bandwidth)

    n = len(samples)
    first, second = torch.triu_indices(n, n, offset=1, device=samples.device)
    return (value(samples[first] - samples[second]).mean(dim=0) - 2 * value(samples - target).mean(dim=0)).mean()


def loss_function(shape: Shape, kernel: str, rival: str) -> Callable[..., Tensor]:
    options = {"kernel": kernel, "bandwidth": shape.features**0.5}
    if rival == OURS:
        return partial(kernel_score_loss, sample_dim=0, **options)
    if rival == EAGER:
        return partial(plain, **options)
    torch._dynamo.reset()
    return torch.compile(partial(plain, **options), dynamic=False)


def calls(shape: Shape, kernel: str, rival: str) -> Sequence[Call]:
    """Forward and backward on as many inputs as do not fit into the cache together."""
    function = loss_function(shape, kernel, rival)
    copies = min(64, -(-CACHE_BYTES // shape.bytes)) if HAS_GPU else 1

    def call(tensors: tuple[Tensor, ...]) -> None:
        tensors[0].grad = None
        function(*tensors).backward()

    return [partial(call, inputs(shape, seed)) for seed in range(copies)]


def check(shape: Shape, kernel: str, rival: str) -> float:
    """Loss and gradient against eager's."""
    tensors = inputs(shape)

    def results(which: str) -> dict[str, Tensor]:
        given = tensors
        if which == "exact":
            given = tuple(tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors)
        loss, gradient = step(loss_function(shape, kernel, EAGER if which == "exact" else which), given)
        return {"loss": loss, "gradient": gradient}

    # The loss is the difference of two means, of at most 1 and 2.
    return harness.check_results(
        results, rival, lambda name, exact: 3.0 if name == "loss" else float(exact.abs().max())
    )


def rows_of(shapes: Sequence[Shape]) -> list[Row]:
    rows = []
    for shape, kernel, rival in product(shapes, ("gaussian", "laplace"), (EAGER, COMPILED, OURS)):
        checked = None if rival == EAGER else partial(check, shape, kernel, rival)
        prepare = partial(calls, shape, kernel, rival)
        rows.append(Row(f"kernel score, {kernel}, {shape.name}", rival, prepare, checked, {"bytes": shape.bytes}))
    return rows


ROWS = harness.needs_gpu(rows_of(SHAPES))
ROWS += [] if HAS_GPU else rows_of(SMALL_SHAPES)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_kernel_score(row: Row, run_row) -> None:
    run_row(row)


if __name__ == "__main__":
    sys.exit(harness.main(ROWS, __doc__))
