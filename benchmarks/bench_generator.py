"""The MLP generator: the public code's eager, the same by torch.compile, and ours, bf16.

    python -m benchmarks.bench_generator --out FILE.json       # a GPU; --only 6x1024 for one size

Many rows: bf16 autocast over float32 weights, 4 samples a token. Few rows, as in sampling: forward in a CUDA graph,
bf16 weights.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import product
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.clocks import DEVICE, HAS_GPU, Call, graphed
from benchmarks.harness import COMPILED, EAGER, OURS, Row
from benchmarks.public_ear import Net, initialise
from ear_kernels import FusedMLPGenerator

INPUT, TOKEN, NOISE, SAMPLES = 768, 16, 64, 4
SIZES = {"6x1024": (6, 1024), "8x1280": (8, 1280), "12x1536": (12, 1536)}
ROWS_OF_A_STEP, POOLS = 65_536, (16_384, 4_096)
FEW_SIZES, FEW_ROWS = ("6x1024", "12x1536"), (4, 64, 1024)
SMALL, SMALL_ROWS = (2, 64), 1024
MODES = ("forward", "forward + backward")
LOW = torch.bfloat16 if HAS_GPU else torch.float16  # Triton's interpreter gets bf16 wrong


def make(size: tuple[int, int], ours: bool) -> nn.Module:
    """The same weights in the public module or in ours."""
    depth, width = size
    net = Net(INPUT, width, TOKEN, depth, NOISE)
    initialise(net)
    if ours:
        fused = FusedMLPGenerator(INPUT, width, TOKEN, depth=depth, noise_dim=NOISE)
        fused.load_state_dict(net.state_dict())
        return fused.to(DEVICE)
    return net.to(DEVICE)


def eager_backend() -> AbstractContextManager:
    return patch.dict(os.environ, EAR_KERNELS_BACKEND="eager")


class Generator:
    """A rival's generator with its inputs; a noise pool is ours in every backend.

    Args:
        size: depth and width.
        rows: tokens times samples.
        which: "eager", "exact" (in float32, on the CPU in float64), "torch.compile" or ours.
        pool: vectors of a noise pool; 0 for a vector a row.
    """

    def __init__(self, size: tuple[int, int], rows: int, which: str, pool: int = 0) -> None:
        self.is_ours, self.pool = which == OURS or pool > 0, pool
        self.dtype = torch.float32 if HAS_GPU or which != "exact" else torch.float64
        self.autocast = HAS_GPU and which != "exact"
        self.model = make(size, self.is_ours).to(self.dtype)
        g = torch.Generator(DEVICE).manual_seed(1)
        z = torch.randn(rows // SAMPLES, INPUT, generator=g, device=DEVICE)
        noise = torch.rand(rows // SAMPLES, SAMPLES, NOISE, generator=g, device=DEVICE) - 0.5
        grad = torch.randn(rows // SAMPLES, SAMPLES, TOKEN, generator=g, device=DEVICE)
        low = LOW if HAS_GPU else torch.float32
        self.z = z.to(low).to(low if self.autocast else self.dtype).requires_grad_()
        self.noise, self.grad = noise.to(self.dtype), grad.to(low)
        if which == COMPILED:
            torch._dynamo.reset()
            self.run: Callable[..., Tensor] = torch.compile(self.rows, dynamic=False)
        else:
            self.run = self.rows

    def rows(self, z: Tensor, noise: Tensor) -> Tensor:
        if self.is_ours:
            return self.model(z, noise, noise_pool=self.pool) if self.pool else self.model(z, noise)
        return self.model(z.repeat_interleave(SAMPLES, 0), noise.flatten(0, 1)).unflatten(0, noise.shape[:2])

    def forward(self) -> Tensor:
        with torch.autocast(DEVICE.type, LOW, enabled=self.autocast):
            return self.run(self.z, self.noise)

    def call(self, mode: str) -> Call:
        def forward() -> None:
            with torch.no_grad():
                self.forward()

        return forward if mode == "forward" else self.both

    def both(self) -> dict[str, Tensor]:
        """Output and all gradients."""
        self.model.zero_grad(set_to_none=True)
        self.z.grad = None
        out = self.forward()
        out.backward(self.grad.to(out.dtype))
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        return {"out": out.detach(), "z": self.z.grad, **gradients}


@cache
def check(size: tuple[int, int], rows: int, rival: str, pool: int) -> float:
    def results(which: str) -> dict[str, Tensor]:
        with nullcontext() if which == rival else eager_backend():
            return Generator(size, rows, which, pool).both()

    def scale(name: str, exact: Tensor) -> float:
        """Gradients of parameters are sums over all rows, in which most cancels."""
        return (1 if name in ("out", "z") else rows**0.5) * float(exact.abs().max())

    return harness.check_results(results, rival, scale)


def flops(size: tuple[int, int], rows: int, mode: str, pool: int = 0) -> float:
    """Of the square matrices."""
    depth, width = size
    modulated = pool or rows
    return 2 * width**2 * (2 * depth * rows + (3 * depth + 2) * modulated) * (1 if mode == "forward" else 3)


def many_rows(name: str, size: tuple[int, int], rows: int, pools: Sequence[int] = ()) -> list[Row]:
    rivals = [(EAGER, EAGER, 0), (COMPILED, COMPILED, 0), (OURS, OURS, 0)]
    rivals += [(f"{OURS}, pool of {pool:,}", OURS, pool) for pool in pools]
    made = []
    for mode, (label, which, pool) in product(MODES, rivals):
        given = (size, rows, which, pool)
        prepare = partial(lambda mode, *given: [Generator(*given).call(mode)], mode, *given)
        checked = None if which == EAGER else partial(check, *given)
        case = f"generator {name}, {rows:,} rows, {mode}"
        made.append(Row(case, label, prepare, checked, {"flops": flops(size, rows, mode, pool)}))
    return made


class FewRows:
    """A rival's forward of a few rows in bf16, or in float64 for "exact"."""

    def __init__(self, size: tuple[int, int], rows: int, which: str) -> None:
        dtype = torch.float64 if which == "exact" else LOW
        self.model = make(size, which == OURS).to(LOW).to(dtype).eval()
        g = torch.Generator(DEVICE).manual_seed(1)
        self.z = torch.randn(rows, INPUT, generator=g, device=DEVICE).to(LOW).to(dtype)
        self.noise = (torch.rand(rows, NOISE, generator=g, device=DEVICE) - 0.5).to(LOW).to(dtype)
        if which == COMPILED:
            torch._dynamo.reset()
        self.run = torch.compile(self.model, dynamic=False) if which == COMPILED else self.model

    @torch.no_grad()
    def __call__(self) -> Tensor:
        return self.run(self.z, self.noise)


def check_few(size: tuple[int, int], rows: int, rival: str) -> float:
    return harness.check_results(lambda which: {"out": FewRows(size, rows, which)()}, rival)


def few_rows(name: str, rows: int, rival: str) -> Row:
    given = (SIZES[name], rows, rival)
    checked = None if rival == EAGER else partial(check_few, *given)
    case = f"generator {name}, {rows:,} rows in a CUDA graph"
    return Row(case, rival, lambda: [graphed(FewRows(*given))], checked)


ROWS = many_rows("6x1024", SIZES["6x1024"], ROWS_OF_A_STEP, POOLS)
ROWS += [row for name in ("8x1280", "12x1536") for row in many_rows(name, SIZES[name], ROWS_OF_A_STEP)]
ROWS += [few_rows(*given) for given in product(FEW_SIZES, FEW_ROWS, (EAGER, COMPILED, OURS))]
ROWS = harness.needs_gpu(ROWS)
ROWS += [] if HAS_GPU else many_rows("small", SMALL, SMALL_ROWS)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_generator(row: Row, run_row) -> None:
    run_row(row)


if __name__ == "__main__":
    sys.exit(harness.main(ROWS, __doc__))
