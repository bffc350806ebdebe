"""What each of two processes does for test_distributed.py, which starts this module by torchrun and reads its report.

    torchrun --standalone --nproc_per_node=2 -m tests.model.distributed_worker DIRECTORY

Started without torchrun it runs the same on one process: what the two are compared with.
"""

import json
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from ear_model.config import RunConfig
from ear_model.processes import end_process
from ear_model.training import distributed
from ear_model.training.trainer import NonFiniteLossError, Trainer
from tests.model.conftest import tiny_run

STEPS = 12


def case(**train) -> RunConfig:
    """A run whose samples soon differ: rates high enough to leave the zero initialisation in a few steps."""
    settings = {"steps": STEPS, "batch_size": 16, "lr": 1e-2, "generator_lr_scale": 1.0, "warmup_steps": 1}
    return tiny_run(**{**settings, "checkpoint_every": 6, **train})


def with_dropout(config: RunConfig) -> RunConfig:
    return replace(config, model=replace(config.model, dropout=0.1, attention_dropout=0.1))


def curve(trainer: Trainer, steps: int) -> list[float]:
    """Losses of the whole batch."""
    losses = torch.stack([trainer.train_step()[0] for _ in range(steps)])
    return distributed.mean(losses).tolist()


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: distributed.whole(p.detach()).clone() for name, p in trainer.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def gradients(config: RunConfig, run_dir: Path) -> dict[str, torch.Tensor]:
    """Unclipped gradients of the first step after a few, in which every parameter has left its initial value."""
    trainer = Trainer(config, run_dir, device="cpu")
    curve(trainer, 4)
    kept = {}
    trainer.optimizer.step = lambda: kept.update(
        {name: distributed.whole(p.grad).clone() for name, p in trainer.model.named_parameters()}
    )
    trainer.train_step()
    return kept


def train(out: Path) -> dict:
    """Curves, gradients and checkpoints of every kind of run."""
    report: dict = {"curves": {}}
    configs = {
        "ddp": case(),
        "ddp accumulated": case(accumulate=2),
        "fsdp": case(parallel="fsdp"),
        "fsdp accumulated": case(parallel="fsdp", accumulate=2),
        "fsdp bf16": case(parallel="fsdp", precision="bf16"),
        "ddp bf16": case(precision="bf16"),
    }
    for name, config in configs.items():
        trainer = Trainer(config, out / name, device="cpu")
        report["curves"][name] = curve(trainer, STEPS // 2)
        trainer.save()
        report["curves"][name] += curve(trainer, STEPS // 2)
        torch.save(weights(trainer), out / name / f"weights-{distributed.rank()}.pt")
        averages = {key: distributed.whole(average) for key, average in trainer.ema.averages.items()}
        torch.save(averages, out / name / f"averages-{distributed.rank()}.pt")
        averaged = trainer.averaged_model()
        report[f"averaged {name}"] = same(dict(averaged.named_parameters()), averages)
    for name in ("ddp accumulated", "fsdp accumulated"):
        config = replace(configs[name], train=replace(configs[name].train, clip=1e9))
        torch.save(gradients(config, out / f"gradients {name}"), out / f"gradients {name}-{distributed.rank()}.pt")
    return report


def resume(out: Path) -> dict:
    """The second half again, from the checkpoint, under both kinds of spreading."""
    report = {}
    for saved, parallel in (("ddp", "ddp"), ("ddp", "fsdp"), ("fsdp", "fsdp"), ("fsdp", "ddp")):
        trainer = Trainer(case(parallel=parallel), out / saved, resume=True, device="cpu")
        losses = curve(trainer, STEPS // 2)
        expected = torch.load(out / saved / f"weights-{distributed.rank()}.pt")
        report[f"{saved} to {parallel}"] = [trainer.step, losses, same(weights(trainer), expected)]
    # With dropout each process draws on its own; the checkpoint has the generators of all of them.
    config = with_dropout(case(checkpoint_every=6))
    trainer = Trainer(config, out / "dropout", device="cpu")
    curve(trainer, 6)
    trainer.save()
    curve(trainer, 6)
    resumed = Trainer(config, out / "dropout", resume=True, device="cpu")
    curve(resumed, 6)
    report["dropout"] = [resumed.step, same(weights(trainer), weights(resumed))]
    return report


def draws(out: Path) -> dict:
    """What each process draws: the orders' first row and the numbers of masked tokens."""
    from ear_model.model import masking

    report: dict = {}
    orders, counts = masking.random_orders, masking.draw_num_masked
    for name, config in (("common", case()), ("own", with_dropout(case()))):
        seen: dict[str, list] = {"orders": [], "counts": []}

        def keep_orders(*args, seen=seen, **kwargs):
            drawn = orders(*args, **kwargs)
            seen["orders"] += drawn.tolist()
            return drawn

        def keep_counts(*args, seen=seen):
            count = counts(*args)
            seen["counts"].append(count)
            return count

        masking.random_orders, masking.draw_num_masked = keep_orders, keep_counts
        trainer = Trainer(config, out / f"draws {name}", device="cpu")
        curve(trainer, 8)
        report[name] = seen
    masking.random_orders, masking.draw_num_masked = orders, counts
    return report


def statistics(out: Path) -> float:
    """Mean loss of the last 100 of 200 steps with dropout."""
    config = with_dropout(case(steps=200, batch_size=32, lr=3e-3))
    return sum(curve(Trainer(config, out / "statistics", device="cpu"), 200)[100:]) / 100


def failures(out: Path) -> dict:
    """Errors of one process alone, as every process sees them."""
    report = {}
    trainer = Trainer(case(log_every=3), out / "nan", device="cpu")
    original = trainer.train_step

    def poisoned():
        if trainer.step == 7 and distributed.rank() == distributed.world_size() - 1:
            trainer._next_batch = lambda index, fetch=trainer._next_batch: (
                fetch(index)[0] * float("nan"),
                fetch(index)[1],
            )
        return original()

    trainer.train_step = poisoned
    try:
        trainer.run(quiet=True)
    except NonFiniteLossError as error:
        report["nan"] = str(error)
    if distributed.world_size() > 1:
        for name, config in (("batch", case(batch_size=9)), ("accumulate", case(accumulate=16))):
            try:
                Trainer(config, out / name, device="cpu")
            except distributed.SharedError as error:
                report[name] = [str(error), (out / name).exists()]
        try:
            # A directory that only the last process finds in use.
            used = out / "ddp" if distributed.rank() else out / "unused"
            Trainer(case(), used, device="cpu")
        except distributed.SharedError as error:
            report["one"] = [str(error), (out / "unused").exists()]
    return report


def hang(out: Path) -> None:
    """The last process stops taking part; with a time limit of seconds the others find out."""
    distributed.TIMEOUT = timedelta(seconds=3)
    with distributed.process_group("cpu"):
        trainer = Trainer(case(steps=1000), out / "hang", device="cpu")
        original = trainer.train_step

        def stuck():
            if trainer.step == 7 and distributed.rank() == 1:
                time.sleep(120)
            return original()

        trainer.train_step = stuck
        try:
            trainer.run(quiet=True)
        except distributed.LostProcessError as error:
            (out / "hang.txt").write_text(str(error))
            end_process(1)


def main(out: Path) -> None:
    """Everything, with a report per process."""
    with distributed.process_group("cpu"):
        parts = (train, resume, draws, statistics, failures)
        report = {part.__name__: part(out) for part in parts}
        (out / f"report-{distributed.rank()}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    (hang if sys.argv[2:] == ["hang"] else main)(Path(sys.argv[1]))
    end_process(0)
