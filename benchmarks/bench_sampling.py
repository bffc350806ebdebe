"""Sampling with EAR-B, L and H in 64 steps, guidance 3: the public code, its blocks compiled, accelerated, and ours.
MAR-B and EAR-B with every other score and in a causal order: ours, and what of MAR is public.

    python -m benchmarks.bench_sampling --out FILE.json --only "EAR-B, (1|64) images?: (public|ours)$"     # a GPU

Latents alone, temperature 0.7, bf16. Ours is ``EAR.sample``, public benchmarks/public_ear.py under autocast. Each row
runs in a process of its own. "sampling": wall time of a call that is waited for, of one image, and of the first call
of the process; memory is all that torch reserves, weights included. Before ours is timed, the images of its first
three blocks are held against the plain loop's in float32. "first image": from a process that has the model on the GPU
to its first image on the host, with nothing in Triton's and inductor's folders, and once more. "by part": kernels of
one of the 64 steps, on average, by the profiler; the generator's part are our kernels for it, while products that
libraries make for it are matrix products.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.bench_train_step import NAMES, SMALL
from benchmarks.clocks import DEVICE, HAS_GPU, grouped, percentiles, profiled
from benchmarks.harness import FP8, OURS, PUBLIC, PUBLIC_ACCELERATED, PUBLIC_COMPILED, Row, Unavailable
from benchmarks.public_ear import PublicEAR, initialise
from benchmarks.public_mar import PublicMAR
from ear_kernels import accelerate
from ear_kernels.testing import FACTOR, errors
from ear_model.config import ModelConfig, SamplingConfig, with_score
from ear_model.draws import Draws
from ear_model.ear import EAR
from ear_model.presets import MODELS
from ear_model.sampling.decoding import decode_tokens
from ear_model.sampling.public import swap
from ear_model.score_names import SCORES

RIVALS = (PUBLIC, PUBLIC_COMPILED, PUBLIC_ACCELERATED, OURS, FP8)
BATCHES = {"EAR-B": (1, 8, 64, 256), "EAR-L": (1, 64), "EAR-H": (1, 64)}
SYSTEMS = {
    "MAR-B": MODELS["mar_base"],
    "EAR-B, causal": replace(MODELS["ear_base"], order="causal"),
    **{f"EAR-B, {score}": with_score(MODELS["ear_base"], score) for score in SCORES if score != "energy"},
}
"""The paper's other systems, the causal one in 256 steps; diffusion in 100 steps a token."""
CONFIGS = {**{title: MODELS[NAMES[title]] for title in BATCHES}, **SYSTEMS}
PROFILED = (1, 64)
STEPS, CHECK_STEPS, CHECK_DEPTH = (64, 8, 3) if HAS_GPU else (5, 3, 1)
GUIDANCE, TEMPERATURE = 3.0, 0.7
# Calls that are timed within so many seconds: at most, and at least within more.
LEAST, MOST, BUDGET_S, LONG_S = 3, 20, 2.0, 8.0
# e4m3 has four bits fewer than bf16.
ALLOWED = {OURS: FACTOR, FP8: 16 * FACTOR}

# Groups of a step's kernels, for `clocks.grouped`.
KINDS = {
    "attention": r"(?i)sdpa|flash|fmha|attention",
    "generator": r"adaln|silu|gate_(fwd|bwd)|generator|chain_kernel|modulations_kernel|embed_kernel",
    "norms and residuals": r"(?i)norm",
    "GELU": r"(?i)gelu",
    "matrix products": r"nvjet|gemm|cutlass|cublas|splitK|linear|scaled_mm",
    "the rest": "",
}


def is_ours(rival: str) -> bool:
    return rival.startswith(OURS)


def sample_ours(
    model: EAR, labels: Tensor, rival: str, steps: int, generator: torch.Generator | None = None
) -> Tensor:
    """Images of ``EAR.sample`` in bf16 or FP8, on a CPU in float32. Raises Unavailable where there is no FP8."""
    precision = "fp8" if rival == FP8 else "bf16" if HAS_GPU else "fp32"
    if precision == "fp8" and not (HAS_GPU and torch.cuda.get_device_capability() >= (9, 0)):
        raise Unavailable("needs a GPU of compute capability 9")
    options: dict[str, Any] = {"steps": steps, "guidance": GUIDANCE, "temperature": TEMPERATURE}
    return model.sample(labels, generator=generator, precision=precision, **options)


@torch.no_grad()
def sample_public(model: PublicEAR, labels: Tensor, steps: int) -> Tensor:
    # By place: the public EAR and MAR code have two names for the temperature.
    given: Any = len(labels), steps, GUIDANCE, "linear", labels, TEMPERATURE
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=HAS_GPU):
        return model.sample_tokens(*given)


def public_kind(config: ModelConfig) -> type[PublicEAR]:
    return PublicMAR if config.backbone == "mar" else PublicEAR


def make_model(kind: type[EAR] | type[PublicEAR], config: ModelConfig, images: int) -> tuple[Any, Tensor]:
    """A model in eval mode whose tokens are not all 0, and labels."""
    with DEVICE:
        model = kind(config).eval()
        initialise(model)
        return model, torch.randint(config.num_classes, (images,))


def sampler(config: ModelConfig, images: int, rival: str) -> Callable[[], Tensor]:
    """What samples ``images`` images as the rival does."""
    if is_ours(rival):
        return functools.partial(sample_ours, *make_model(EAR, config, images), rival, STEPS)
    public, labels = make_model(public_kind(config), config, images)
    if rival == PUBLIC_COMPILED:
        for block in (*getattr(public, "encoder_blocks", ()), *public.decoder_blocks):
            block.compile()
    if rival == PUBLIC_ACCELERATED:
        accelerate(public)
        if "sample_tokens" not in vars(public):
            swap(public)  # accelerate() knows of it in an installed package alone
    return functools.partial(sample_public, public, labels, STEPS)


def check(config: ModelConfig, images: int, rival: str) -> float:
    """RMS error of our images against the plain loop's in float32, over that of the plain loop in bf16.

    Both are PyTorch's own kernels, on the same draws, with the first blocks alone and in few steps: what rounding
    does grows from step to step.
    """
    stacks = ("depth", "encoder_depth") if config.backbone == "mar" else ("depth",)
    depths: dict[str, Any] = {name: min(getattr(config, name), CHECK_DEPTH) for name in stacks}
    model, labels = make_model(EAR, replace(config, **depths), images)
    sampling = SamplingConfig(CHECK_STEPS, GUIDANCE, "linear", TEMPERATURE)

    def seeded() -> torch.Generator:
        return torch.Generator(DEVICE).manual_seed(7)

    @torch.no_grad()
    def plain(low: bool) -> Tensor:
        eager = patch.dict(os.environ, EAR_KERNELS_BACKEND="eager")
        with eager, torch.autocast(DEVICE.type, torch.bfloat16, enabled=low):
            return model.tokenizer.decode(decode_tokens(model, labels, sampling, Draws(seeded())))

    exact, eager = plain(low=False), plain(low=True)
    ours = sample_ours(model, labels, rival, CHECK_STEPS, seeded())
    ratio = errors(ours, exact)[1] / errors(eager, exact)[1]
    # Written so that NaN is refused.
    if not ratio <= ALLOWED[rival]:
        raise AssertionError(f"images are {ratio:.2f} times as far off as the plain loop's in bf16")
    return ratio


def milliseconds(call: Callable[[], Tensor]) -> float:
    """Wall time of a call that is waited for."""
    begun = time.perf_counter()
    images = call()
    if HAS_GPU:
        torch.cuda.synchronize()
    took = 1e3 * (time.perf_counter() - begun)
    if not images.isfinite().all():
        raise AssertionError("the images hold NaN or Inf")
    return took


def later_calls(call: Callable[[], Tensor]) -> dict[str, float]:
    """ms of calls that are waited for one by one."""
    times = list[float]()
    while len(times) < MOST and sum(times) < 1e3 * (BUDGET_S if len(times) >= LEAST else LONG_S):
        times.append(milliseconds(call))
    return percentiles(times)


def run(name: str, images: int, rival: str) -> dict[str, Any]:
    """Everything to record of a "sampling" row."""
    config = CONFIGS[name] if HAS_GPU else SMALL
    call = sampler(config, images, rival)
    record: dict[str, Any] = {"first_ms": milliseconds(call)}
    if is_ours(rival):
        record["error_over_eager"] = check(config, images, rival)
        gc.collect()
        if HAS_GPU:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        milliseconds(call)  # gets the memory back that the line above gave away
    record["wall_ms"] = later_calls(call)
    if HAS_GPU:
        record["peak_bytes"] = torch.cuda.max_memory_reserved()
        record["allocated_bytes"] = torch.cuda.max_memory_allocated()
    record["image_ms"] = {key: value / images for key, value in record["wall_ms"].items()}
    record["images_per_s"] = 1e3 / record["image_ms"]["median"]
    record["note"] = f"{record['image_ms']['median']:.4g} ms an image, first call {record['first_ms']:,.0f} ms"
    return record


def run_first_image(name: str, rival: str) -> dict[str, Any]:
    """Wall time from a model on the GPU to its first image on the host, of a process that did nothing else."""
    call = sampler(CONFIGS[name] if HAS_GPU else SMALL, 1, rival)
    if HAS_GPU:
        torch.cuda.synchronize()
    return {"wall_ms": {"median": milliseconds(lambda: call().cpu())}}


def run_by_part(name: str, images: int, rival: str) -> dict[str, Any]:
    """ms of a step's kernels, by kind and one by one."""
    call = sampler(CONFIGS[name], images, rival)
    milliseconds(call)
    kernels = profiled([call], least=1)
    table = [
        {"name": row["name"], "ms": row["ms"] / STEPS, "launches": row["launches"] / STEPS} for row in kernels.table
    ]
    return {
        "gpu_ms": {"median": kernels.busy_ms / STEPS},
        "kernels_ms": kernels.ms / STEPS,
        "launches": kernels.launches / STEPS,
        "groups": grouped(table, KINDS),
        "kernels": table[:40],
    }


def in_folder(folder: str, name: str, rival: str) -> dict[str, Any]:
    """:func:`run_first_image` in a new process that finds and leaves compiled kernels in that folder."""
    places = {f"{program}_CACHE_DIR": str(Path(folder) / program) for program in ("TRITON", "TORCHINDUCTOR")}
    with patch.dict(os.environ, places):
        return harness.in_new_process(run_first_image, name, rival, start="spawn")


@functools.cache
def filled_folder(name: str, rival: str) -> tuple[tempfile.TemporaryDirectory, dict[str, Any]]:
    """A folder with what one process compiled, and that process's record."""
    folder = tempfile.TemporaryDirectory()
    return folder, in_folder(folder.name, name, rival)


def first_image(name: str, rival: str, warm: bool) -> dict[str, Any]:
    folder, record = filled_folder(name, rival)
    return in_folder(folder.name, name, rival) if warm else record


def row(case: str, rival: str, run_it: Callable[..., dict[str, Any]], *given: Any) -> Row:
    return Row(case, rival, measure=functools.partial(run_it, *given))


def count(images: int) -> str:
    return f"{images} image{'' if images == 1 else 's'}"


def make_rows() -> list[Row]:
    rows = [
        row(f"sampling, {title}, {count(images)}", rival, harness.in_new_process, run, title, images, rival)
        for title, batches in BATCHES.items()
        for images, rival in product(batches, RIVALS)
    ]
    for title, images in product(SYSTEMS, PROFILED):
        rivals = (PUBLIC, PUBLIC_ACCELERATED, OURS, FP8) if title == "MAR-B" else (OURS,)
        case = f"sampling, {title}, {count(images)}"
        rows += [row(case, rival, harness.in_new_process, run, title, images, rival) for rival in rivals]
    for title, (warm, words), rival in product(("EAR-B",), ((False, "empty"), (True, "warm")), RIVALS):
        rows.append(row(f"first image, {title}, {words} caches", rival, first_image, title, rival, warm))
    for title, images, rival in product(("EAR-B", "EAR-B, causal", "MAR-B"), PROFILED, (PUBLIC, OURS, FP8)):
        if title != "EAR-B" and rival != OURS:
            continue
        case, given = f"by part, {title}, {count(images)}", (title, images, rival)
        rows.append(row(case, rival, harness.in_new_process, run_by_part, *given))
    return rows


ROWS = harness.needs_gpu(make_rows())
ROWS += [] if HAS_GPU else [row("sampling, small, 2 images", rival, run, "", 2, rival) for rival in RIVALS]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_sampling(row: Row, run_row) -> None:
    run_row(row)


if __name__ == "__main__":
    sys.exit(harness.main(ROWS, __doc__))
