"""One call on the GPU machine: correctness of the energy-loss kernels, then the time of every variant.

    python benchmarks/gpu_check_b.py            # about five minutes; JSON goes to $OUT (or benchmarks/results)
    python benchmarks/gpu_check_b.py --skip-tests --only calm

Every stage is guarded: a failure is printed and the next stage runs. The table is printed last.

Predictions for an H200 (copy 4.28 TB/s, 2.96e13 fp32 lanes a second at 1.755 GHz), written before the first run:

- EAR 1M: 335 MB at 4.28 TB/s = 0.078 ms; main kernel 85-92 % of it: 0.085-0.092, + sum of 16,384 partials 0.003
  + scale kernel that returns 0.002: 0.090-0.097 ms. Issue slots are about 25 us, under the memory time.
- EAR 32k: 3 launches of 2-4 us each: 0.007-0.009 ms on the GPU; 0.055-0.075 ms of Python.
- CALM: a target and feature costs 24 lanes for distances and gradients, 28 for the draw, 20 for sums: 72;
  105e6 of them at 2.96e13 = 0.26 ms at full issue for 8,192 rows. 244 registers = 8 warps an SM: 55-70 % of issue:
  0.37-0.47 ms; 2,048 rows a quarter of it, 1.94 waves: 0.10-0.13 ms. 7 rounds save 5 slots: -7 %.
- ensemble: 132 MB = 0.031 ms; 272 ordered pairs of 6 operations on 1e6 rows: 0.055 ms of issue: 0.07-0.10 ms.
- whole field: samples twice, target twice, gradients once: 0.83 GB = 0.195 ms; with 72 pairs of 3 + 3 operations on
  8e6 features 0.12 ms of issue in all: 0.25-0.35 ms.
- energy distance: three TF32 products on 2 x 2.5e9 pairs (the within sums are halves) of 64 features: 1.9 TFLOP
  at 200-300 TFLOP/s = 6-10 ms, + root and sum of 5e9 pairs at 15 operations 2.5 ms: 9-13 ms; cdist about 60 ms.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import energy_cases, timing  # noqa: E402
from benchmarks.shapes import GPU_DISTANCES, GPU_SHAPES  # noqa: E402
from ear_kernels import launch  # noqa: E402
from ear_kernels.ops.energy_loss import launchers  # noqa: E402

ROWS: list[dict] = []
DEVICE = torch.device("cuda")


@contextlib.contextmanager
def patched(owner, name, value):
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def save(out: Path) -> None:
    (out / "energy_check.json").write_text(json.dumps({"environment": timing.environment(), "rows": ROWS}, indent=1))


def note(stage: str, variant: str, **values) -> None:
    ROWS.append({"stage": stage, "variant": variant, **values})
    print(f"[{time.perf_counter() - START:6.1f} s] {stage:16s} {variant:40s} {values}", flush=True)


def measure(
    stage: str, variant: str, calls, moved: int, rate: float, wall: bool = False, memory: bool = False
) -> None:
    """Time one variant; a failure (a compiler's, say) is a row of its own."""
    try:
        times = timing.gpu_milliseconds(calls, budget_s=0.4, rounds=9)
        values = {"ms": round(times["median"], 4), "p20": round(times["p20"], 4), "p80": round(times["p80"], 4)}
        values["of_copy"] = round(moved / (times["median"] * 1e-3) / rate, 3)
        if wall:
            values["wall_ms"] = round(timing.wall_milliseconds(calls, budget_s=0.3, rounds=7)["median"], 4)
        if memory:
            values["peak_MB"] = round(timing.peak_bytes(calls[0]) / 1e6, 2)
        note(stage, variant, **values)
    except Exception as error:
        traceback.print_exc()
        note(stage, variant, error=f"{type(error).__name__}: {error}".splitlines()[0][:160])


def forward_only(shape, device):
    """Calls of the launcher alone: no autograd, no scaling."""
    calls = []
    for call_seed in range(max(1, min(64, -(-energy_cases.ROTATE_BELOW // shape.ours_bytes)))):
        tensors = [t.detach() for t in energy_cases.make_inputs(shape, device, call_seed)]
        if shape.gaussian:
            seed = torch.tensor([5], device=device)
            calls.append(
                lambda t=tensors, s=seed: launchers.energy_gaussian_forward(
                    t[0].movedim(0, -2), t[1], t[2], s, shape.m, None, None, None, 1.0, 1.0, 0.0, "mean", True, False
                )
            )
        else:
            calls.append(
                lambda t=tensors: launchers.energy_loss_forward(
                    t[0], t[1].unsqueeze(1), None, None, None, 1.0, 1.0, 0.0, "mean", True, False
                )
            )
    return calls


def stage_rows(rate: float, only: str) -> None:
    by_name = {shape.name: shape for shape in GPU_SHAPES}
    for name in ("EAR 1M", "EAR 32k", "ensemble"):
        if only not in name.lower():
            continue
        shape = by_name[name]
        base = launch.energy_rows_config(shape.n, shape.features)
        calls = forward_only(shape, DEVICE)
        candidates = (
            [(32, 2), (32, 4), (64, 2), (64, 4), (64, 8), (128, 4), (128, 8), (16, 1), (32, 1)]
            if shape.features > 1
            else [(32, 1), (64, 2), (64, 4), (128, 4), (128, 8), (256, 8), (32, 4)]
        )
        for block_r, warps in candidates:
            config = dataclasses.replace(base, block_r=block_r, num_warps=warps)
            with patched(launch, "energy_rows_config", lambda *a, c=config: c):
                measure(name, f"forward: {block_r} rows, {warps} warps", calls, shape.ours_bytes, rate)


def stage_calm(rate: float, only: str) -> None:
    for shape in GPU_SHAPES:
        if not shape.gaussian or only not in shape.name.lower():
            continue
        base = launch.energy_gaussian_config(shape.n, shape.features)
        calls = forward_only(shape, DEVICE)
        for block_r, warps, unroll in (
            (1, 1, 4),
            (1, 1, 2),
            (1, 1, 1),
            (1, 2, 4),
            (1, 2, 1),
            (2, 2, 1),
            (2, 2, 4),
            (1, 4, 1),
        ):
            config = dataclasses.replace(base, block_r=block_r, num_warps=warps, unroll=unroll)
            with patched(launch, "energy_gaussian_config", lambda *a, c=config: c):
                label = f"{block_r} rows, {warps} warps, unroll {unroll}"
                measure(shape.name, f"forward: {label}", calls, shape.ours_bytes, rate)


def stage_field(rate: float) -> None:
    shape = next(shape for shape in GPU_SHAPES if shape.name == "whole field")
    calls = forward_only(shape, DEVICE)
    for block_d, warps in ((256, 4), (512, 4), (512, 8), (1024, 4), (1024, 8), (2048, 8), (256, 2)):
        config = launch.TileConfig(1, 8, block_d, warps)
        with patched(launch, "energy_field_config", lambda *a, c=config: c):
            measure("whole field", f"forward: {block_d} features, {warps} warps", calls, shape.ours_bytes, rate)


def stage_distance(rate: float) -> None:
    shape = GPU_DISTANCES[0]
    moved = energy_cases.distance_bytes(shape)
    wanted = energy_cases.distance_call(shape, "cdist", DEVICE)().item()
    for label, name, config in (
        ("product 128x64x32, 8 warps, 2 stages", "PAIRWISE_PRODUCT", launch.PairwiseConfig(128, 64, 32, 8, 2)),
        ("product 128x64x32, 4 warps, 2 stages", "PAIRWISE_PRODUCT", launch.PairwiseConfig(128, 64, 32, 4, 2)),
        ("product 128x128x32, 8 warps, 2 stages", "PAIRWISE_PRODUCT", launch.PairwiseConfig(128, 128, 32, 8, 2)),
        ("product 128x128x32, 8 warps, 1 stage", "PAIRWISE_PRODUCT", launch.PairwiseConfig(128, 128, 32, 8, 1)),
        ("product 64x64x64, 4 warps, 2 stages", "PAIRWISE_PRODUCT", launch.PairwiseConfig(64, 64, 64, 4, 2)),
        ("exact 64x64, 4 warps", "PAIRWISE_EXACT", launch.PairwiseConfig(64, 64, 1, 4, 3)),
        ("exact 64x64, 4 warps, unroll 4", "PAIRWISE_EXACT", launch.PairwiseConfig(64, 64, 4, 4, 3)),
        ("exact 128x128, 8 warps", "PAIRWISE_EXACT", launch.PairwiseConfig(128, 128, 1, 8, 3)),
    ):
        features = 10**9 if name == "PAIRWISE_EXACT" else 16
        with patched(launch, name, config), patched(launch, "PAIRWISE_PRODUCT_FEATURES", features):
            call = energy_cases.distance_call(shape, "ours", DEVICE)
            try:
                value = call().item()
                note("energy distance", label, value=value, cdist=wanted)
            except Exception as error:
                traceback.print_exc()
                note("energy distance", label, error=f"{type(error).__name__}: {error}".splitlines()[0][:160])
                continue
            measure("energy distance", label, [call], moved, rate, memory=True)
    measure(
        "energy distance", "cdist", [energy_cases.distance_call(shape, "cdist", DEVICE)], moved, rate, memory=True
    )


def stage_rivals(rate: float, only: str) -> None:
    """Forward + backward through the public functions, against eager and torch.compile; checked first."""
    for shape in GPU_SHAPES:
        if only not in shape.name.lower():
            continue
        try:
            note(shape.name, "relative error", error_of_ours=energy_cases.check_step(shape, DEVICE))
        except Exception as error:
            traceback.print_exc()
            note(shape.name, "WRONG", error=f"{type(error).__name__}: {error}".splitlines()[0][:160])
        for which in ("ours", "compiled", "eager"):
            try:
                calls = energy_cases.step_calls(shape, which, DEVICE)
                measure(shape.name, f"step: {which}", calls, shape.ours_bytes, rate, wall=True, memory=True)
            except Exception as error:
                note(shape.name, f"step: {which}", error=str(error)[:160])
            torch.cuda.empty_cache()


def stage_equivalence(seeds: int = 3) -> None:
    """The structures of the tests, every dtype, without Hypothesis."""
    from tests.kernels.problems import STRUCTURES, Problem
    from tests.kernels.test_energy_loss_triton import check

    failed = count = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        for rows, n, m, features, sample_dim, strided, alpha, eps, reduction, mask, weights, fw in STRUCTURES:
            for seed in range(seeds):
                problem = Problem(
                    rows, n, m, features, sample_dim, strided, alpha, 0.9, eps, reduction, mask, weights, fw,
                    coincident=seed == 1, magnitude=(1.0, 1e-3, 300.0)[seed % 3], seed=seed,
                )  # fmt: skip
                count += 1
                try:
                    check(problem, dtype, DEVICE)
                except Exception as error:
                    failed += 1
                    note("equivalence", f"{dtype} {problem}", error=f"{type(error).__name__}: {error}"[:300])
    note("equivalence", "structures x dtypes x seeds", checked=count, failed=failed)


def stage_tests(examples: int, seconds: int) -> None:
    """The test files in parallel processes (16 cores; compilation is what takes time)."""
    selections = {
        "fp32 values": "tests/kernels/test_energy_loss_triton.py -k test_values_and_gradients[dtype0]",
        "fp16 values": "tests/kernels/test_energy_loss_triton.py -k test_values_and_gradients[dtype1]",
        "bf16 values": "tests/kernels/test_energy_loss_triton.py -k test_values_and_gradients[dtype2]",
        "fp64 values": "tests/kernels/test_energy_loss_triton.py -k test_values_and_gradients[dtype3]",
        "composition": "tests/kernels/test_energy_loss_triton.py -k not test_values_and_gradients",
        "gaussian": "tests/kernels/test_energy_loss_gaussian.py -k not same_draws",
        "gaussian same draws": "tests/kernels/test_energy_loss_gaussian.py -k same_draws",
        "distance, mappings": "tests/kernels/test_energy_distance.py tests/kernels/test_energy_loss_mappings.py",
    }
    environment = {**os.environ, "EAR_TEST_EXAMPLES": str(examples), "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    running = {}
    for name, selection in selections.items():
        files, _, expression = selection.partition(" -k ")
        if "[" in expression:
            files, arguments = f"{files}::{expression}", []
        else:
            arguments = ["-k", expression] if expression else []
        running[name] = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider",
             *files.split(), *arguments],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    end = time.perf_counter() + seconds
    for name, process in running.items():
        try:
            text, _ = process.communicate(timeout=max(1.0, end - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            text, _ = process.communicate()
            text += "\nTIMED OUT"
        last = [line for line in text.splitlines() if line.strip()][-1:] or ["nothing"]
        if process.returncode != 0:
            print(f"--- {name}\n{text[-5000:]}", flush=True)
        note("tests", name, returncode=process.returncode, summary=last[0][:100])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--skip-variants", action="store_true")
    parser.add_argument("--examples", type=int, default=60)
    parser.add_argument("--test-seconds", type=int, default=150)
    parser.add_argument("--only", default="", help="part of a shape's name, in small letters")
    arguments = parser.parse_args()
    out = Path(os.environ.get("OUT", ROOT / "benchmarks" / "results"))
    out.mkdir(parents=True, exist_ok=True)
    only = arguments.only
    rate = timing.copy_rate()
    note("copy", "1 GB", tb_per_s=round(rate / 1e12, 3))
    stages = []
    if not arguments.skip_tests:
        try:
            import hypothesis  # noqa: F401
            import pytest  # noqa: F401

            stages.append(lambda: stage_tests(arguments.examples, arguments.test_seconds))
        except ImportError as error:
            note("tests", "not run", error=str(error))
            stages.append(stage_equivalence)
    stages.append(lambda: stage_rivals(rate, only))
    if not arguments.skip_variants:
        stages += [lambda: stage_rows(rate, only), lambda: stage_calm(rate, only)]
        if only in "whole field":
            stages.append(lambda: stage_field(rate))
    if only in "energy distance":
        stages.append(lambda: stage_distance(rate))
    for stage in stages:
        try:
            stage()
        except Exception:
            traceback.print_exc()
        save(out)
    print("\nstage            variant                                        ms     copy    wall   peak MB")
    for row in ROWS:
        if "ms" in row:
            print(
                f"{row['stage']:16s} {row['variant']:42s} {row['ms']:8.4f} {row['of_copy']:7.1%} "
                f"{row.get('wall_ms', float('nan')):8.4f} {row.get('peak_MB', float('nan')):9.2f}"
            )
        else:
            rest = {k: v for k, v in row.items() if k not in ("stage", "variant")}
            print(f"{row['stage']:16s} {row['variant'][:60]:42s} {rest}")


if __name__ == "__main__":
    START = time.perf_counter()
    main()
