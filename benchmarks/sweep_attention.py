"""Attention with dropout: every launch worth trying, each checked against float64, and PyTorch's backends.

    python -m benchmarks.sweep_attention OUT.json                           # needs a GPU; about a minute
    python -m benchmarks.sweep_attention OUT.json --heads 16 --dim 80       # EAR-H; about as long

Shapes are those of a training step of 64 images: EAR-B's (12 heads of 64) and EAR-L's (16), or one that is given; 320
positions, bf16. The rivals' kernels include the packing of their three gradients into one matrix, which ours need
not. Times are of the profiler, a kernel each.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks import timing
from ear_kernels.ops.attention import autograd as ops
from ear_kernels.ops.attention import reference
from ear_kernels.ops.attention.autograd import AttentionConfig

DROPOUT = 0.1
NARROW_CONFIGS = [
    *(AttentionConfig(64, 64, stages, 4, True) for stages in (3, 2, 4, 5)),
    AttentionConfig(64, 32, 4, 4, True),
    AttentionConfig(32, 64, 4, 4, True),
    AttentionConfig(128, 64, 3, 8, True),
    AttentionConfig(64, 128, 3, 8, True),
    AttentionConfig(64, 32, 3, 2, False),
]


# For heads of more than 64 features: two blocks of features with mma.sync (up to 80), one of 128 with WGMMA. What ran
# on 2026-11-24 also had two blocks with WGMMA (``split=True, shared=True`` in the result), which lost and is gone.
WIDE_CONFIGS = [
    *(AttentionConfig(bm, bn, 3, 2, False) for bm, bn in ((64, 32), (32, 32), (64, 16), (32, 64))),
    *(
        AttentionConfig(bm, bn, stages, warps, True)
        for bm, bn, stages, warps in (
            (64, 64, 2, 4),
            (64, 32, 2, 4),
            (64, 64, 3, 4),
            (64, 32, 3, 4),
            (128, 64, 2, 8),
            (128, 32, 2, 8),
            (64, 64, 2, 8),
        )
    ),
]


class Shape(NamedTuple):
    heads: int
    dim: int
    batch: int = 64
    length: int = 320


def exact(qkv: Tensor, heads: int, draws: Tensor | None, grad: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, _ = qkv.shape
    leaf = qkv.double().requires_grad_()
    parts = leaf.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind()
    factors = None
    if draws is not None:
        threshold, scale = ops.threshold_of(DROPOUT)
        factors = (reference.kept(draws, threshold) * scale).view(batch, heads, length, length)
    out = reference.attention(*parts, factors).transpose(1, 2).flatten(2)
    return out.detach(), torch.autograd.grad(out, leaf, grad.double())[0]


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def problem(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    heads, dim, batch, length = shape
    qkv = torch.randn(batch, length, 3 * heads * dim, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(batch, length, heads * dim, device="cuda", dtype=torch.bfloat16)
    return qkv, grad, ops.draw(batch, heads, length, torch.device("cuda"))


def kernel_milliseconds(call: Callable[[], object], launches: int = 10) -> dict[str, float]:
    """Mean ms of every kernel of ``call``, by the profiler."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(launches):
            call()
        torch.cuda.synchronize()
    return {row.key: row.device_time_total / 1e3 / launches for row in profiler.key_averages()}


def attempt(row: dict[str, Any], measure: Callable[[], dict[str, Any]], deadline: float) -> dict[str, Any]:
    """``row`` with what ``measure`` found, or with why it found nothing."""
    if time.monotonic() > deadline:
        return row | {"left out": "no time left"}
    try:
        row |= measure()
    except Exception as problem_met:  # a launch that does not fit is a row of the table
        row["failed"] = f"{type(problem_met).__name__}: {problem_met}"[:200]
    print(json.dumps(row), flush=True)
    return row


def ours(shape: Shape, configs: list[AttentionConfig], dropout: float, deadline: float) -> list[dict[str, Any]]:
    heads = shape.heads
    small = problem(shape._replace(batch=2))
    drawn = small[2] if dropout else None
    out_exact, grad_exact = exact(small[0], heads, drawn, small[1])
    qkv, grad, draws = problem(shape)
    given = draws if dropout else None

    def measure(config: AttentionConfig) -> dict[str, Any]:
        out, lse = ops.forward(small[0], heads, drawn, dropout, config)
        gradient, sums = ops.backward(small[1], small[0], out, lse, heads, drawn, dropout, config, config)
        errors = {
            "out": error(out, out_exact),
            "grad": error(gradient, grad_exact),
            "sums": error(sums, grad_exact.sum((0, 1))),
        }
        if not all(value < 0.02 for value in errors.values()):  # NaN is not, either
            raise ValueError(f"wrong: {errors}")
        out, lse = ops.forward(qkv, heads, given, dropout, config)

        def both() -> None:
            ops.forward(qkv, heads, given, dropout, config)
            ops.backward(grad, qkv, out, lse, heads, given, dropout, config, config)

        return {"errors": errors, "ms": {name[:32]: ms for name, ms in kernel_milliseconds(both).items()}}

    return [
        attempt(
            {"heads": heads, "dim": shape.dim, "dropout": dropout, "config": str(config)},
            functools.partial(measure, config),
            deadline,
        )
        for config in configs
    ]


def rival(backend: SDPBackend, shape: Shape, dropout: float, deadline: float) -> dict[str, Any]:
    heads, dim, batch, length = shape
    qkv, grad, _ = problem(shape)
    leaf = qkv.requires_grad_()
    cotangent = grad.view(batch, length, heads, dim).transpose(1, 2)

    def both() -> None:
        query, key, value = leaf.view(batch, length, 3, heads, dim).permute(2, 0, 3, 1, 4).unbind()
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        torch.autograd.grad(out, leaf, cotangent)

    return attempt(
        {"heads": heads, "dim": dim, "rival": backend.name, "dropout": dropout},
        lambda: {"ms": {name[:60]: ms for name, ms in kernel_milliseconds(both).items()}},
        deadline,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--limit-seconds", type=float, default=240.0, help="start no candidate after that time")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.limit_seconds
    shape = Shape(arguments.heads, arguments.dim)
    configs = NARROW_CONFIGS if shape.dim <= 64 else WIDE_CONFIGS
    rows: list[dict[str, Any]] = []
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        rows += [rival(backend, shape, dropout, deadline) for dropout in (DROPOUT, 0.0)]
    rows += ours(shape, configs, DROPOUT, deadline) + ours(shape, configs[:1], 0.0, deadline)
    if shape == Shape(12, 64):
        rows += ours(Shape(16, 64), configs[:1], DROPOUT, deadline)
    arguments.out.write_text(json.dumps({"environment": timing.environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
