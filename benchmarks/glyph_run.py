"""EAR on 64 x 64 glyphs within a time budget on one GPU: render, train a judge, train, sample, score.

    python benchmarks/glyph_run.py OUT --judge judge.safetensors --deadline $(($(date +%s) + 570))

Everything is made on the spot: no data, no network. OUT gets ``progress.json`` (the loss curve), ``samples.png`` (a
row a class), ``loss.png`` and ``scores.json``, all written anew as the run goes on, so a time limit loses little; and
``ema.safetensors`` with ``--save-weights``. Without ``--judge`` a judge is trained first.

``--seconds`` is the training with its grids. With ``--deadline``, a time of day in seconds since 1970, training stops
``--scoring-seconds`` before it if that is sooner, and a setting is scored only if the one before says that there is
time. The learning rate follows a cosine over the elapsed share of the training, so the schedule always comes to its
end.
"""

import argparse
import datetime
import json
import math
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ear_model import plots
from ear_model.checkpoint import load_into, load_weights, save_weights
from ear_model.config import RUNS, ModelConfig
from ear_model.ear import EAR
from ear_model.evaluate_judge import JudgedComparison, JudgeEvaluation, report_judged
from ear_model.files import write_atomically
from ear_model.glyphs import CLASS_NAMES, render_batch
from ear_model.judge import ImageTree, Judge, JudgeConfig, train_judge
from ear_model.optim import ExponentialMovingAverage, clipped_step, make_optimizer, set_learning_rate
from ear_model.sample import sample_batches, sample_images, to_bytes
from ear_model.tokenizers.kl16 import AutoencoderConfig, AutoencoderKL, Posterior
from ear_model.tokenizers.latent import AutoencoderTokenizer, save_autoencoder
from ear_model.tokenizers.training import Reconstruction, TokenizerTraining, initialise


def parse() -> argparse.Namespace:
    preset = RUNS["glyphs64"]
    model, train, sampling = preset.model, preset.train, preset.sampling
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=480.0, help="training time, with the grids on the way")
    parser.add_argument("--deadline", type=float, default=math.inf, help="when all is to be over, seconds since 1970")
    parser.add_argument("--scoring-seconds", type=float, default=60.0, help="kept before the deadline for the scores")
    parser.add_argument("--images", type=int, default=192_000, help="training renders, held in GPU memory")
    parser.add_argument("--renders", type=Path, help="read the renders from this file, or keep them there")
    parser.add_argument("--real", type=int, default=9_600, help="held-out renders")
    parser.add_argument("--num", type=int, default=4_800, help="samples scored per setting")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--classes", type=int, default=model.num_classes)
    parser.add_argument("--size", type=int, default=model.image_size)
    parser.add_argument("--patch", type=int, default=model.patch_size)
    parser.add_argument(
        "--downsampling", type=int, default=1, help="pixels a side of a token of a tokenizer trained first; 1: none"
    )
    parser.add_argument("--latent-channels", type=int, default=32, help="of that tokenizer")
    parser.add_argument("--tokenizer-seconds", type=float, default=75.0, help="its training")
    parser.add_argument("--tokenizer-lr", type=float, default=1e-3)
    parser.add_argument("--tokenizer-batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=model.width)
    parser.add_argument("--depth", type=int, default=model.depth)
    parser.add_argument("--heads", type=int, default=model.num_heads)
    parser.add_argument("--generator-width", type=int, default=model.generator_width)
    parser.add_argument("--generator-depth", type=int, default=model.generator_depth)
    parser.add_argument("--num-samples", type=int, default=model.num_samples)
    parser.add_argument(
        "--positions", type=float, default=0.0, help="standard deviation of a 2-D sinusoid to start positions from"
    )
    parser.add_argument("--min-mask-ratio", type=float, default=model.min_mask_ratio)
    parser.add_argument(
        "--masks",
        choices=("paper", "cosine"),
        default="paper",
        help="share of masked tokens in training: the paper's, or uniform over the decoding steps",
    )
    parser.add_argument("--batch-size", type=int, default=train.batch_size)
    parser.add_argument("--lr", type=float, default=train.lr)
    parser.add_argument("--generator-lr-scale", type=float, default=train.generator_lr_scale)
    parser.add_argument("--warmup-steps", type=int, default=train.warmup_steps)
    parser.add_argument("--ema", type=float, default=train.ema)
    parser.add_argument("--finetune-share", type=float, default=0.1, help="last share of the time, with tau 0.99")
    parser.add_argument("--judge", type=Path, help="judge.safetensors of `ear train-judge`")
    parser.add_argument("--judge-epochs", type=int, default=3)
    parser.add_argument("--judge-batch-size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=sampling.steps, help="decoding steps")
    parser.add_argument("--settings", default="2:0.8,1:1", help="guidance:temperature, ...; grids show the first")
    parser.add_argument("--grid-every", type=float, default=120.0, help="seconds between sample grids")
    parser.add_argument("--compile", action="store_true", help="torch.compile the backbone's blocks")
    parser.add_argument("--init", type=Path, help="start from the ema.safetensors of a run that --save-weights kept")
    parser.add_argument("--save-weights", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


class Report:
    """What is known so far, in OUT/scores.json."""

    def __init__(self, out: Path) -> None:
        self.out, self.content, self.started = out, dict[str, Any](), time.perf_counter()

    def add(self, **values: Any) -> None:
        self.content.update(values, seconds_so_far=round(time.perf_counter() - self.started, 1))
        text = json.dumps(self.content, indent=1) + "\n"
        write_atomically(self.out / "scores.json", lambda path: path.write_text(text))

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", flush=True)


def render(count: int, options: argparse.Namespace, split: str) -> ImageTree:
    labels = torch.arange(count) % options.classes
    images = render_batch(labels, options.seed, size=options.size, split=split, workers=options.workers)  # type: ignore[arg-type]
    return ImageTree(images, labels, CLASS_NAMES[: options.classes])


def find_renders(options: argparse.Namespace) -> tuple[ImageTree, ImageTree]:
    """Held-out and training images: of ``--renders`` if that file is there, else drawn, and kept there."""
    names = CLASS_NAMES[: options.classes]
    if options.renders is not None and options.renders.is_file():
        stored = torch.load(options.renders, weights_only=True)
        return ImageTree(*stored["real"], names), ImageTree(*stored["train"], names)
    # Each starts its processes, which takes some seconds: at the same time.
    with ThreadPoolExecutor(2) as pool:
        waiting = [
            pool.submit(render, *job) for job in ((options.real, options, "test"), (options.images, options, "train"))
        ]
    real, data = (job.result() for job in waiting)
    if options.renders is not None:
        stored = {"real": (real.images, real.labels), "train": (data.images, data.labels)}
        write_atomically(options.renders, lambda path: torch.save(stored, path))
    return real, data


class Latents:
    """A tokenizer trained on the spot and the latents of all images, where the model is to read latents."""

    def __init__(self, data: ImageTree, options: argparse.Namespace, device: torch.device, report: Report) -> None:
        multipliers = (1, 2, 2, 4, 4)[: options.downsampling.bit_length()]
        shape = AutoencoderConfig(32, multipliers, 1, options.latent_channels, norm_groups=8)
        training = TokenizerTraining(lr=options.tokenizer_lr, batch_size=options.tokenizer_batch_size)
        torch.manual_seed(options.seed)
        model = AutoencoderKL(shape).to(device).train()
        initialise(model)
        on_gpu, side, batch = device.type == "cuda", options.size // options.downsampling, training.batch_size
        if on_gpu:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters(), training.lr, (0.9, 0.99), weight_decay=1e-4, fused=on_gpu)
        run: Any = Reconstruction(model, training.kl_weight)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            if on_gpu:
                # Python needs longer to launch the seven hundred kernels of a step than they run.
                sizes = (3, options.size, options.size), (options.latent_channels, side, side)
                run = torch.cuda.make_graphed_callables(
                    run, tuple(torch.zeros(batch, *size, device=device) for size in sizes)
                )
            step, started = 0, time.perf_counter()
            while (share := (time.perf_counter() - started) / options.tokenizer_seconds) < 1:
                for group in optimizer.param_groups:
                    group["lr"] = training.lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * share))
                chosen = torch.randint(len(data.labels), (batch,), device=device)
                noise = torch.randn(batch, options.latent_channels, side, side, device=device)
                loss = run(pixels(data, chosen), noise)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)
                optimizer.step()
                step += 1
                if step % 50 == 0:  # the host waits here, which keeps the elapsed time true
                    last = loss.item()
                if step % 1000 == 0:
                    report.say(f"tokenizer: step {step}, loss {last:.4f}")
        self.tokenizer = AutoencoderTokenizer(model, 1.0)
        self.moments = self.encode(data)
        self.tokenizer.latent_scale = 1 / float(Posterior(self.moments).sample().std())
        save_autoencoder(options.out / "tokenizer.safetensors", model, self.tokenizer.latent_scale)
        report.add(tokenizer={"shape": asdict(shape), "steps": step, "latent_scale": self.tokenizer.latent_scale})

    def encode(self, data: ImageTree) -> Tensor:
        """Moments ``[N, 2 c, h, w]`` of all images."""
        parts = torch.arange(len(data.labels), device=self.tokenizer.device).split(512)
        with torch.autocast(self.tokenizer.device.type, torch.bfloat16, enabled=self.tokenizer.device.type == "cuda"):
            return torch.cat([self.tokenizer.encode(pixels(data, part)).float() for part in parts])

    def draw(self, chosen: Tensor) -> Tensor:
        """Latents of those images, drawn from their posteriors."""
        return Posterior(self.moments[chosen]).sample() * self.tokenizer.latent_scale

    def judge_reconstructions(self, real: ImageTree, judge: Judge, report: Report) -> None:
        """How much of held-out images the tokenizer keeps."""
        device = self.tokenizer.device
        held_out = ImageTree(real.images.to(device), real.labels.to(device), real.class_names)
        latents = Posterior(self.encode(held_out)).mode() * self.tokenizer.latent_scale
        images = self.tokenizer.decode(latents, 600)
        whole = pixels(held_out, torch.arange(len(real.labels), device=device))
        psnr = 10 * math.log10(4 / float((images - whole).square().mean()))
        right = (judge.look(to_bytes(images).contiguous())[1].cpu() == real.labels).double().mean().item()
        report.say(f"tokenizer: {psnr:.1f} dB, the judge recognises {right:.4f} of held-out reconstructions")
        report.add(reconstruction={"psnr": psnr, "judge_accuracy": right})


def pixels(data: ImageTree, chosen: Tensor) -> Tensor:
    """Those images in -1..1."""
    return data.images[chosen].float() / 127.5 - 1


@torch.no_grad()
def start_positions(model: EAR, deviation: float) -> None:
    """Add a 2-D sinusoid to the learned positions of the tokens: periods of 4 tokens to four times the image.

    As they start, normal with deviation 0.02, positions are about a tenth of what a known token is projected to.
    """
    positions = model.backbone.decoder_pos_embed_learned[0, model.config.class_tokens :]
    count, width = positions.shape
    side = math.isqrt(count)
    frequencies = math.pi / 2 * torch.logspace(0, -math.log2(side), width // 4, base=2)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1) * deviation * math.sqrt(2)
    grid = torch.cat([waves[:, None].expand(side, side, -1), waves[None].expand(side, side, -1)], dim=2)
    positions[:, : grid.shape[2]] += grid.flatten(0, 1)


def find_judge(
    data: ImageTree, real: ImageTree, options: argparse.Namespace, device: torch.device, report: Report
) -> Judge:
    """The judge of ``--judge``, or a new one, which is kept."""
    if options.judge is None:
        config = JudgeConfig(epochs=options.judge_epochs, batch_size=options.judge_batch_size, seed=options.seed)
        judge = train_judge(data, real, config, device=device, log=report.say)
        judge.save(options.out / "judge.safetensors")
        return judge
    judge = Judge.load(options.judge, device)
    if judge.class_names != data.class_names or judge.image_size != options.size:
        raise SystemExit(
            f"{options.judge} judges {len(judge.class_names)} classes of {judge.image_size} pixels; "
            f"this run has {options.classes} of {options.size}"
        )
    return judge


def train(
    model: EAR,
    data: ImageTree,
    latents: Latents | None,
    options: argparse.Namespace,
    device: torch.device,
    report: Report,
    draw: Callable[[ExponentialMovingAverage], None],
) -> ExponentialMovingAverage:
    """Train for ``options.seconds``; ``data`` is on the device, so a batch is an index into it or its latents."""
    seconds = min(options.seconds, options.deadline - time.time() - options.scoring_seconds)
    report.say(f"training for {seconds:.0f} s")
    config = replace(
        RUNS["glyphs64"].train,
        lr=options.lr,
        generator_lr_scale=options.generator_lr_scale,
        ema=options.ema,
        batch_size=options.batch_size,
    )
    optimizer, ema = make_optimizer(model, config), ExponentialMovingAverage(model, config.ema)
    use_bf16 = device.type == "cuda"
    if use_bf16 and not options.compile:
        model.backbone.capture_blocks(options.batch_size, use_bf16=True)
    curve: list[tuple[int, float, float]] = []
    pending: list[torch.Tensor] = []
    step, started = 0, time.perf_counter()
    paused, last_grid = 0.0, 0.0
    while (elapsed := time.perf_counter() - started) < seconds:
        share = elapsed / seconds
        warm = min(1.0, (step + 1) / options.warmup_steps)
        set_learning_rate(optimizer, options.lr * warm * 0.5 * (1 + math.cos(math.pi * share)))
        model.score.tau = config.finetune_tau if share > 1 - options.finetune_share else config.tau
        chosen = torch.randint(len(data.labels), (options.batch_size,), device=device)
        images = pixels(data, chosen) if latents is None else latents.draw(chosen)
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16):
            loss = model(images, data.labels[chosen], num_masked=draw_num_masked(options.masks, model.config))
        loss.backward()
        clipped_step(optimizer, config.clip)
        optimizer.zero_grad(set_to_none=True)
        ema.update(model)
        step += 1
        pending.append(loss.detach())
        # The host waits here and nowhere else, which also keeps the elapsed time true.
        if len(pending) == 20:
            mean = torch.stack(pending).mean().item()
            pending.clear()
            if not math.isfinite(mean):
                raise SystemExit(f"step {step}: loss {mean}")
            curve.append((step, time.perf_counter() - started - paused, mean))
            if step % 400 == 0:
                rate = step * options.batch_size / curve[-1][1]
                report.say(f"step {step}, loss {mean:.4f}, {rate:.0f} images/s, {curve[-1][1]:.0f} s of training")
                save_curve(report.out, curve, plot=False)
            if elapsed - last_grid > options.grid_every:
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
        images_per_second=step * options.batch_size / trained,
        final_loss=curve[-1][2] if curve else None,
    )
    return ema


def draw_num_masked(masks: str, config: ModelConfig) -> int | None:
    """Masked tokens of a batch: None for the paper's draw, else what a random moment of decoding has left."""
    if masks == "paper":
        return None
    return max(1, math.ceil(config.num_tokens * math.cos(math.pi / 2 * float(torch.rand(())))))


def save_curve(out: Path, curve: list[tuple[int, float, float]], *, plot: bool = True) -> None:
    """progress.json, and loss.png, which takes half a second."""
    text = json.dumps({"columns": ["step", "seconds", "loss"], "curve": curve}) + "\n"
    write_atomically(out / "progress.json", lambda path: path.write_text(text))
    if plot and len(curve) > 1:
        plots.save_loss_curve([line[0] for line in curve], [line[2] for line in curve], out / "loss.png")


def averaged(model: EAR, ema: ExponentialMovingAverage, config: ModelConfig, device: torch.device) -> EAR:
    other = EAR(config).to(device).eval()
    other.load_state_dict(model.state_dict())
    ema.copy_to(other)
    return other


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(options.out)
    settings = [tuple(map(float, pair.split(":"))) for pair in options.settings.split(",")]
    in_pixels = options.downsampling == 1
    config = replace(
        RUNS["glyphs64"].model,
        image_size=options.size // options.downsampling,
        channels=3 if in_pixels else options.latent_channels,
        patch_size=options.patch if in_pixels else 1,
        num_classes=options.classes,
        width=options.width,
        depth=options.depth,
        num_heads=options.heads,
        generator_width=options.generator_width,
        generator_depth=options.generator_depth,
        num_samples=options.num_samples,
        min_mask_ratio=options.min_mask_ratio,
    )
    torch.manual_seed(options.seed)
    model = EAR(config)
    if options.init is not None:
        load_into(model, load_weights(options.init)[1], options.init)
    elif options.positions:
        start_positions(model, options.positions)
    model.to(device).train()
    report.add(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch=torch.__version__,
        python=platform.python_version(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        options={name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        model=asdict(config),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )

    real, data = find_renders(options)
    report.say(f"{len(data.labels):,} training and {len(real.labels):,} held-out images rendered")
    on_device = ImageTree(data.images.to(device), data.labels.to(device), data.class_names)
    judge = find_judge(on_device, real, options, device, report)
    report.say(f"judge: accuracy {judge.accuracy:.4f} on held-out images")
    report.add(judge_accuracy=judge.accuracy, judge_config=asdict(judge.config))
    copied = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(options.seed))[:20_000]
    comparison = JudgedComparison(judge, real, options.num, train=data.select(copied), device=device)

    latents = None if in_pixels else Latents(on_device, options, device, report)
    if latents is not None:
        latents.judge_reconstructions(real, judge, report)

    def decoded(sampled: Tensor) -> Tensor:
        if latents is None:
            return sampled
        with torch.autocast(device.type, enabled=False):
            return latents.tokenizer.decode(sampled.to(device).float(), 600)

    rows = torch.arange(options.classes).repeat_interleave(10)

    recognised: list[float] = []

    def draw(ema: ExponentialMovingAverage) -> None:
        sampled = averaged(model, ema, config, device)
        chosen = dict(zip(("guidance", "temperature"), settings[0], strict=True))
        images = decoded(autocast_sample(sampled, rows, seed=1, steps=options.steps, **chosen)).cpu()
        plots.save_grid(images, options.out / "samples.png", columns=10)
        recognised.append((judge.look(to_bytes(images).contiguous())[1] == rows).double().mean().item())
        report.say(f"grid of {len(rows)} samples: the judge recognises {recognised[-1]:.3f}")
        report.add(grids_recognised=recognised)

    if options.compile:
        for block in model.backbone.decoder_blocks:
            block.compile()
    ema = train(model, on_device, latents, options, device, report, draw)
    if options.save_weights:
        save_weights(options.out / "ema.safetensors", ema.averages, config)
    draw(ema)
    sampled = averaged(model, ema, config, device)
    labels = torch.arange(options.num) % options.classes
    results: list[JudgeEvaluation] = []
    taken = 0.0
    for guidance, temperature in settings:
        if time.time() + 1.2 * taken > options.deadline:
            report.say(f"no time left for guidance {guidance:g}, temperature {temperature:g}")
            continue
        started = time.perf_counter()
        chosen = {"steps": options.steps, "guidance": guidance, "temperature": temperature}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            parts = [images for _, images in sample_batches(sampled, labels, decoded, batch_size=600, **chosen)]
        sampling = time.perf_counter() - started
        results.append(comparison.score(torch.cat(parts), labels, **chosen))  # type: ignore[arg-type]
        taken = time.perf_counter() - started
        report.add(settings=[asdict(result) for result in results], sampling_images_per_second=options.num / sampling)
        report.say(f"scored in {taken:.1f} s, {sampling:.1f} of them sampling\n" + report_judged(results))
    report.say("done")


def autocast_sample(model: EAR, labels: torch.Tensor, **options: Any) -> torch.Tensor:
    """Samples under the autocast that the model was trained with."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return sample_images(model, labels, **options).float()


if __name__ == "__main__":
    main()
