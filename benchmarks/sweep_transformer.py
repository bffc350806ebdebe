"""Launches of the norm's, the GELU's and the optimiser's kernels at the sizes of EAR-B, L and H.

    python -m benchmarks.sweep_transformer OUT.json                  # 40 s on an H200
    TRITON_INTERPRET=1 python -m benchmarks.sweep_transformer OUT.json --small

Rows are ms and GB/s of what must be read and written, the fastest first. Every candidate is compared with the first
one of its kernel before its time counts: launches change no result but the order of a sum.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from benchmarks import timing
from ear_kernels.ops.adaln.autograd import backward_grid, block_of
from ear_kernels.ops.adamw import kernels as adamw_kernels
from ear_kernels.ops.transformer import kernels

DROPOUT = (6554, 1 / (1 - 0.1))  # threshold of 16 bits and scale of probability 0.1

Candidate = tuple[str, Callable[[], object]]


class Sweep:
    """Checks and times candidates; the record is written after each kernel."""

    def __init__(self, out: Path, small: bool) -> None:
        self.out = out
        self.budget_s, self.rounds = (0.01, 1) if small else (0.1, 5)
        self.record: dict[str, Any] = {"environment": timing.environment()}

    def __call__(
        self,
        kernel: str,
        moved: int,
        results: list[Tensor],
        candidates: Iterable[Candidate],
        reset: Callable[[], object] | None = None,
    ) -> None:
        """``moved`` bytes by each candidate, which writes ``results``; ``reset`` undoes what a call has changed."""
        rows, wanted = [], None
        for name, call in candidates:
            for result in results:
                result.fill_(float("nan"))
            if reset is not None:
                reset()
            call()
            found = [result.float() for result in results]
            wanted = wanted or found
            if not all(
                torch.allclose(one, other, rtol=1e-2, atol=1e-3) for one, other in zip(found, wanted, strict=True)
            ):
                rows.append({"launch": name, "ms": None, "wrong": True})
                continue
            ms = timing.gpu_milliseconds([call], self.budget_s, self.rounds)["median"]
            rows.append({"launch": name, "ms": ms, "gb_per_s": moved / ms / 1e6})
        rows.sort(key=lambda row: row["ms"] or float("inf"))
        self.record[kernel] = rows
        self.out.write_text(json.dumps(self.record, indent=1) + "\n")
        print(
            kernel,
            *(f"{row['launch']}: {row['ms'] or float('nan'):.4f} ms" for row in rows[:4]),
            sep="\n    ",
            flush=True,
        )


def norm(sweep: Sweep, rows: int, width: int, device: torch.device, low: torch.dtype) -> None:
    """Forward and backward of dropout + residual + LayerNorm, with the normed rows kept."""
    branch, grad_out = (torch.randn(rows, width, device=device).to(low) for _ in range(2))
    stream, grad_x = (torch.randn(rows, width, device=device) for _ in range(2))
    weight, bias, branch_bias = (torch.randn(width, device=device) for _ in range(3))
    x, out, normed, again, grad_branch = stream.clone(), *(branch.clone() for _ in range(4))
    grad_stream, rstd, seed = grad_x.clone(), torch.ones(rows, device=device), torch.tensor([5], device=device)
    size = {"WIDTH": width, "BLOCK": max(8, block_of(width)), "DROPOUT": True}

    def forward(warps: int) -> Callable[[], object]:
        return lambda: kernels.dropout_add_layer_norm_fwd_kernel[(rows,)](
            branch, branch_bias, stream, weight, bias, seed, x, out, rstd, rstd, normed, *DROPOUT, 1e-6, **size,
            HAS_BRANCH_BIAS=True, SAVE_NORMED=True, num_warps=warps,
        )  # fmt: skip

    element = branch.element_size()
    moved = rows * width * (8 + 3 * element)
    sweep(f"norm forward [{rows}, {width}]", moved, [x, out, normed], ((f"{w} warps", forward(w)) for w in (4, 2, 8)))

    def backward(programs: int, warps: int, stages: int) -> Callable[[], object]:
        programs, rows_per_program = backward_grid(rows, programs)
        partials = torch.empty(programs, 3, width, device=device)
        return lambda: kernels.dropout_add_layer_norm_bwd_kernel[(programs,)](
            grad_out, grad_x, normed, weight, bias, rstd, rstd, seed, grad_stream, grad_branch, again, partials, rows,
            rows_per_program, *DROPOUT, **size, HAS_GRAD_X=True, NORMED=True, STAGES=stages, num_warps=warps,
        )  # fmt: skip

    options = [
        (p, w, s) for p in (528, 264, 396, 792) for w in (4, 2, 8) for s in (3, 2, 4) if w > 2 or width <= 1024
    ]
    candidates = ((f"{p} programs, {w} warps, {s} stages", backward(p, w, s)) for p, w, s in options)
    sweep(
        f"norm backward [{rows}, {width}]",
        rows * width * (8 + 4 * element),
        [grad_stream, grad_branch, again],
        candidates,
    )


def gelu(sweep: Sweep, rows: int, width: int, device: torch.device, low: torch.dtype) -> None:
    """Backward of GELU + dropout."""
    grad_out, pre = (torch.randn(rows, width, device=device).to(low) for _ in range(2))
    grad_pre, out, seed = torch.empty_like(pre), torch.empty_like(pre), torch.tensor([5], device=device)

    # The block of columns stays: the dropout's counters depend on it.
    def backward(programs: int, warps: int, stages: int) -> Callable[[], object]:
        block = max(8, min(1024, block_of(width)))
        tiles = -(-width // block)
        runs, rows_per_program = backward_grid(rows, max(1, programs // tiles))
        partials = torch.empty(runs, width, device=device)
        return lambda: kernels.gelu_dropout_bwd_kernel[(runs, tiles)](
            grad_out, pre, seed, grad_pre, out, partials, rows, rows_per_program, *DROPOUT, WIDTH=width, BLOCK=block,
            DROPOUT=True, STAGES=stages, num_warps=warps,
        )  # fmt: skip

    options = [(p, w, s) for p in (528, 396, 792, 1056, 1584) for w in (4, 8) for s in (3, 2, 4)]
    candidates = ((f"{p} programs, {w} warps, {s} stages", backward(p, w, s)) for p, w, s in options)
    sweep(f"GELU backward [{rows}, {width}]", 4 * pre.numel() * pre.element_size(), [grad_pre, out], candidates)


def adamw(sweep: Sweep, size: int, device: torch.device) -> None:
    """One parameter of this size with average and bf16 copy (fp16 in the interpreter)."""
    weight, grad, first, second, average = (torch.randn(size, device=device) for _ in range(5))
    copy = weight.to(torch.bfloat16 if device.type == "cuda" else torch.float16)
    step, divisor = torch.ones((), device=device), torch.ones(1, device=device)
    second.abs_()
    tensors = (weight, grad, first, second, step, average, copy)
    table = torch.tensor([*(tensor.data_ptr() for tensor in tensors), size], device=device)
    scalars = (1e-4, 2e-6, 0.1, 0.95, 0.05, -0.152, -0.074, 1e-8, 1e-4)

    def update(chunk: int, warps: int) -> Callable[[], object]:
        numbers = torch.arange(-(-size // chunk), dtype=torch.int32, device=device)
        chunks = torch.stack([torch.zeros_like(numbers), numbers], 1).contiguous()
        low = tl.bfloat16 if device.type == "cuda" else tl.float16

        def call() -> None:
            adamw_kernels.adamw_kernel[(len(numbers),)](
                table, chunks, divisor, *scalars, LOW=low, CHUNK=chunk, num_warps=warps
            )

        return call

    starts = [tensor.clone() for tensor in (weight, first, second, average)]

    def reset() -> None:
        for tensor, start in zip((weight, first, second, average), starts, strict=True):
            tensor.copy_(start)

    options = ((1024, 8), (1024, 4), (2048, 8), (2048, 4), (4096, 8), (4096, 4), (8192, 16))
    candidates = ((f"chunks of {c}, {w} warps", update(c, w)) for c, w in options)
    sweep(f"AdamW of {size}", 38 * size, [weight, first, second, average, copy], candidates, reset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that this program runs")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    low = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter gets bf16 wrong
    sweep = Sweep(arguments.out, arguments.small)
    rows, widths = (6, (24,)) if arguments.small else (20480, (768, 1024, 1280))
    gelu(sweep, rows, 4 * widths[0], device, low)
    adamw(sweep, 3000 if arguments.small else 200_000_000, device)
    for width in widths:
        norm(sweep, rows, width, device, low)


if __name__ == "__main__":
    main()
