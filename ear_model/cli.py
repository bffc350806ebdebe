"""The command ``ear``: train, sample, evaluate."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import itertools
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from ear_model.config import MODELS, RUNS, RunConfig, SamplingConfig


@dataclass(frozen=True)
class Train:
    """Train a model and leave samples, a loss curve and a report in its run directory."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    """What to train; every field can be set."""
    out: Path = Path("runs/digits")
    """Run directory: configuration, metrics, checkpoints and pictures."""
    resume: bool = False
    """Go on from the last checkpoint of the run directory, with its own configuration."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""


@dataclass(frozen=True)
class Sample:
    """Sample images of chosen classes from a trained model into one picture."""

    run: tyro.conf.Positional[Path]
    """Run directory of the trained model."""
    classes: tuple[int, ...] = ()
    """Classes to sample; all of them if not given."""
    num: int = 64
    """Number of images, spread evenly over the classes."""
    guidance: float | None = None
    """Guidance scale; 1 is none. The run's own default if not given."""
    guidance_schedule: Literal["linear", "constant"] | None = None
    """linear or constant."""
    temperature: float | None = None
    """Below 1 trades diversity for accuracy. The run's own default if not given."""
    steps: int | None = None
    """Decoding steps. The run's own default if not given."""
    seed: int = 0
    """The same seed gives the same images."""
    out: Path | None = None
    """Picture to write; RUN/grid.png if not given."""
    raw_weights: bool = False
    """Use the last weights instead of their moving average."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""


@dataclass(frozen=True)
class Evaluate:
    """Score a trained model on samples and write RUN/evaluation.json."""

    run: tyro.conf.Positional[Path]
    """Run directory of the trained model."""
    num: int = 1000
    """Samples per setting, the same number of every class."""
    guidance: float = 1.0
    """Guidance scale of the setting scored first."""
    temperature: float = 1.0
    """Temperature of the setting scored first."""
    steps: int | None = None
    """Decoding steps. The run's own default if not given."""
    seed: int = 0
    """The same seed gives the same scores."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""


Command = TypeVar("Command")

# Commands with a module of their own, imported when called: its ``run(arguments) -> exit status`` raises what
# ``main`` turns into one line. ``parse_command`` reads its dataclass.
COMMAND_MODULES: dict[str, str] = {
    "convert": "ear_model.commands.convert",
    "cache": "ear_model.commands.cache",
    "train-tokenizer": "ear_model.commands.train_tokenizer",
}

USAGE = """usage: ear COMMAND ...

  ear train digits --out RUN       train EAR on handwritten digits (a few minutes on a laptop)
  ear sample RUN --classes 3 7     sample a picture from a trained model
  ear evaluate RUN                 score a trained model
  ear convert FILE.pth --out RUN   make a run directory of a public EAR checkpoint, or the reverse
  ear cache IMAGES --out CACHE     encode a tree of images for training
  ear train-tokenizer IMAGES       train a small autoencoder on a tree of images

`ear COMMAND --help` explains a command's options."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 (an error, told in one line), 2 (usage), 130 (Ctrl-C)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(arguments)
    except KeyboardInterrupt as interrupt:
        if not _told_elsewhere(interrupt):
            print("ear: interrupted; `--resume` goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, NotImplementedError, ImportError) as error:
        return _fail(error)
    except RuntimeError as error:
        from ear_model.distributed import LostProcessError
        from ear_model.train import NonFiniteLossError

        if isinstance(error, NonFiniteLossError | LostProcessError):
            return _fail(error)
        raise


def _fail(error: BaseException) -> int:
    if not _told_elsewhere(error):
        print("ear: error: " + " ".join(str(error).split()), file=sys.stderr)
    return 1


def _told_elsewhere(error: BaseException) -> bool:
    """Whether another process of a `torchrun` job tells the same; without one torch need not be imported."""
    if "LOCAL_RANK" not in os.environ:
        return False
    from ear_model.distributed import told_elsewhere

    return told_elsewhere(error)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command in COMMAND_MODULES:
        return importlib.import_module(COMMAND_MODULES[command]).run(rest)
    if command == "train":
        return _train(rest)
    if command == "sample":
        return _sample(parse_command(Sample, rest, "ear sample"))
    if command == "evaluate":
        return _evaluate(parse_command(Evaluate, rest, "ear evaluate"))
    known = ", ".join(["train", "sample", "evaluate", *COMMAND_MODULES])
    raise ValueError(f"unknown command {command!r}; use one of {known}")


def parse_command(kind: type[Command], arguments: list[str], program: str, default: Command | None = None) -> Command:
    """The command's dataclass from its arguments; bad ones as a ValueError of one line."""
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words):
            if default is None:
                return tyro.cli(kind, args=arguments, prog=program)
            return tyro.cli(kind, args=arguments, prog=program, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{_one_line(words.getvalue())} (see `{program} --help`)") from None


def _one_line(framed: str) -> str:
    """The message in tyro's frame, up to its first rule, as one line."""
    lines = [line.strip("│ ") for line in framed.splitlines() if not line.startswith(("╭", "╰"))]
    message = itertools.takewhile(lambda line: not line.startswith("─"), lines)
    return " ".join(" ".join(message).split()) or "unusable options"


def _train(arguments: list[str]) -> int:
    presets = ", ".join(RUNS)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"usage: ear train PRESET [OPTIONS]\n\nPresets: {presets}. `ear train digits --help` lists the options."
        )
        return 0 if arguments else 2
    preset = arguments[0]
    if preset not in RUNS:
        known = " (a model without a training data set in this version)" if preset in MODELS else ""
        raise ValueError(f"unknown preset {preset!r}{known}; use one of {presets}")
    command = parse_command(Train, arguments[1:], f"ear train {preset}", Train(config=RUNS[preset]))
    from ear_model.distributed import process_group

    # A run may go on with its model spread over the processes in another way; the rest of its configuration stays.
    switched = any(word.split("=")[0] == "--train.parallel" for word in arguments)
    parallel = command.config.train.parallel if switched else None
    with process_group(command.device):
        run_training(
            command.config, command.out, resume=command.resume, device=command.device, resume_parallel=parallel
        )
    return 0


def run_training(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    device: str = "auto",
    resume_parallel: Literal["ddp", "fsdp"] | None = None,
) -> None:
    """Train, then write samples.png, loss.png and evaluation.json and print a report.

    A resumed run takes its own configuration, but for ``train.parallel`` if ``resume_parallel`` is given.
    """
    from ear_model import checkpoint, distributed, evaluate
    from ear_model.train import Trainer, read_metrics

    started = time.perf_counter()
    if resume:
        with distributed.all_or_none():
            config = checkpoint.load_config(out)
        train = dataclasses.replace(config.train, parallel=resume_parallel or config.train.parallel)
        config = dataclasses.replace(config, train=train)
    trainer = Trainer(config, out, resume=resume, device=device)
    from ear_model import plots
    from ear_model.sample import class_labels, sample_images

    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    if trainer.is_main:
        print(
            f"{config.data}: {parameters:,} parameters, {config.train.steps} steps of "
            f"{config.train.batch_size} images on {trainer.where}, from step {trainer.step}; run directory {out}",
            flush=True,
        )
    trainer.run()
    trained = time.perf_counter()

    model, sampling = trainer.averaged_model(), config.sampling
    if not trainer.is_main:
        return
    num_classes = config.model.num_classes
    labels = class_labels(range(num_classes), 10 * num_classes, num_classes)
    images = sample_images(model, labels, seed=config.train.seed, **dataclasses.asdict(sampling))
    plots.save_grid(images, out / "samples.png", columns=10)
    metrics = read_metrics(out)
    plots.save_loss_curve([line["step"] for line in metrics], [line["loss"] for line in metrics], out / "loss.png")
    settings = [(1.0, 1.0), (sampling.guidance, sampling.temperature)]
    results = evaluate.evaluate_digits(model, settings, steps=sampling.steps, seed=config.train.seed)
    evaluate.save_evaluation(out, results)
    print(evaluate.report(results))
    print(
        f"loss {metrics[-1]['loss']:.4f} after {metrics[-1]['step']} steps, {trained - started:.0f} s of training, "
        f"{time.perf_counter() - trained:.0f} s of sampling and scoring\n"
        f"samples: {out / 'samples.png'}   loss curve: {out / 'loss.png'}   scores: {out / 'evaluation.json'}"
    )


def _sample(command: Sample) -> int:
    from ear_model import checkpoint, plots
    from ear_model.ear import EAR
    from ear_model.files import require_writable
    from ear_model.sample import class_labels, resolve_device, sample_images

    device = resolve_device(command.device)
    config = checkpoint.load_config(command.run)
    chosen = {
        field.name: value
        for field in dataclasses.fields(SamplingConfig)
        if (value := getattr(command, field.name)) is not None
    }
    sampling = dataclasses.replace(config.sampling, **chosen)
    num_classes = config.model.num_classes
    labels = class_labels(command.classes or range(num_classes), command.num, num_classes)
    out = command.out or command.run / "grid.png"
    require_writable(out)
    model = EAR.from_pretrained(command.run, ema=not command.raw_weights, device=device)
    images = sample_images(model, labels, seed=command.seed, **dataclasses.asdict(sampling))
    plots.save_grid(images, out, columns=min(command.num, max(8, math.isqrt(command.num))))
    print(f"{command.num} images of classes {list(command.classes) or 'all'}: {out}")
    return 0


def _evaluate(command: Evaluate) -> int:
    from ear_model import checkpoint, evaluate
    from ear_model.ear import EAR
    from ear_model.files import require_writable
    from ear_model.sample import resolve_device

    device = resolve_device(command.device)
    config = checkpoint.load_config(command.run)
    require_writable(command.run / evaluate.EVALUATION_FILE)
    model = EAR.from_pretrained(command.run, device=device)
    sampling = config.sampling
    settings = [(command.guidance, command.temperature), (sampling.guidance, sampling.temperature)]
    results = evaluate.evaluate_digits(
        model, settings, num=command.num, steps=command.steps or sampling.steps, seed=command.seed
    )
    path = evaluate.save_evaluation(command.run, results)
    print(evaluate.report(results))
    print(f"scores: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
