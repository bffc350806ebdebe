"""Training on 1 and 2 GPUs: equal loss curves, weak scaling of EAR-B, FSDP2 of EAR-H, a resume on fewer GPUs.

    OUT=results python3 benchmarks/gpu_check_dist.py              2 GPUs, 4 minutes; --no-huge: 2.5
    OUT=results python3 benchmarks/gpu_check_dist.py --tiny       the same logic with tiny models on 2 CPU processes

Starts itself by torchrun, a job a case, and writes $OUT/gpu_check_dist.json. Latents are synthetic and in memory, a
cluster a class, so that there is something to learn.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ear_model import distributed, train  # noqa: E402
from ear_model.config import MODELS, ModelConfig, RunConfig, TrainConfig  # noqa: E402
from ear_model.data import Dataset  # noqa: E402

STEPS, SPEED_STEPS, HUGE_STEPS = 30, 20, 5
CASE_SECONDS = 100
# Without dropout the draws don't depend on the number of processes, so the curves must agree.
SMALL = replace(MODELS["ear_base"], width=384, depth=6, num_heads=6, generator_width=256, generator_depth=3)
SMALL = replace(SMALL, dropout=0.0, attention_dropout=0.0, num_classes=10)
TINY = replace(SMALL, image_size=4, width=32, depth=2, num_heads=2, generator_width=32, class_tokens=4)


def latents(model: ModelConfig, count: int = 512) -> Dataset:
    """Clusters of latents, the same on every process."""
    generator = torch.Generator().manual_seed(0)
    shape = (model.channels, model.image_size, model.image_size)
    labels = torch.randint(0, 10, (count,), generator=generator)
    centres = torch.randn(10, *shape, generator=generator)
    return Dataset(centres[labels] + 0.3 * torch.randn(count, *shape, generator=generator), labels)


def trainer(
    model: ModelConfig, directory: Path, *, resume: bool = False, device: str, **settings: Any
) -> train.Trainer:
    """A trainer on synthetic latents."""
    train.load_training_data = lambda config: latents(config.model)
    # The whole rate for the generator: samples soon leave their initial zero, and noise shows in the loss.
    defaults = {"steps": STEPS, "lr": 2e-3, "generator_lr_scale": 1.0, "warmup_steps": 5}
    config = RunConfig(model=model, train=TrainConfig(**{**defaults, **settings}))
    return train.Trainer(config, directory, resume=resume, device=device)


def curve(run: train.Trainer, steps: int) -> list[float]:
    """Losses of the whole batch."""
    return distributed.mean(torch.stack([run.train_step()[0] for _ in range(steps)])).tolist()


def curves(directory: Path, tiny: bool, device: str) -> dict[str, Any]:
    """Loss curves in float32 and bfloat16, by DDP and FSDP; a checkpoint half-way."""
    model, result = (TINY if tiny else SMALL), {}
    for precision in ("fp32", "bf16"):
        for parallel in ("ddp", "fsdp"):
            name = f"{parallel}-{precision}"
            where = directory / f"{name}-{distributed.world_size()}"
            run = trainer(model, where, device=device, batch_size=64, precision=precision, parallel=parallel)
            losses = curve(run, STEPS // 2)
            run.save()
            result[name] = losses + curve(run, STEPS // 2)
    return result


def resume(directory: Path, tiny: bool, device: str) -> dict[str, Any]:
    """One process goes on with what two saved."""
    result = {}
    for parallel in ("ddp", "fsdp"):
        where = directory / f"{parallel}-fp32-2"
        model = TINY if tiny else SMALL
        settings = {"batch_size": 64, "precision": "fp32", "parallel": parallel}
        run = trainer(model, where, resume=True, device=device, **settings)
        assert run.step == STEPS // 2
        result[f"{parallel}-fp32"] = curve(run, STEPS // 2)
    return result


def speed(directory: Path, tiny: bool, device: str, **settings: Any) -> dict[str, Any]:
    """EAR-B, 64 images a process: images/s of all of them together."""
    model = TINY if tiny else MODELS["ear_base"]
    batch_size = 64 * distributed.world_size()
    run = trainer(model, directory / "speed", device=device, batch_size=batch_size, **settings)
    curve(run, 6)
    _wait(device)
    begun = time.perf_counter()
    losses = [run.train_step()[0] for _ in range(SPEED_STEPS)]
    _wait(device)
    seconds = time.perf_counter() - begun
    return {
        "images_per_second": SPEED_STEPS * batch_size / seconds,
        "ms_per_step": 1e3 * seconds / SPEED_STEPS,
        "last_loss": float(losses[-1]),
        "graphs": run.model.backbone.captured is not None,
        "peak_memory_gb": distributed.gather_objects(_peak_memory(device)),
    }


def speed_uncaptured(directory: Path, tiny: bool, device: str) -> dict[str, Any]:
    """The same without CUDA graphs."""
    return speed(directory, tiny, device, cuda_graphs=False)


def huge(directory: Path, tiny: bool, device: str) -> dict[str, Any]:
    """EAR-H by FSDP2, 32 images a process."""
    model = TINY if tiny else MODELS["ear_huge"]
    batch_size = 32 * distributed.world_size()
    run = trainer(model, directory / "huge", device=device, batch_size=batch_size, parallel="fsdp")
    held = distributed.gather_objects(_peak_memory(device, peak=False))
    losses = curve(run, 2)
    begun = time.perf_counter()
    losses += curve(run, HUGE_STEPS - 2)
    seconds = time.perf_counter() - begun
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    return {
        "parameters": parameters,
        "losses": losses,
        "ms_per_step": 1e3 * seconds / (HUGE_STEPS - 2),
        "held_before_step_1_gb": held,
        "peak_memory_gb": distributed.gather_objects(_peak_memory(device)),
    }


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_memory(device: str, *, peak: bool = True) -> float:
    if device != "cuda":
        return 0.0
    return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e9


CASES = {case.__name__: case for case in (curves, resume, speed, speed_uncaptured, huge)}


def work(case: str, directory: Path, tiny: bool) -> None:
    """What one process of a case does."""
    device = "cpu" if tiny else "cuda"
    torch.manual_seed(0)
    with distributed.process_group(device):
        result = CASES[case](directory, tiny, device)
        if distributed.is_main():
            (directory / f"{case}-{distributed.world_size()}.json").write_text(json.dumps(result))


def launch(case: str, processes: int, directory: Path, tiny: bool) -> dict[str, Any]:
    """Run a case on that many processes; its result, or what went wrong."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(Path(__file__).resolve()), "--case", case, "--directory", str(directory)]
    command += ["--tiny"] if tiny else []
    begun = time.perf_counter()
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=CASE_SECONDS, cwd=ROOT)
        errors = answer.stderr if answer.returncode else ""
    except subprocess.TimeoutExpired as error:
        errors = f"no end after {CASE_SECONDS} s\n{error.stderr!r}"
    seconds = time.perf_counter() - begun
    print(f"{case} on {processes}: {seconds:.0f} s{' FAILED' if errors else ''}", flush=True)
    if errors:
        print(errors[-3000:], flush=True)
        return {"error": errors[-3000:], "seconds": seconds}
    return {**json.loads((directory / f"{case}-{processes}.json").read_text()), "seconds": seconds}


def relative_difference(a: list[float], b: list[float]) -> float:
    """The largest of two curves' relative differences."""
    return max(abs(x - y) / abs(y) for x, y in zip(a, b, strict=True))


def summarise(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the issue asks for, from the cases that ended; True and False say whether it holds."""
    summary: dict[str, Any] = {}
    one, two, resumed = cases["curves on 1"], cases["curves on 2"], cases["resume on 1"]
    if "error" not in one and "error" not in two:
        for name, limit in (("ddp-fp32", 1e-3), ("fsdp-fp32", 1e-3), ("ddp-bf16", 2e-2), ("fsdp-bf16", 2e-2)):
            difference = relative_difference(two[name], one[name])
            summary[f"{name}: largest relative difference of losses, 2 against 1"] = difference
            summary[f"{name}: equal within {limit}"] = difference <= limit
        if "error" not in resumed:
            for name in ("ddp-fp32", "fsdp-fp32"):
                difference = relative_difference(resumed[name], one[name][STEPS // 2 :])
                summary[f"{name}: saved on 2, resumed on 1: largest relative difference"] = difference
                summary[f"{name}: resumed within 0.001"] = difference <= 1e-3
    one, two = cases["speed on 1"], cases["speed on 2"]
    if "error" not in one and "error" not in two:
        summary["EAR-B images/s on 2 over 1"] = two["images_per_second"] / one["images_per_second"]
    plain = cases.get("speed_uncaptured on 2", {}).get("images_per_second")
    if "error" not in one and plain is not None:
        summary["EAR-B images/s on 2 without graphs over 1"] = plain / one["images_per_second"]
    if "losses" in cases.get("huge on 2", {}):
        summary["EAR-H losses finite"] = all(torch.tensor(cases["huge on 2"]["losses"]).isfinite().tolist())
    return summary


def main() -> int:
    """The parent of all cases; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models on CPU processes")
    parser.add_argument("--no-huge", action="store_true", help="without EAR-H and the run without CUDA graphs")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        work(options.case, options.directory, options.tiny)
        distributed.leave(0)
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        timed = [("speed", 1), ("speed", 2)]
        timed += [] if options.no_huge else [("speed_uncaptured", 2), ("huge", 2)]
        cases: dict[str, dict[str, Any]] = {}

        def run(case: str, processes: int) -> None:
            # A directory a job; only the resume reads another's.
            where = Path(directory) / ("curves" if case in ("curves", "resume") else f"{case}-{processes}")
            where.mkdir(exist_ok=True)
            cases[f"{case} on {processes}"] = launch(case, processes, where, options.tiny)

        for job in timed:
            run(*job)
        # Not timed, so at the same time.
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(run, ("curves", "curves"), (1, 2)))
        run("resume", 1)
    summary = summarise(cases)
    result = {
        "command": " ".join(sys.argv),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "devices": "cpu"
        if options.tiny
        else [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "seconds": time.perf_counter() - begun,
        "summary": summary,
        "cases": cases,
    }
    out = Path(os.environ.get("OUT", "."))
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_check_dist.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(summary, indent=2))
    failed = any("error" in case for case in cases.values()) or any(value is False for value in summary.values())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
