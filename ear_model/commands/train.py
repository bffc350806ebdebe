"""``ear train``: a run directory from a preset and options, then samples and scores."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ear_model.commands.parsing import parse_command
from ear_model.config import ORDERS, RunConfig
from ear_model.errors import shown
from ear_model.evaluation.config import ScoringConfig
from ear_model.files import DirectoryLock
from ear_model.presets import EPOCH_IMAGES, MODELS, RUNS, with_model, with_score_and_order
from ear_model.run_dir import check_resumable, load_config, read_metrics, with_absolute_paths
from ear_model.score_names import SCORES

if TYPE_CHECKING:
    from ear_model.ear import EAR
    from ear_model.evaluation.scoring import Scoring
    from ear_model.sampling.decoder import Decoder


@dataclass(frozen=True)
class Train:
    """Train a model and leave samples, a loss curve and a report in its run directory."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    """What to train; every field can be set."""
    out: Path = Path("runs/digits")
    """Run directory: configuration, metrics, checkpoints and pictures."""
    resume: bool = False
    """Go on from the last checkpoint of --out with its configuration, which options may extend (docs/training.md)."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""
    judge: Path | None = None
    """Judge of `ear train-judge` that scores samples at the end; needs --real."""
    real: Path | None = None
    """Image tree of held-out real images, for the scores."""
    dry_run: bool = False
    """Print steps, parameters and an estimate of speed, memory and GPU-days, and stop; needs no data and no GPU."""
    gpus: int = 1
    """Number of GPUs that --dry-run reckons with."""


def run(arguments: list[str]) -> int:
    """The command; returns the exit status. Raises ValueError for what can't be trained."""
    presets = ", ".join(RUNS)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(
            f"usage: ear train PRESET [--model NAME] [--score NAME] [--order NAME] [OPTIONS]\n\n"
            f"Presets: {presets}. Models: {', '.join(MODELS)}. Scores: {', '.join(SCORES)}. "
            f"Orders: {', '.join(ORDERS)}.\n`ear train digits --help` lists the options."
        )
        return 0 if arguments else 2
    preset, options = arguments[0], arguments[1:]
    if preset not in RUNS:
        known = f" (it is a model: ear train imagenet256 --model {preset})" if preset in MODELS else ""
        raise ValueError(f"unknown preset {preset!r}{known}; use one of {presets}")
    names: dict[str, str | None] = {}
    for kind, known_names in (("model", tuple(MODELS)), ("score", tuple(SCORES)), ("order", ORDERS)):
        names[kind], options = _take_name(options, f"--{kind}", known_names)
    config = RUNS[preset] if names["model"] is None else with_model(RUNS[preset], names["model"])
    config = with_score_and_order(preset, config, names["score"], names["order"])
    default = Train(config=config, out=Path("runs") / preset)
    if "--resume" in options:
        default = _of_run(_option(options, "--out", default.out), preset, config, names)
    command = parse_command(Train, options, f"ear train {preset}", default)
    command = dataclasses.replace(command, config=with_absolute_paths(command.config))
    if command.dry_run:
        from ear_model.training.estimate import estimate_run

        print(estimate_run(command.config, command.gpus, EPOCH_IMAGES.get(preset)).report())
        return 0
    from ear_model.training import graphs
    from ear_model.training.distributed import (
        all_or_none,
        is_main,
        leave_out_gemm_workspace,
        prefer_expandable_segments,
        process_group,
    )

    prefer_expandable_segments()
    if graphs.wanted(command.config):
        leave_out_gemm_workspace()
    with process_group(command.device), contextlib.ExitStack() as stack:
        with all_or_none():
            if is_main():
                stack.enter_context(_own_directory(command.out))
        _train(command, preset)
    return 0


def _option(options: list[str], name: str, otherwise: Path) -> Path:
    """The last value of ``--out PATH`` or ``--out=PATH``; :func:`parse_command` reports what is wrong with it."""
    value = otherwise
    for word, following in zip(options, [*options[1:], ""], strict=True):
        if word == name:
            value = Path(following)
        elif word.startswith(f"{name}="):
            value = Path(word.removeprefix(f"{name}="))
    return value


def _of_run(out: Path, preset: str, config: RunConfig, names: dict[str, str | None]) -> Train:
    """What a run to resume was begun with, for options to extend.

    Args:
        out: its directory.
        preset: the preset that is named.
        config: what the names of model, score and order make of the preset.
        names: these three, None if not given.

    Raises:
        ValueError: the run is of another preset, score, order or model than is named.
    """
    from ear_model.training.run_log import preset_of

    begun, own = load_config(out), preset_of(out)
    if own not in ("", preset):
        raise ValueError(f"{out} is a run of the preset {own}, not {preset}; resume it with `ear train {own}`")
    for name in ("score", "order"):
        there = getattr(begun.model, name)
        if names[name] not in (None, there):
            raise ValueError(f"{out} is a run of {name} {there}, not {names[name]}; leave --{name} out")
    same = with_score_and_order(preset, config, begun.model.score, begun.model.order).model
    if names["model"] is not None and same != begun.model:
        raise ValueError(f"--model is another model than that of {out}; leave it out")
    return Train(config=begun, out=out)


@contextlib.contextmanager
def _own_directory(out: Path) -> Iterator[None]:
    """The lock of a run directory, made if need be, and removed again if nothing was written in it.

    Raises:
        ValueError: another process has it, or it can't be made.
    """
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"{out} exists already and is no directory; give a new --out")
    made = [each for each in (out, *out.parents) if not each.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"can't make {out}: {getattr(error, 'strerror', None) or error}") from error
    with DirectoryLock(out):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # not empty
                for each in made:
                    each.rmdir()


def _take_name(options: list[str], option: str, known: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """``--model NAME`` or ``--model=NAME`` taken out of the options, which go on to set single fields.

    Raises:
        ValueError: no name, or one that is not known.
    """
    name, others = None, []
    words = iter(options)
    for word in words:
        if word == option:
            name = next(words, None)
            if name is None or name.startswith("-"):
                raise ValueError(f"{option} needs a name; use one of {', '.join(known)}")
        elif word.startswith(f"{option}="):
            name = word.removeprefix(f"{option}=")
        else:
            others.append(word)
    if name is not None and name not in known:
        what = "preset" if option == "--model" else option.removeprefix("--")
        raise ValueError(f"unknown {what} {shown(name)}; use one of {', '.join(known)}")
    return name, others


def _train(command: Train, preset: str) -> None:
    """Train, then write samples.png, loss.png and (for the digits, or with a judge) evaluation.json, and report."""
    from ear_model.devices import resolve_device
    from ear_model.evaluation.scoring import Scoring
    from ear_model.sampling.decoder import Decoder
    from ear_model.training import distributed
    from ear_model.training.trainer import Trainer

    started = time.perf_counter()
    config, out = command.config, command.out
    # What would stop the pictures and scores after the training, before it.
    with distributed.all_or_none():
        if command.resume:
            check_resumable(out, config)
        options = ScoringConfig(judge=command.judge, real=command.real)
        is_scored = config.data == "digits" or options.judge is not None
        is_drawn = is_scored or bool(config.tokenizer) or config.model.channels in (1, 3)
        where = distributed.local_device(resolve_device(command.device))
        decoder = Decoder(config, where) if is_drawn else None
        scoring = Scoring(config, options, decoder, str(where)) if decoder is not None and is_scored else None
    trainer = Trainer(config, out, resume=command.resume, device=command.device, preset=preset)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    if trainer.is_main:
        print(
            f"{config.data}: {parameters:,} parameters, {config.train.steps} steps of "
            f"{config.train.batch_size} images on {trainer.where}, from step {trainer.step}; run directory {out}",
            flush=True,
        )
    trainer.run()
    trained = time.perf_counter()
    model = trainer.averaged_model()
    if not trainer.is_main:
        return
    written = _write_pictures(model, config, out, decoder, scoring)
    last = read_metrics(out)[-1]
    print(
        f"loss {last['loss']:.4f} after {last['step']} steps, {trained - started:.0f} s of training, "
        f"{time.perf_counter() - trained:.0f} s of sampling and scoring\n{written}"
    )


def _write_pictures(
    model: "EAR", config: RunConfig, out: Path, decoder: "Decoder | None", scoring: "Scoring | None"
) -> str:
    """Samples, loss curve and scores of a finished run; returns where they are."""
    from ear_model import plots
    from ear_model.sampling.images import class_labels, sample_images

    metrics = read_metrics(out)
    plots.save_loss_curve([line["step"] for line in metrics], [line["loss"] for line in metrics], out / "loss.png")
    written = f"loss curve: {out / 'loss.png'}"
    if decoder is None:
        return f"{written}   (no samples: latents need --tokenizer)"
    num_classes = config.model.num_classes
    rows = 10 if decoder.image_size > 64 else 64  # of more classes, evenly spaced ones are shown
    shown = range(0, num_classes, -(-num_classes // rows))
    labels = class_labels(shown, 10 * len(shown), num_classes)
    images = sample_images(model, labels, seed=config.train.seed, **dataclasses.asdict(config.sampling))
    plots.save_grid(decoder(images), out / "samples.png", columns=10)
    written = f"samples: {out / 'samples.png'}   {written}"
    if scoring is not None:
        print(scoring.score(model, out, seed=config.train.seed))
        written = f"{written}   scores: {out / 'evaluation.json'}"
    return written
