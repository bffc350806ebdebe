"""A training step of EAR-B, L and H: public-style eager, the same with compiled blocks and head, and ours, one run.

    pytest benchmarks/bench_train_step.py --benchmark-only --benchmark-json=OUT.json     # needs a GPU; -k ear_base

64 latents, 4 samples a token, bf16 autocast over float32 weights, dropout as in the paper; forward, backward, clip,
fused AdamW, EMA, the trainer's own optimiser step for ours. ``extra_info`` holds ms by phase and of a whole step
(medians of steps; ``step_mean`` beside it), images/s and TFLOP/s of the products that the maths needs at the median
step, and peak memory. Each case runs in a process of its own. The public-style model is benchmarks/public_ear.py.
Before a time is reported, our model's loss and gradients are held against its own eager backend, dropout off.
"""

import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.public_ear import PublicEAR, compile_parts
from ear_kernels import FusedAdamW
from ear_model import masking, optim
from ear_model.config import MODELS, TrainConfig
from ear_model.distributed import leave_out_gemm_workspace, prefer_expandable_segments
from ear_model.ear import EAR
from ear_model.estimate import training_flops
from ear_model.graphs import can_capture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

prefer_expandable_segments()  # as `ear train` does, for all rivals

IMAGES, STEPS, SEED = 64, 8, 7
TRAIN = TrainConfig()
PHASES = ("forward", "backward", "clip_and_adamw", "ema")
WHICH = (
    "public",
    "compiled",
    "ours",
    "ours_pool4",
    "ours_chunks2",
    "ours_chunks4",
    "ours_workspace",
    "ours_uncaptured",
    "ours_compiled_blocks",
)


def check(name: str, which: str) -> float:
    """Largest error of a gradient of ours against the float32 eager model's, over that of bf16 eager."""
    config = replace(MODELS[name], depth=3, generator_depth=2, dropout=0.0, attention_dropout=0.0)
    torch.manual_seed(0)
    model = EAR(config).cuda().train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2)
    set_score(model, which)
    images, labels = torch.randn(8, 16, 16, 16, device="cuda"), torch.arange(8, device="cuda")
    found = {}
    for run, backend, low in (("exact", "eager", False), ("eager", "eager", True), ("ours", "auto", True)):
        os.environ["EAR_KERNELS_BACKEND"] = backend
        model.zero_grad()
        if run == "ours":
            arrange(model, which, len(labels), [200])
        torch.manual_seed(1)
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            loss = model(images, labels, num_masked=200)
        loss.backward()
        found[run] = [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
        # What a graph is captured from must not be alive in another graph of autograd.
        del loss
    os.environ["EAR_KERNELS_BACKEND"] = "auto"
    worst = 0.0
    for exact, eager, ours in zip(found["exact"], found["eager"], found["ours"], strict=True):
        worst = max(worst, float((ours - exact).norm() / ((eager - exact).norm() + 1e-3 * exact.norm())))
    assert worst < 2, f"a gradient is {worst:.2f} times as far off as in eager bf16"
    return worst


def masked_tokens(name: str) -> list[int]:
    """Masked tokens of the measured steps, the same for all rivals."""
    torch.manual_seed(SEED)
    config = MODELS[name]
    return [masking.draw_num_masked(config.num_tokens, config.min_mask_ratio) for _ in range(STEPS)]


def make(name: str, which: str) -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.device("cuda"):
        if which in ("public", "compiled"):
            model: nn.Module = PublicEAR(MODELS[name])
            if which == "compiled":
                compile_parts(model)  # type: ignore[arg-type]
            return model.train()
        ours = EAR(MODELS[name]).train()
    set_score(ours, which)
    arrange(ours, which, IMAGES, masked_tokens(name))
    return ours


def set_score(model: EAR, which: str) -> None:
    """Noise pool or loss chunks, as ``which`` says."""
    if which == "ours_pool4":
        model.score.rows_per_noise = 4
    if which.startswith("ours_chunks"):
        model.score.loss_chunks = int(which.removeprefix("ours_chunks"))


def arrange(model: EAR, which: str, images: int, masked: list[int]) -> None:
    """The model as the trainer would have it: CUDA graphs, unless ``which`` says otherwise."""
    if which == "ours_compiled_blocks":
        model.backbone.compile_blocks()
    elif which != "ours_uncaptured" and can_capture(model.config, use_bf16=True):
        model.capture(images, use_bf16=True, num_masked=masked)


def groups(model: nn.Module, which: str) -> torch.optim.AdamW:
    betas = (TRAIN.beta1, TRAIN.beta2)
    if which.startswith("ours"):
        return FusedAdamW(model.parameters(), lr=1e-4, betas=betas)
    return torch.optim.AdamW(model.parameters(), lr=1e-4, betas=betas, fused=True)


def measure(name: str, which: str) -> dict[str, float]:
    """Times in ms, and rates."""
    model = make(name, which)
    optimizer = groups(model, which)
    ema = optim.ExponentialMovingAverage(model, TRAIN.ema)
    latents = torch.randn(IMAGES, 16, 16, 16, device="cuda")
    labels = torch.randint(0, 1000, (IMAGES,), device="cuda")

    def step(marks: list[torch.cuda.Event] | None = None) -> torch.Tensor:
        def mark() -> None:
            if marks is not None:
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()

        mark()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(latents, labels)
        mark()
        loss.backward()
        mark()
        if which.startswith("ours"):
            optim.clipped_step(optimizer, TRAIN.clip, ema)
        else:
            optim.clip_gradients(model.parameters(), TRAIN.clip)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark()
        if not which.startswith("ours"):  # ours is in the same pass
            ema.update()
        mark()
        return loss

    torch.manual_seed(SEED)
    for _ in range(4):
        loss = step()
    torch.cuda.synchronize()
    assert loss.isfinite()
    del loss
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    recorded: list[list[torch.cuda.Event]] = []
    begun = time.perf_counter()
    # The mask ratio is drawn for every step, as in training; its seed is the same for all rivals.
    torch.manual_seed(SEED)
    for _ in range(STEPS):
        recorded.append([])
        step(recorded[-1])
    torch.cuda.synchronize()
    wall = (time.perf_counter() - begun) / STEPS * 1e3
    times = {
        phase: statistics.median(marks[number].elapsed_time(marks[number + 1]) for marks in recorded)
        for number, phase in enumerate(PHASES)
    }
    whole = [marks[0].elapsed_time(marks[-1]) for marks in recorded]
    median = statistics.median(whole)
    flops = training_flops(MODELS[name], 4 if which == "ours_pool4" else 1) * IMAGES
    return {
        **times,
        "step": median,
        "step_mean": statistics.fmean(whole),
        "wall": wall,
        "images_per_second": IMAGES / median * 1e3,
        "tflops": flops / median / 1e9,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        # What graphs keep between their kernels counts here alone.
        "peak_reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
    }


def run(name: str, which: str) -> dict[str, float]:
    """:func:`check` and :func:`measure`, ours in the environment that ``ear train`` makes; for a new process."""
    ours = which.startswith("ours")
    if ours and which not in ("ours_uncaptured", "ours_compiled_blocks", "ours_workspace"):
        leave_out_gemm_workspace()
    checked = {"worst_error_over_eager": check(name, which)} if ours else {}
    return {**checked, **measure(name, which)}


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", ["ear_base", "ear_large", "ear_huge"])
def test_train_step(benchmark, name: str, which: str) -> None:
    # cuBLAS reads its environment once a process, and rivals get torch's own.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        result = process.submit(run, name, which).result()
    benchmark.extra_info.update(name=name, which=which, images=IMAGES, **result)
    print(name, which, {key: round(value, 2) for key, value in result.items()}, flush=True)
    benchmark.pedantic(lambda: None, rounds=1)
