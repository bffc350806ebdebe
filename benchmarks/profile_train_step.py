"""Where a training step of ours spends its time: a table of its kernels, and its pointwise kernels one by one.

    python -m benchmarks.profile_train_step OUT.json                         # a GPU; --model ear_large, --steps, ...
    TRITON_INTERPRET=1 python -m benchmarks.profile_train_step OUT.json --small     # the same code on a CPU

The step has a fixed number of masked tokens, so that two runs do the same work. The pointwise kernels run at the
model's shapes, each against the bytes it has to move. Everything is printed, and OUT.json is written after each part.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks import timing
from ear_kernels import FusedAdamW
from ear_kernels.ops.column_sums.launchers import column_sums
from ear_kernels.ops.transformer import autograd as ops
from ear_model import optim
from ear_model.config import MODELS, ModelConfig, TrainConfig
from ear_model.distributed import leave_out_gemm_workspace, prefer_expandable_segments
from ear_model.ear import EAR
from ear_model.graphs import can_capture

TRAIN = TrainConfig()

# The first that fits a kernel's name.
KINDS = (
    ("attention", r"sdpa|flash|fmha|attention|dot_do_o|convert_dq"),
    ("GEMM", r"nvjet|gemm|cutlass|cublas|splitK|linear_kernel"),
    ("clip, AdamW, EMA", r"multi_tensor_apply|adamw"),
    ("GELU and dropout", r"gelu_dropout"),
    ("dropout, residual, norm", r"dropout_add_layer_norm"),
    ("packing of heads", r"pack_heads"),
    ("AdaLN, SiLU, energy loss", r"adaln|silu|gate_|energy"),
    ("column sums", r"column_sums|reduce_kernel|GammaBeta"),
)


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "the rest")


class Step:
    """A model of ours with its optimiser and average; a call is one training step."""

    def __init__(self, config: ModelConfig, images: int, masked: int, chunks: int, device: torch.device) -> None:
        torch.manual_seed(0)
        with device:
            self.model = EAR(config).train()
        self.model.score.loss_chunks = chunks
        if device.type == "cuda" and can_capture(config, use_bf16=True):
            self.model.capture(images, use_bf16=True, num_masked=[masked])
        # The defaults of the benchmark: the groups' rates make no difference in time.
        self.optimizer = FusedAdamW(self.model.parameters(), lr=1e-4, betas=(TRAIN.beta1, TRAIN.beta2))
        self.ema = optim.ExponentialMovingAverage(self.model, TRAIN.ema)
        size = config.image_size
        self.latents = torch.randn(images, config.channels, size, size, device=device)
        self.labels = torch.randint(0, config.num_classes, (images,), device=device)
        self.masked, self.device = masked, device

    def __call__(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.model(self.latents, self.labels, num_masked=self.masked)
        loss.backward()
        optim.clipped_step(self.optimizer, TRAIN.clip, self.ema)
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def step_milliseconds(step: Step, steps: int) -> list[float]:
    """ms of each of ``steps`` steps, back to back, without the profiler."""
    if step.device.type != "cuda":
        return [timing.wall_milliseconds([step], budget_s=0.01, rounds=1)["median"]]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(marks)]


def kernel_table(step: Step) -> list[dict[str, Any]]:
    """Name, ms and calls of every kernel of one step, the longest first; without a GPU of every operation."""
    gpu = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else [])
    with profile(activities=activities) as profiler:
        step()
        if gpu:
            torch.cuda.synchronize()
    rows: dict[str, dict[str, Any]] = {}
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    for event in profiler.events():
        # Ranges such as "Optimizer.step#AdamW.step" lie over the kernels that they name.
        annotation = getattr(event, "is_user_annotation", False) or re.match(r"Optimizer\.|ProfilerStep", event.name)
        if event.device_type != wanted or annotation:
            continue
        row = rows.setdefault(event.name, {"name": event.name, "ms": 0.0, "calls": 0})
        row["ms"] += (event.time_range.elapsed_us() if gpu else event.self_cpu_time_total) / 1e3
        row["calls"] += 1
    return sorted(rows.values(), key=lambda row: -row["ms"])


def pointwise_cases(config: ModelConfig, images: int, masked: int, device: torch.device) -> list[dict[str, Any]]:
    """name, shape, call and bytes of the pointwise kernels and sums at the shapes of a step."""
    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    width, inner = config.width, int(config.width * config.mlp_ratio)
    rows = images * (config.class_tokens + config.num_tokens)
    generator_rows = images * masked * config.num_samples

    def new(*shape: int, dtype: torch.dtype = low) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    seed = torch.tensor([12345], device=device)
    pre, grad, inner_out = new(rows, inner), new(rows, inner), torch.empty(rows, inner, device=device, dtype=low)
    branch, stream, norm_grad = new(rows, width), new(rows, width, dtype=torch.float32), new(rows, width)
    weight, bias, branch_bias = (new(width, dtype=torch.float32) for _ in range(3))
    stream_grad = new(rows, width, dtype=torch.float32)
    cases: list[dict[str, Any]] = []

    def add(name: str, shape: tuple[int, ...], moved: int, call: Callable[[], object]) -> None:
        cases.append({"name": name, "shape": list(shape), "bytes": moved, "call": call})

    def add_norm(options: tuple[Tensor, int, float]) -> tuple[Tensor, ...]:
        return ops._add_norm(branch, branch_bias, stream, weight, bias, *options, 1e-6, low)

    for dropout in (config.dropout or 0.1, 0.0):
        options = ops.dropout_options(dropout, seed, pre)
        text = f"dropout {dropout}"
        size, small = low.itemsize, 4
        add(
            f"GELU, {text}, forward", (rows, inner), 2 * size * rows * inner,
            lambda options=options: ops._gelu_dropout(pre, *options),
        )  # fmt: skip
        add(
            f"GELU, {text}, backward and its column sums", (rows, inner), 4 * size * rows * inner,
            lambda options=options: ops._gelu_dropout_backward(grad, pre, inner_out, *options),
        )  # fmt: skip
        _, _, mean, rstd = add_norm(options)
        add(
            f"add, norm, {text}, forward", (rows, width), (2 * size + 2 * small) * rows * width,
            lambda options=options: add_norm(options),
        )  # fmt: skip
        add(
            f"add, norm, {text}, backward and its column sums", (rows, width), (2 * size + 3 * small) * rows * width,
            lambda options=options, mean=mean, rstd=rstd: ops._add_norm_backward(
                norm_grad, stream_grad, stream, weight, mean, rstd, *options, low
            ),
        )  # fmt: skip
    generator = config.generator_width
    for name, shape, dtype in (
        ("norm's partials", (min(rows, 526), 3, width), torch.float32),
        ("GELU's partials", (min(rows, 348), inner), torch.float32),
        ("AdaLN's partials", (min(generator_rows, 396), 6, generator), torch.float32),
        ("SiLU's partials", (min(generator_rows, 1053), generator), torch.float32),
        ("the final layer's gradient", (generator_rows, config.token_dim), low),
    ):
        tensor = new(*shape, dtype=dtype)
        moved = tensor.numel() * tensor.element_size()
        add(f"column sums of {name}", shape, moved, lambda tensor=tensor: column_sums(tensor))
        add(
            f"torch's sum of {name}", shape, moved,
            lambda tensor=tensor: tensor.sum(0, dtype=torch.float32),
        )  # fmt: skip
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="ear_base", choices=sorted(MODELS))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--masked", type=int, default=222, help="masked tokens an image, of 256")
    parser.add_argument("--chunks", type=int, default=1, help="loss_chunks")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--top", type=int, default=45, help="rows of the printed table")
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that this program runs")
    arguments = parser.parse_args()
    prefer_expandable_segments()  # as `ear train` does
    leave_out_gemm_workspace()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, images, masked = MODELS[arguments.model], arguments.images, arguments.masked
    if arguments.small:
        config = replace(MODELS["digits"], depth=2, generator_depth=1, dropout=0.1)
        images, masked = 2, config.num_tokens - 3
    record: dict[str, Any] = {
        "environment": timing.environment(),
        "model": "small" if arguments.small else arguments.model,
        "images": images,
        "masked": masked,
        "loss_chunks": arguments.chunks,
    }

    def save() -> None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")

    step = Step(config, images, masked, arguments.chunks, device)
    for _ in range(4):
        loss = step()
    assert loss.isfinite(), loss
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = step_milliseconds(step, arguments.steps)
    record["step_ms"] = {"median": statistics.median(times), "all": times}
    record["peak_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else 0.0
    print(
        f"step: median {record['step_ms']['median']:.2f} ms, {record['peak_reserved_gb']:.2f} GB reserved", flush=True
    )
    table = kernel_table(step)
    total = sum(row["ms"] for row in table)
    record["kernels_ms"], record["kernels"] = total, table
    groups: dict[str, float] = {}
    for row in table:
        groups[kind_of(row["name"])] = groups.get(kind_of(row["name"]), 0.0) + row["ms"]
    record["kinds"] = dict(sorted(groups.items(), key=lambda item: -item[1]))
    save()
    print(f"kernels: {total:.2f} ms, {sum(row['calls'] for row in table)} calls")
    for kind, milliseconds in record["kinds"].items():
        print(f"{milliseconds:9.3f} ms  {kind}")
    for row in table[: arguments.top]:
        print(f"{row['ms']:9.3f} ms x {row['calls']:4d} {row['name'][:120]}")
    del step
    if device.type == "cuda":
        torch.cuda.empty_cache()
    rate = timing.copy_rate()
    record["copy_gb_per_s"] = rate / 1e9
    record["pointwise"] = []
    print(f"copy rate {rate / 1e9:.0f} GB/s", flush=True)
    budget = {"budget_s": 0.02, "rounds": 3} if arguments.small else {"budget_s": 0.3, "rounds": 9}
    for case in pointwise_cases(config, images, masked, device):
        found = timing.gpu_milliseconds([case.pop("call")], **budget)  # type: ignore[arg-type]
        case |= {"ms": found["median"], "p20": found["p20"], "p80": found["p80"]}
        case["gb_per_s"] = case["bytes"] / case["ms"] / 1e6
        record["pointwise"].append(case)
        print(f"{case['ms']:9.4f} ms {case['gb_per_s']:7.0f} GB/s  {case['name']} {case['shape']}", flush=True)
    save()


if __name__ == "__main__":
    main()
