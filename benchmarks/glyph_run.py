"""EAR on 64 x 64 glyphs within a time budget on one GPU: render, train a tokenizer, train, sample, score.

    python -m benchmarks.glyph_run OUT --judge judge.safetensors --deadline $(($(date +%s) + 570))

is the recipe ``glyphs64`` with the clock in the place of ``train.steps`` and everything in memory: no data, no
network. The recipe's fields can be set as with `ear train` (``--train.lr 2e-3``), those of the tokenizer's shape as
``--autoencoder.*``. OUT gets ``tokenizer.safetensors``, ``progress.json`` (the loss curve), ``samples.png`` (a row a
class), ``loss.png`` and ``scores.json``, all written anew as the run goes on, so a time limit loses little; and
``ema.safetensors`` with ``--save-weights``. Without ``--judge`` a judge is trained first.

``--seconds`` is the training with its grids. With ``--deadline``, a time of day in seconds since 1970, training stops
``--scoring-seconds`` before it if that is sooner, and a setting is scored only if the one before says that there is
time. The learning rate follows a cosine over the elapsed share of the training, so the schedule always comes to its
end. A grid of the untrained model is drawn first: what would fail after the training fails before it.
"""

import argparse
import datetime
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.glyph_data import (
    Latents,
    Report,
    find_latents,
    find_renders,
    judge_reconstructions,
    load_judge,
    new_judge,
)
from ear_model import graphs, plots
from ear_model.checkpoint import load_into, load_weights, save_weights
from ear_model.config import RUNS
from ear_model.ear import EAR
from ear_model.evaluate_judge import JudgedComparison, JudgeEvaluation, report_judged
from ear_model.files import write_atomically
from ear_model.judge import ImageTree
from ear_model.optim import ExponentialMovingAverage, clipped_step, make_optimizer, set_learning_rate
from ear_model.sample import sample_batches, sample_images, to_bytes
from ear_model.tokenizers.training import SMALL, TokenizerTraining

SAMPLED = 600  # images sampled at a time for the scores
# What of the recipe's training is used here; the clock decides over the rest.
TRAIN_FIELDS = (
    *("batch_size", "lr", "generator_lr_scale", "parameter_groups", "warmup_steps", "weight_decay", "beta1", "beta2"),
    *("clip", "ema", "tau", "finetune_tau", "cuda_graphs", "seed"),
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options, with ``config`` (the recipe) and ``autoencoder`` made of theirs. No tyro: it is not everywhere."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s OUT [options]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=480.0, help="training time, with the grids on the way")
    parser.add_argument("--deadline", type=float, default=math.inf, help="when all is to be over, seconds since 1970")
    parser.add_argument("--scoring-seconds", type=float, default=60.0, help="kept before the deadline for the scores")
    parser.add_argument("--images", type=int, default=192_000, help="training renders, held in GPU memory")
    parser.add_argument("--real", type=int, default=9_600, help="held-out renders")
    parser.add_argument("--renders", type=Path, help="read the renders from this file, or keep them there")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes to draw with")
    parser.add_argument("--num", type=int, default=4_800, help="samples scored per setting")
    parser.add_argument(
        "--settings", default="2:0.8,1:1,3:0.7", help="guidance:temperature, ...; grids show the first"
    )
    parser.add_argument("--grid-every", type=float, default=120.0, help="seconds between sample grids")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.safetensors; one is trained first if not given")
    parser.add_argument("--tokenizer-seconds", type=float, default=70.0, help="that training")
    parser.add_argument("--tokenizer-lr", type=float, default=TokenizerTraining.lr)
    parser.add_argument("--tokenizer-batch-size", type=int, default=TokenizerTraining.batch_size)
    parser.add_argument("--finetune-share", type=float, default=0.1, help="last share of the time, with finetune_tau")
    parser.add_argument("--judge", type=Path, help="judge.safetensors of `ear train-judge`")
    parser.add_argument("--judge-epochs", type=int, default=3)
    parser.add_argument("--judge-batch-size", type=int, default=512)
    parser.add_argument(
        "--init", type=Path, help="start from the ema.safetensors of --save-weights; needs --tokenizer"
    )
    parser.add_argument("--save-weights", action="store_true", help="keep the averaged weights, in bfloat16")
    recipe = RUNS["glyphs64"]
    sections: dict[str, Any] = {"model": recipe.model, "train": recipe.train, "sampling": recipe.sampling}
    sections["autoencoder"] = SMALL
    taken = {name: [field.name for field in fields(config)] for name, config in sections.items()}
    taken.update(train=list(TRAIN_FIELDS), sampling=["steps"])
    for section, config in sections.items():
        for name in taken[section]:
            value = getattr(config, name)
            kind: Any = {"type": int, "nargs": "+"} if isinstance(value, tuple) else {"type": type(value)}
            if isinstance(value, bool):
                kind = {"action": argparse.BooleanOptionalAction}
            parser.add_argument(f"--{section}.{name.replace('_', '-')}", default=value, **kind)
    options = parser.parse_args(arguments)
    for section, config in sections.items():
        chosen = {name: vars(options).pop(f"{section}.{name}") for name in taken[section]}
        try:
            sections[section] = replace(config, **chosen)
        except ValueError as error:
            parser.error(str(error))
    options.autoencoder = sections.pop("autoencoder")
    options.config = replace(recipe, **sections)
    if options.init is not None and options.tokenizer is None:
        parser.error("--init has learned the latents of a tokenizer; give --tokenizer too")
    if options.config.model.channels != options.autoencoder.latent_channels:
        parser.error(
            f"model.channels is {options.config.model.channels} and autoencoder.latent-channels "
            f"{options.autoencoder.latent_channels}; they must be the same"
        )
    return options


def train(
    model: EAR,
    data: ImageTree,
    latents: Latents,
    run: argparse.Namespace,
    report: Report,
    draw: Callable[[ExponentialMovingAverage], None],
) -> ExponentialMovingAverage:
    """Train for ``run.seconds``; images and latents are on the device, so a batch is an index."""
    config, device = run.config.train, data.images.device
    seconds = min(run.seconds, run.deadline - time.time() - run.scoring_seconds)
    if seconds <= 0:
        raise SystemExit(f"the deadline leaves {seconds:.0f} s to train; give a later one, or draw --renders before")
    report.say(f"training for {seconds:.0f} s")
    optimizer, ema = make_optimizer(model, config), ExponentialMovingAverage(model, config.ema)
    use_bf16 = device.type == "cuda"
    if use_bf16 and config.cuda_graphs and graphs.can_capture(model.config, use_bf16=True):
        model.capture(config.batch_size, use_bf16=True)
    curve: list[tuple[int, float, float]] = []
    pending: list[Tensor] = []
    step, started = 0, time.perf_counter()
    paused, last_grid = 0.0, 0.0
    while (elapsed := time.perf_counter() - started) < seconds:
        share = elapsed / seconds
        warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
        set_learning_rate(optimizer, config.lr * warm * 0.5 * (1 + math.cos(math.pi * share)))
        model.score.tau = config.finetune_tau if share > 1 - run.finetune_share else config.tau
        chosen = torch.randint(len(data.labels), (config.batch_size,), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16):
            loss = model(latents.draw(chosen), data.labels[chosen])
        loss.backward()
        clipped_step(optimizer, config.clip, ema)
        optimizer.zero_grad(set_to_none=True)
        step += 1
        pending.append(loss.detach())
        # The host waits here and nowhere else, which also keeps the elapsed time true.
        if len(pending) == 20:
            mean = torch.stack(pending).mean().item()
            pending.clear()
            if not math.isfinite(mean):
                raise SystemExit(f"step {step}: loss {mean}")
            curve.append((step, time.perf_counter() - started - paused, mean))
            if step % 400 == 0 or step == 20:
                rate = step * config.batch_size / curve[-1][1]
                report.say(f"step {step}, loss {mean:.4f}, {rate:.0f} images/s, {curve[-1][1]:.0f} s of training")
                save_curve(report.out, curve, plot=False)
            if elapsed - last_grid > run.grid_every:
                before, last_grid = time.perf_counter(), elapsed
                draw(ema)
                save_curve(report.out, curve)
                paused += time.perf_counter() - before
    if device.type == "cuda":
        torch.cuda.synchronize()
        report.add(peak_gb=torch.cuda.max_memory_allocated() / 1e9)
    trained = time.perf_counter() - started - paused
    save_curve(report.out, curve)
    report.add(
        steps=step,
        training_seconds=trained,
        images_per_second=step * config.batch_size / trained,
        final_loss=curve[-1][2] if curve else None,
    )
    return ema


def save_curve(out: Path, curve: list[tuple[int, float, float]], *, plot: bool = True) -> None:
    """progress.json, and loss.png, which takes half a second."""
    text = json.dumps({"columns": ["step", "seconds", "loss"], "curve": curve}) + "\n"
    write_atomically(out / "progress.json", lambda path: path.write_text(text))
    if plot and len(curve) > 1:
        plots.save_loss_curve([line[0] for line in curve], [line[2] for line in curve], out / "loss.png")


def averaged(model: EAR, ema: ExponentialMovingAverage) -> EAR:
    """A model of the averaged weights, in eval mode."""
    device = next(model.parameters()).device
    other = EAR(model.config).to(device).eval()
    ema.copy_to(other)
    return other


def main(arguments: list[str] | None = None) -> None:
    """The run; SystemExit says what is wrong."""
    run = parse(arguments)
    model_config, classes, seed = run.config.model, run.config.model.num_classes, run.config.train.seed
    size = model_config.image_size * run.autoencoder.downsampling
    settings = [tuple(map(float, pair.split(":"))) for pair in run.settings.split(",")]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(run.out)
    torch.manual_seed(seed)
    model = EAR(model_config)
    if run.init is not None:
        load_into(model, load_weights(run.init)[1], run.init)
    model.to(device).train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    report.say(
        f"{where}, torch {torch.__version__}: {parameters:,} parameters, {classes} classes of {size} x "
        f"{size}, {model_config.num_tokens} tokens of {model_config.token_dim}"
    )
    report.add(
        device=where,
        torch=torch.__version__,
        python=platform.python_version(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        options={**vars(run), "config": asdict(run.config), "autoencoder": asdict(run.autoencoder)},
        parameters=parameters,
    )

    judge = None if run.judge is None else load_judge(run.judge, classes, size, device)
    real, data = find_renders(
        run.renders, run.real, run.images, classes, size, seed=seed, workers=run.workers, report=report
    )
    report.say(f"{len(data.labels):,} training and {len(real.labels):,} held-out images rendered")
    on_device = ImageTree(data.images.to(device), data.labels.to(device), data.class_names)
    if judge is None:
        judge = new_judge(
            on_device, real, run.judge_epochs, run.judge_batch_size, seed=seed, device=device, report=report
        )
    report.say(f"judge: accuracy {judge.accuracy:.4f} on held-out images")
    report.add(judge_accuracy=judge.accuracy, judge_config=asdict(judge.config))
    copied = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))[:20_000]
    comparison = JudgedComparison(judge, real, run.num, train=data.select(copied), device=device)

    training = TokenizerTraining(image_size=size, lr=run.tokenizer_lr, batch_size=run.tokenizer_batch_size, seed=seed)
    latents = find_latents(on_device, run.tokenizer, run.autoencoder, training, run.tokenizer_seconds, report)
    judge_reconstructions(latents.tokenizer, real, judge, report)

    rows = torch.arange(classes).repeat_interleave(10)
    recognised: list[float] = []

    def draw(ema: ExponentialMovingAverage) -> None:
        guidance, temperature = settings[0]
        chosen = {"steps": run.config.sampling.steps, "guidance": guidance, "temperature": temperature}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            sampled = sample_images(averaged(model, ema), rows, seed=1, **chosen)
        images = latents.decode(sampled).cpu()
        plots.save_grid(images, run.out / "samples.png", columns=10)
        recognised.append((judge.look(to_bytes(images).contiguous())[1] == rows).double().mean().item())
        report.say(f"grid of {len(rows)} samples: the judge recognises {recognised[-1]:.3f}")
        report.add(grids_recognised=recognised)

    draw(ExponentialMovingAverage(model, 0.0))
    ema = train(model, on_device, latents, run, report, draw)
    if run.save_weights:
        # Half the size; sampling multiplies in bfloat16 anyway.
        halved = {name: average.bfloat16() for name, average in ema.averages.items()}
        save_weights(run.out / "ema.safetensors", halved, model_config)
    draw(ema)
    sampled = averaged(model, ema)
    labels = torch.arange(run.num) % classes
    results: list[JudgeEvaluation] = []
    taken = 0.0
    for guidance, temperature in settings:
        if time.time() + 1.2 * taken > run.deadline:
            report.say(f"no time left for guidance {guidance:g}, temperature {temperature:g}")
            continue
        started = time.perf_counter()
        setting = {"steps": run.config.sampling.steps, "guidance": guidance, "temperature": temperature}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            batches = sample_batches(sampled, labels, latents.decode, batch_size=SAMPLED, **setting)
            samples = torch.cat([images for _, images in batches])
        sampling = time.perf_counter() - started
        results.append(comparison.score(samples, labels, **setting))
        taken = time.perf_counter() - started
        report.add(settings=[asdict(result) for result in results], sampling_images_per_second=run.num / sampling)
        report.say(f"scored in {taken:.1f} s, {sampling:.1f} of them sampling\n" + report_judged(results))
    report.say("done")


if __name__ == "__main__":
    main()
