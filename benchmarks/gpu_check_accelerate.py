"""accelerate() on a public-layout EAR-B at full size: the same loss and gradients, and the speed of a training step.

    python benchmarks/gpu_check_accelerate.py OUT.json

bf16 autocast over float32 weights, 64 latents, score_batch_mul = 2, dropout as in the paper (off for the comparison).
The tolerance is that of the eager model against itself in another precision: the accelerated gradients may be at
most twice as far from the float32 eager ones as the bf16 eager ones are.
"""

import copy
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.public_ear import PublicEAR, initialise
from benchmarks.timing import environment
from ear_kernels import accelerate
from ear_model.config import EAR_BASE


def gradients(model: PublicEAR, latents, labels, dtype) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        loss = model(latents, labels)
    loss.backward()
    found = {name: parameter.grad.float() for name, parameter in model.named_parameters()}
    return {"loss": loss.detach().float(), **found}


def step_ms(model: PublicEAR, latents, labels) -> tuple[float, float]:
    """(median ms of a training step, peak GB)."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(latents, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(3):
        step()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times), torch.cuda.max_memory_allocated() / 1e9


def main(out: Path) -> None:
    torch.cuda.init()
    model = PublicEAR(EAR_BASE).cuda()
    initialise(model)
    latents = torch.randn(64, 16, 16, 16, device="cuda")
    labels = torch.randint(1000, (64,), device="cuda")
    ours = copy.deepcopy(model)
    report = accelerate(ours)
    print(report)
    few, few_labels = latents[:16], labels[:16]
    for each in (model, ours):
        each.eval()  # no dropout; the masks come from the same generator state
    exact = gradients(model, few, few_labels, None)
    eager = gradients(model, few, few_labels, torch.bfloat16)
    fused = gradients(ours, few, few_labels, torch.bfloat16)
    worst = ("", 0.0)
    for name, truth in exact.items():
        bound = (eager[name] - truth).norm() + 1e-3 * truth.norm() + 1e-12
        ratio = float((fused[name] - truth).norm() / bound)
        worst = max(worst, (name, ratio), key=lambda pair: pair[1])
    losses = {"float32": float(exact["loss"]), "eager bf16": float(eager["loss"]), "ours bf16": float(fused["loss"])}
    del exact, eager, fused
    times = {"eager": step_ms(model, latents, labels), "accelerated": step_ms(ours, latents, labels)}
    result = {
        "environment": environment(),
        "losses": losses,
        "worst_gradient": {"name": worst[0], "error_over_eager_error": worst[1], "allowed": 2.0},
        "step_ms": {name: value[0] for name, value in times.items()},
        "peak_gb": {name: value[1] for name, value in times.items()},
        "speed_up": times["eager"][0] / times["accelerated"][0],
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "environment"}, indent=1))
    if worst[1] > 2 or not abs(losses["ours bf16"] - losses["float32"]) <= 2e-3 * abs(losses["float32"]):
        sys.exit("the accelerated model differs")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
