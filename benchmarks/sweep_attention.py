"""Attention with dropout: every launch worth trying, each checked against float64, and PyTorch's backends.

    python -m benchmarks.sweep_attention OUT.json          # needs a GPU; about a minute

Shapes are those of a training step of 64 images, EAR-B's (12 heads) and EAR-L's (16), 320 positions, heads of 64,
bf16. The rivals' kernels include the packing of their three gradients into one matrix, which ours need not. Times are
of the profiler, a kernel each.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
CONFIGS = [
    *(AttentionConfig(64, 64, stages, 4, True) for stages in (3, 2, 4, 5)),
    AttentionConfig(64, 32, 4, 4, True),
    AttentionConfig(32, 64, 4, 4, True),
    AttentionConfig(128, 64, 3, 8, True),
    AttentionConfig(64, 128, 3, 8, True),
    AttentionConfig(64, 32, 3, 2, False),
]


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


def problem(batch: int, heads: int, length: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
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


def ours(heads: int, configs: list[AttentionConfig], dropout: float) -> list[dict[str, Any]]:
    small = problem(2, heads, 320, 64)
    drawn = small[2] if dropout else None
    out_exact, grad_exact = exact(small[0], heads, drawn, small[1])
    qkv, grad, draws = problem(64, heads, 320, 64)
    if not dropout:
        draws = None

    def measure(config: AttentionConfig) -> dict[str, Any]:
        out, lse = ops.forward(small[0], heads, drawn, dropout, config)
        gradient, sums = ops.backward(small[1], small[0], out, lse, heads, drawn, dropout, config, config)
        errors = {
            "out": error(out, out_exact),
            "grad": error(gradient, grad_exact),
            "sums": error(sums, grad_exact.sum((0, 1))),
        }
        if not max(errors.values()) < 0.02:
            raise ValueError(f"wrong: {errors}")
        out, lse = ops.forward(qkv, heads, draws, dropout, config)

        def both() -> None:
            ops.forward(qkv, heads, draws, dropout, config)
            ops.backward(grad, qkv, out, lse, heads, draws, dropout, config, config)

        return {"errors": errors, "ms": {name[:32]: ms for name, ms in kernel_milliseconds(both).items()}}

    rows = []
    for config in configs:
        row: dict[str, Any] = {"heads": heads, "dropout": dropout, "config": str(config)}
        try:
            row |= measure(config)
        except Exception as problem_met:  # a launch that does not fit is a row of the table
            row["failed"] = f"{type(problem_met).__name__}: {problem_met}"[:200]
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def rival(backend: SDPBackend, heads: int, dropout: float) -> dict[str, Any]:
    qkv, grad, _ = problem(64, heads, 320, 64)
    leaf = qkv.requires_grad_()
    cotangent = grad.view(64, 320, heads, 64).transpose(1, 2)

    def both() -> None:
        query, key, value = leaf.view(64, 320, 3, heads, 64).permute(2, 0, 3, 1, 4).unbind()
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        torch.autograd.grad(out, leaf, cotangent)

    row = {"heads": heads, "rival": backend.name, "dropout": dropout}
    row["ms"] = {name[:60]: ms for name, ms in kernel_milliseconds(both).items()}  # type: ignore[assignment]
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"environment": timing.environment(), "rows": []}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        record["rows"] += [rival(backend, 12, dropout) for dropout in (DROPOUT, 0.0)]
    record["rows"] += ours(12, CONFIGS, DROPOUT) + ours(12, CONFIGS[:1], 0.0) + ours(16, CONFIGS[:1], DROPOUT)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
