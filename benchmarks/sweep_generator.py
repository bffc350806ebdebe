# ruff: noqa: B023 (timed closures are called in the iteration that makes them)
"""The launches behind the generator's static tables, timed on a GPU (results/*_sweep_h200_*.txt).

    python benchmarks/sweep_generator.py adaln silu        # about a minute on an H200

Times only, for launches that the tests check; each table keeps the fastest that does not spill, or says why not.
"""

import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from ear_kernels.ops.adaln import autograd as adaln
from ear_kernels.ops.silu_ffn import kernels as ffn_kernels

ROWS = 65_536
BF16 = torch.bfloat16


def milliseconds(call: Callable[[], object], launches: int = 5, rounds: int = 3) -> float:
    """Median of a call's GPU time."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(launches):
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / launches)
    return statistics.median(times)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


def sweep_adaln() -> None:
    """The fused backward, everything on, one modulation a row and one for four."""
    for width, group in ((1024, 1), (1280, 1), (1536, 1), (1024, 4), (1536, 4)):
        entries = ROWS // group
        hidden, grad, residual, ffn = (draw(ROWS, width) for _ in range(4))
        mod, before = draw(entries, 3 * width), draw(entries, 3 * width)
        shift, scale, gate = mod[:, :width], mod[:, width : 2 * width], before[:, 2 * width :]
        weight, bias = (torch.randn(width, device="cuda") for _ in range(2))
        stats = torch.randn(ROWS, device="cuda"), torch.rand(ROWS, device="cuda")
        passes = 11 if group == 1 else 7 + 6 / group
        found = []
        for warps, stages, programs, capped in itertools.product((4, 8, 16), (1, 2), (132, 264, 396, 528), (0, 1)):
            registers = {4: 128, 8: 80, 16: 64}[warps] if capped else None
            config = adaln.RowConfig(warps, stages, programs, registers)
            adaln.BACKWARD_ROWS[adaln.block_of(width)] = (config, config)

            def call() -> None:
                adaln.launch_backward(
                    grad, hidden, scale, weight, bias, stats, residual, None if group == 1 else shift, scale,
                    group=group, grad_residual=residual, previous=(ffn, gate, ffn, gate), sum_affine=True,
                    sum_ffn=True, sum_modulation=group == 1, unit_rows=group, previous_hidden=hidden,
                )  # fmt: skip

            found.append((milliseconds(call), str(config)))
        for ms, name in sorted(found)[:6]:
            rate = passes * ROWS * width * 2 / ms / 1e9
            print(f"adaln_bwd W={width} group={group} {ms:.3f} ms {rate:.2f} TB/s {name}")


def sweep_silu() -> None:
    """dSiLU with the activation again."""
    for width in (1024, 1280, 1536):
        grad, pre = draw(ROWS, width), draw(ROWS, width)
        found = []
        for warps, stages, programs in itertools.product((2, 4, 8), (1, 2, 3), (528, 1056, 2112, 4224)):
            partials = torch.empty(programs, width, device="cuda")
            rows = -(-ROWS // programs)

            def call(
                rows=rows, partials=partials, stages=stages, warps=warps, grad=grad, pre=pre, width=width
            ) -> None:
                ffn_kernels.silu_bwd_kernel[(-(-ROWS // rows),)](
                    grad, pre, grad, pre, partials, ROWS, rows, width, width, width, width, WIDTH=width,
                    BLOCK=adaln.block_of(width), STORE_ACTIVE=True, STAGES=stages, num_warps=warps,
                )  # fmt: skip

            found.append((milliseconds(call), f"{warps} warps, {stages} stages, {programs} programs"))
        for ms, name in sorted(found)[:3]:
            print(f"silu_bwd W={width} {ms:.3f} ms {4 * ROWS * width * 2 / ms / 1e9:.2f} TB/s {name}")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or ("adaln", "silu"):
        {"adaln": sweep_adaln, "silu": sweep_silu}[chosen]()
