"""The public models before and after ``accelerate(model)``: training steps of 64 images, sampling of 1, 8 and 64.

    python -m benchmarks.bench_accelerate --out FILE.json --only "EAR-B, sampling"         # a GPU

Stand-ins of the public code (benchmarks/public_ear.py, public_mar.py) in bf16 autocast over float32 weights; training
is forward, backward, clip and AdamW. Each row runs in a process of its own, so that its first call is one. EAR draws
in 64 steps with guidance 3; MAR in 8 steps of its 64, each of 100 steps of diffusion, with guidance 2.9. A row fails
if what is accelerated is slower than the public code by more than 3 %, by which two measurements of the same differ,
or if it gives something else: checked in float32 on models of two blocks, with the same draws.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.bench_sampling import later_calls, milliseconds
from benchmarks.bench_train_step import SMALL
from benchmarks.clocks import DEVICE, HAS_GPU
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
SLACK = 1.03
TOLERATED = 1e-4
"""Of float32 results: rounding grows over decoding steps, and a GPU's sums have another order."""


def make_call(name: str, kind: str, images: int, *, accelerated: bool, checked: bool = False) -> Callable[[], Tensor]:
    """A training step, or the sampling of a batch; to be ``checked``, a small one in float32."""
    torch.manual_seed(0)
    public, config = PUBLIC_MODELS[name]
    if checked:
        config = replace(config, depth=2, dropout=0.0, attention_dropout=0.0)
        config = config if public is PublicEAR else replace(config, encoder_depth=2)
    is_small = checked or not HAS_GPU
    options = {} if public is PublicEAR else {"num_sampling_steps": 4 if is_small else 100}
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
    autocast = functools.partial(torch.autocast, DEVICE.type, torch.bfloat16, enabled=not is_small)
    if kind == "sampling":
        steps, guidance = SAMPLING[name]
        steps = min(steps, 3) if checked else steps

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
        norm = nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach(), norm])

    return step


def check(name: str, kind: str) -> float:
    """Largest difference of what accelerated models give from what public ones do, over the latter's largest number.

    In float32, without dropout, of models of two blocks and with the same draws; of a training step loss and norm of
    the gradient.
    """
    found = []
    for accelerated in (False, True):
        call = make_call(name, kind, 2, accelerated=accelerated, checked=True)
        torch.manual_seed(1)
        np.random.seed(1)
        found.append(call().double())
    difference = float((found[1] - found[0]).abs().max() / found[0].abs().max())
    # Written so that NaN is refused.
    if not difference <= TOLERATED:
        raise AssertionError(f"accelerated, {name} gives {kind} results that differ by {difference:.1e}")
    return difference


def run(name: str, kind: str, images: int, accelerated: bool) -> dict[str, Any]:
    """First call, later calls and memory; of what is accelerated also its :func:`check`."""
    call = make_call(name, kind, images, accelerated=accelerated)
    first = milliseconds(call)
    milliseconds(call)
    record = {"first_ms": first, "wall_ms": later_calls(call)}
    record |= {"peak_bytes": torch.cuda.max_memory_reserved()} if HAS_GPU else {}
    return record | ({"difference": check(name, kind)} if accelerated else {})


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
