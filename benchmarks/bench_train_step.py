"""A training step of 64 images of EAR-B, L and H: the public code's way, the same compiled, accelerated, and ours.

    python -m benchmarks.bench_train_step --out FILE.json --only "EAR-B"       # a GPU; a minute or two a row

4 samples a token, bf16 autocast over float32 weights, dropout as in the paper; forward, backward, clip, AdamW, EMA.
Ours is ``Trainer.train_step`` as `ear train imagenet256` calls it, on a cache of random latents. Eager is the public
code's way, benchmarks/public_ear.py with PyTorch's fused AdamW; compiled are its blocks and its head, which is what
can be. Each row runs in a process of its own. GPU time is how long kernels ran, wall time that of steps back to back,
memory all that torch reserves, with what CUDA graphs keep between their kernels. Before ours is timed, loss and
gradients of a smaller model are held against its eager backend.
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
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.bench_loader import write_latents
from benchmarks.clocks import DEVICE, HAS_GPU, grouped, percentiles, profiled
from benchmarks.harness import COMPILED, EAGER, OURS, Row
from benchmarks.public_ear import PublicEAR, compile_parts, initialise
from ear_kernels import accelerate
from ear_kernels.testing import errors
from ear_model.config import ModelConfig, RunConfig
from ear_model.presets import MODELS, RUNS
from ear_model.training.distributed import leave_out_gemm_workspace, prefer_expandable_segments
from ear_model.training.estimate import training_flops
from ear_model.training.trainer import Trainer

ACCELERATED = "accelerate()"
SETTINGS: dict[str, dict[str, Any]] = {
    OURS: {},
    f"{OURS}, pool R/K = 4": {"rows_per_noise": 4},
    f"{OURS}, 2 loss chunks": {"loss_chunks": 2},
    f"{OURS}, 4 loss chunks": {"loss_chunks": 4},
}
NAMES = {"EAR-B": "ear_base", "EAR-L": "ear_large", "EAR-H": "ear_huge"}
IMAGES, WARM, ROUNDS, STEPS = (64, 6, 6, 4) if HAS_GPU else (16, 2, 3, 2)
SMALL = replace(
    MODELS["ear_base"], image_size=4, width=64, depth=2, num_heads=4, class_tokens=4, generator_width=64,
    generator_depth=2, num_classes=10,
)  # fmt: skip

# Groups of a step's kernels, for `clocks.grouped`.
KINDS = {
    "attention": r"sdpa|flash|fmha|attention|dot_do_o|convert_dq",
    "matrix products": r"nvjet|gemm|cutlass|cublas|splitK|linear_kernel",
    "clip, AdamW, EMA": r"multi_tensor_apply|adamw",
    "GELU and dropout": r"gelu_dropout",
    "dropout, residual, norm": r"dropout_add_layer_norm",
    "AdaLN, SiLU, energy loss": r"adaln|silu|gate_|energy",
    "column sums": r"column_sums|reduce_kernel|GammaBeta|pack_heads",
    "the rest": "",
}


def make_config(model: ModelConfig, folder: Path, images: int = IMAGES, **train: Any) -> RunConfig:
    """That of `ear train imagenet256` on random latents, which are written to ``folder`` if they are not there."""
    cache = folder / "cache"
    if not cache.exists():
        cache.mkdir()
        write_latents(cache, 1024 if HAS_GPU else 64, model.image_size, model.num_classes)
    run = RUNS["imagenet256"]
    return replace(run, model=model, data_path=str(cache), train=replace(run.train, batch_size=images, **train))


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Loss and gradients of one step from weights of which every gradient is alive."""
    initialise(trainer.model)
    found: dict[str, Tensor] = {}
    for name, parameter in trainer.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda parameter, name=name: found.__setitem__(name, parameter.grad.clone())
        )
    found["loss"] = trainer.train_step()[0]
    return found


def check(name: str, rival: str) -> float:
    """Largest RMS error of ours against float32 over that of bf16 eager, which may be 2."""
    model = replace(MODELS[name], depth=3, generator_depth=2, dropout=0.0, attention_dropout=0.0)
    found = []
    for backend, precision in (("eager", "fp32"), ("eager", "bf16"), ("auto", "bf16")):
        with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, EAR_KERNELS_BACKEND=backend):
            config = make_config(model, Path(folder), images=8, precision=precision, **SETTINGS[rival])
            found.append(gradients(Trainer(config, Path(folder) / "run", device=DEVICE.type)))
    exact, eager, ours = found
    worst = 0.0
    for key, truth in exact.items():
        allowed = errors(eager[key], truth)[1] + 1e-3 * float(truth.double().square().mean().sqrt())
        found_error = errors(ours[key], truth)[1]
        # A class that no image of the batch has gets no gradient at all.
        worst = max(worst, found_error / allowed if allowed else (float("inf") if found_error else 0.0))
    assert worst < 2, f"a gradient is {worst:.2f} times as far off as in eager bf16"
    return worst


def public_step(model: ModelConfig, rival: str) -> Callable[[], Tensor]:
    """A step as the public code makes it."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    with DEVICE:
        public = PublicEAR(model).train()
    if rival == COMPILED:
        compile_parts(public)
    if rival == ACCELERATED:
        accelerate(public)
    parameters = list(public.parameters())
    averages = [parameter.detach().clone() for parameter in parameters]
    train = RUNS["imagenet256"].train
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(train.beta1, train.beta2), fused=True)
    latents = torch.randn(IMAGES, model.channels, model.image_size, model.image_size, device=DEVICE)
    labels = torch.randint(0, model.num_classes, (IMAGES,), device=DEVICE)

    def step() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=HAS_GPU):
            loss = public(latents, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, train.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - train.ema)
        return loss.detach()

    return step


def time_steps(step: Callable[[], Tensor]) -> dict[str, Any]:
    """Wall and GPU time of a step, and memory."""
    synchronize = torch.cuda.synchronize if HAS_GPU else lambda: None
    for _ in range(WARM):
        loss = step()
    assert loss.isfinite(), loss
    synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    if HAS_GPU:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for _ in range(STEPS):
            step()
        synchronize()
        times.append((time.perf_counter() - begun) / STEPS * 1e3)
    record: dict[str, Any] = {"wall_ms": percentiles(times) | {"mean": sum(times) / ROUNDS}}
    if HAS_GPU:
        record["peak_bytes"] = torch.cuda.max_memory_reserved()
        kernels = profiled([step], least=8)
        record["gpu_ms"] = {"median": kernels.busy_ms}
        record |= {"kernels_ms": kernels.ms, "launches": kernels.launches, "groups": grouped(kernels.table, KINDS)}
        record["kernels"] = kernels.table[:40]
    return record


def run(name: str, rival: str) -> dict[str, Any]:
    """Everything to record of a row, in an environment that a process has once."""
    prefer_expandable_segments()  # as `ear train` does, for all rivals
    model = MODELS[name] if HAS_GPU else SMALL
    if rival not in SETTINGS:
        return time_steps(public_step(model, rival))
    leave_out_gemm_workspace()
    checked = {"error_over_eager": check(name, rival)} if HAS_GPU else {"note": "eager backend"}
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(model, Path(folder), **SETTINGS[rival])
        trainer = Trainer(config, Path(folder) / "run", device=DEVICE.type)
        record = checked | time_steps(lambda: trainer.train_step()[0])
    flops = training_flops(model, SETTINGS[rival].get("rows_per_noise", 1)) * IMAGES
    return record | {"flops_per_s": 1e3 * flops / record["wall_ms"]["mean"]}


def measure(name: str, rival: str) -> dict[str, Any]:
    record = harness.in_new_process(run, name, rival)
    return record | {"images_per_s": 1e3 * IMAGES / record["wall_ms"]["mean"]}


def row(title: str, rival: str, run_it: Callable[..., dict[str, Any]], name: str) -> Row:
    return Row(f"training step, {title}", rival, measure=functools.partial(run_it, name, rival))


RIVALS = (EAGER, COMPILED, ACCELERATED, *SETTINGS)
ROWS = harness.needs_gpu(row(title, rival, measure, name) for title, name in NAMES.items() for rival in RIVALS)
ROWS += [] if HAS_GPU else [row("small", rival, run, "") for rival in (EAGER, COMPILED, OURS)]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_train_step(row: Row, run_row) -> None:
    run_row(row)


if __name__ == "__main__":
    sys.exit(harness.main(ROWS, __doc__))
