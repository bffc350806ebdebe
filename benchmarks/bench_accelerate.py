"""The public models before and after ``accelerate(model)``: training steps of 64 images, sampling of 1, 8 and 64.

    python -m benchmarks.bench_accelerate --out FILE.json --only "EAR-B, sampling"         # a GPU

Stand-ins of the public code (benchmarks/public_ear.py, public_mar.py) in bf16 autocast over float32 weights; training
is forward, backward, clip and AdamW. Each row runs in a process of its own, so that its first call is one. EAR draws
in 64 steps with guidance 3; MAR in 8 steps of its 64, each of 100 steps of diffusion, with guidance 2.9. A row fails
if what is accelerated is slower than the public code by more than 3 %, by which two measurements of the same differ.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.bench_train_step import SMALL
from benchmarks.clocks import DEVICE, HAS_GPU, percentiles
from benchmarks.harness import PUBLIC, PUBLIC_ACCELERATED, Row
from benchmarks.public_ear import PublicEAR, initialise
from benchmarks.public_mar import PublicMAR
from ear_kernels import accelerate
from ear_model.config import with_score
from ear_model.presets import MODELS
from ear_model.sampling.public import swap

SMALL_MAR = replace(with_score(SMALL, "diffusion"), backbone="mar", encoder_depth=2)
PUBLIC_MODELS: dict[str, tuple[type[PublicEAR], Any]] = {
    "EAR-B": (PublicEAR, MODELS["ear_base"] if HAS_GPU else SMALL),
    "MAR-B": (PublicMAR, MODELS["mar_base"] if HAS_GPU else SMALL_MAR),
}
BATCHES = (1, 8, 64) if HAS_GPU else (1, 2)
SAMPLING = {"EAR-B": (64 if HAS_GPU else 3, 3.0), "MAR-B": (8 if HAS_GPU else 2, 2.9)}
LEAST, MOST, BUDGET_S = 3, 20, 3.0
SLACK = 1.03


def make_call(name: str, kind: str, images: int, *, accelerated: bool) -> Callable[[], Tensor]:
    """A training step, or the sampling of a batch."""
    torch.manual_seed(0)
    public, config = PUBLIC_MODELS[name]
    # With what a test can wait for on a CPU.
    options = {} if HAS_GPU or public is PublicEAR else {"num_sampling_steps": 4}
    with DEVICE:
        model = public(config, **options)
        initialise(model)
        latents = torch.randn(images, config.channels, config.image_size, config.image_size)
        labels = torch.randint(config.num_classes, (images,))
    model.train(kind == "training")
    if accelerated:
        accelerate(model)
        if public is PublicEAR and "sample_tokens" not in vars(model):
            swap(model)  # accelerate() knows of it in an installed package alone
    autocast = functools.partial(torch.autocast, DEVICE.type, torch.bfloat16, enabled=HAS_GPU)
    if kind == "sampling":
        steps, guidance = SAMPLING[name]

        def sample() -> Tensor:
            with torch.no_grad(), autocast():
                return model.sample_tokens(images, steps, guidance, labels=labels)

        return sample
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=HAS_GPU)

    def step() -> Tensor:
        with autocast():
            loss = model(latents, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def milliseconds(call: Callable[[], Tensor]) -> float:
    """Wall time of a call that is waited for."""
    begun = time.perf_counter()
    found = call()
    if HAS_GPU:
        torch.cuda.synchronize()
    took = 1e3 * (time.perf_counter() - begun)
    if not found.isfinite().all():
        raise AssertionError("the result holds NaN or Inf")
    return took


def run(name: str, kind: str, images: int, accelerated: bool) -> dict[str, Any]:
    """First call, later calls and memory."""
    call = make_call(name, kind, images, accelerated=accelerated)
    first, times = milliseconds(call), list[float]()
    milliseconds(call)
    while len(times) < LEAST or (len(times) < MOST and sum(times) < 1e3 * BUDGET_S):
        times.append(milliseconds(call))
    peak = {"peak_bytes": torch.cuda.max_memory_reserved()} if HAS_GPU else {}
    return {"first_ms": first, "wall_ms": percentiles(times), **peak}


@functools.cache
def run_public(name: str, kind: str, images: int) -> dict[str, Any]:
    return harness.in_new_process(run, name, kind, images, False)


def measure(name: str, kind: str, images: int, accelerated: bool) -> dict[str, Any]:
    """A row; of what is accelerated beside the public code's, and failed if that is faster."""
    public = run_public(name, kind, images)
    if not accelerated:
        return public
    record = harness.in_new_process(run, name, kind, images, True)
    return judged(record, public)


def judged(record: dict[str, Any], public: dict[str, Any]) -> dict[str, Any]:
    """The record of what is accelerated, with how much faster it is; ``failed`` if it is slower."""
    speedup = public["wall_ms"]["median"] / record["wall_ms"]["median"]
    note = f"{speedup:.2f} times as fast, first call {record['first_ms']:,.0f} ms against {public['first_ms']:,.0f}"
    found = {**record, "speedup": speedup, "note": note}
    return found if speedup * SLACK >= 1 else {**found, "failed": f"slower than the public code: {note}"}


def make_rows() -> list[Row]:
    rows = []
    for name in PUBLIC_MODELS:
        kinds = [("training", BATCHES[-1]), *(("sampling", images) for images in BATCHES)]
        for (kind, images), accelerated in product(kinds, (False, True)):
            rival = PUBLIC_ACCELERATED if accelerated else PUBLIC
            case = f"{name}, {kind}, {images} image{'' if images == 1 else 's'}"
            rows.append(Row(case, rival, measure=functools.partial(measure, name, kind, images, accelerated)))
    return rows


ROWS = harness.needs_gpu(make_rows())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_accelerate(row: Row, run_row) -> None:
    run_row(row)


if __name__ == "__main__":
    sys.exit(harness.main(ROWS, __doc__))
