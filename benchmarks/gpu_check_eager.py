"""EAR-B on a GPU with the eager backend: one training step and a short sampling run, without one host wait.

    EAR_KERNELS_BACKEND=eager python benchmarks/gpu_check_eager.py OUT.json

Forward pass and sampling loop run under torch.cuda.set_sync_debug_mode("error"), which raises at every operation
that makes the host wait for the device.
"""

import datetime
import json
import platform
import sys
import time
from pathlib import Path

import torch

from ear_model import EAR
from ear_model.config import TrainConfig
from ear_model.optim import ExponentialMovingAverage, clip_gradients, make_optimizer


def main(out: Path) -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    config = TrainConfig()
    model = EAR.from_preset("ear_base").to(device).train()
    optimizer, ema = make_optimizer(model, config), ExponentialMovingAverage(model, config.ema)
    latents, labels = torch.randn(64, 16, 16, 16, device=device), torch.randint(0, 1000, (64,), device=device)

    def step() -> dict[str, float]:
        marks = [time.perf_counter()]

        def mark() -> None:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            marks.append(time.perf_counter())

        torch.cuda.set_sync_debug_mode("error")
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(latents, labels)
        mark()
        loss.backward()
        mark()
        norm = clip_gradients(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mark()
        ema.update()
        mark()
        names = ("forward_ms", "backward_ms", "optimizer_ms", "ema_ms")
        times = {name: 1e3 * (b - a) for name, a, b in zip(names, marks, marks[1:], strict=False)}
        assert loss.isfinite()
        assert norm.isfinite()
        return {**times, "loss": loss.item(), "gradient_norm": norm.item()}

    torch.cuda.reset_peak_memory_stats()
    steps = [step() for _ in range(6)]
    peak = torch.cuda.max_memory_allocated() / 1e9
    assert any(p.grad is None for p in model.parameters())
    changed = sum(not torch.equal(a, p) for a, p in zip(ema.averages.values(), model.parameters(), strict=True))
    assert changed > 300, "the step moved too few weights"

    generator = torch.Generator(device).manual_seed(0)
    sample_labels = torch.randint(0, 1000, (8,), device=device)
    options = {"steps": 4, "guidance": 3.0, "temperature": 0.7, "generator": generator}
    with torch.autocast("cuda", torch.bfloat16):
        model.sample(sample_labels, **options)  # warm-up: library handles wait once
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        begun = time.perf_counter()
        images = model.sample(sample_labels, **options)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    sampling_ms = 1e3 * (time.perf_counter() - begun)
    assert images.shape == (8, 16, 16, 16)
    assert images.isfinite().all()
    result = {
        "command": " ".join(sys.argv),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "model": "ear_base, 64 latents, 4 samples a token, bf16 autocast, eager backend",
        "first_step": steps[0],
        "last_step": steps[-1],
        "peak_memory_gb": peak,
        "sample_4_steps_8_images_ms": sampling_ms,
        "host_waits_in_forward_and_sampling_loop": 0,
    }
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
