"""What a glyph run trains on and is judged by: renders, a judge, a tokenizer and its latents. See glyph_run.py."""

from __future__ import annotations

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ear_model.files import write_atomically
from ear_model.glyphs import CLASS_NAMES, render_batch
from ear_model.judge import ImageTree, Judge, JudgeConfig, train_judge
from ear_model.sample import to_bytes
from ear_model.tokenizers.kl16 import AutoencoderConfig, Posterior
from ear_model.tokenizers.latent import AutoencoderTokenizer, load_latent_tokenizer, save_autoencoder
from ear_model.tokenizers.training import AutoencoderSteps, TokenizerTraining, learning_rate

DECODED = 600  # images that the tokenizer encodes or decodes at a time


class Report:
    """What is known so far, in OUT/scores.json."""

    def __init__(self, out: Path) -> None:
        self.out, self.content, self.started = out, dict[str, Any](), time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)

    def add(self, **values: Any) -> None:
        self.content.update(values, seconds_so_far=round(time.perf_counter() - self.started, 1))
        text = json.dumps(self.content, indent=1, default=str) + "\n"
        write_atomically(self.out / "scores.json", lambda path: path.write_text(text))

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", flush=True)


def render(
    count: int, classes: int, size: int, split: Literal["train", "test"], *, seed: int = 0, workers: int = 1
) -> ImageTree:
    """``count`` drawn images of the first ``classes`` characters, the classes in turn."""
    labels = torch.arange(count) % classes
    return ImageTree(
        render_batch(labels, seed, size=size, split=split, workers=workers), labels, CLASS_NAMES[:classes]
    )


def find_renders(
    path: Path | None, real: int, images: int, classes: int, size: int, *, seed: int, workers: int, report: Report
) -> tuple[ImageTree, ImageTree]:
    """Held-out and training images: of ``path`` if that file is there, else drawn, and kept there.

    Raises:
        SystemExit: the file holds images of another size or of other classes.
    """
    names = CLASS_NAMES[:classes]
    if path is not None and path.is_file():
        stored = torch.load(path, weights_only=True)
        real_images, real_labels = stored["real"]
        train_images, train_labels = stored["train"]
        trees = ImageTree(real_images, real_labels, names), ImageTree(train_images, train_labels, names)
        for tree in trees:
            held, kinds = tuple(tree.images.shape[1:]), int(tree.labels.max()) + 1
            if held != (3, size, size) or kinds != classes:
                raise SystemExit(
                    f"{path} holds {kinds} classes of {held}; this run has {classes} of (3, {size}, {size})"
                )
        return trees
    report.say(f"drawing {real + images:,} images by {workers} processes" + (f", to {path}" if path else ""))
    # Each starts its processes, which takes some seconds: at the same time.
    with ThreadPoolExecutor(2) as pool:
        waiting = [
            pool.submit(render, count, classes, size, split, seed=seed, workers=workers)  # type: ignore[arg-type]
            for count, split in ((real, "test"), (images, "train"))
        ]
    held_out, train = (job.result() for job in waiting)
    if path is not None:
        kept = {"real": (held_out.images, held_out.labels), "train": (train.images, train.labels)}
        write_atomically(path, lambda temporary: torch.save(kept, temporary))
    return held_out, train


def load_judge(path: Path, classes: int, size: int, device: torch.device) -> Judge:
    """The judge of a file. SystemExit if it judges other images."""
    judge = Judge.load(path, device)
    if judge.class_names != CLASS_NAMES[:classes] or judge.image_size != size:
        raise SystemExit(
            f"{path} judges {len(judge.class_names)} classes of {judge.image_size} pixels; "
            f"this run has {classes} of {size}"
        )
    return judge


def new_judge(
    data: ImageTree, real: ImageTree, epochs: int, batch_size: int, *, seed: int, device: torch.device, report: Report
) -> Judge:
    """A judge of these images, kept as OUT/judge.safetensors."""
    config = JudgeConfig(epochs=epochs, batch_size=batch_size, seed=seed)
    judge = train_judge(data, real, config, device=device, log=report.say)
    judge.save(report.out / "judge.safetensors")
    return judge


def pixels(data: ImageTree, chosen: Tensor) -> Tensor:
    """Those images in -1..1."""
    return data.images[chosen].float() / 127.5 - 1


def train_tokenizer(
    data: ImageTree, shape: AutoencoderConfig, training: TokenizerTraining, seconds: float, report: Report
) -> AutoencoderTokenizer:
    """What `ear train-tokenizer` does, for ``seconds`` instead of ``training.steps``, on images held on the device.

    The latent scale is still 1.
    """
    device = data.images.device
    steps = AutoencoderSteps(shape, training, device)
    steps.capture()
    step, started = 0, time.perf_counter()
    while (share := (time.perf_counter() - started) / seconds) < 1:
        chosen = torch.randint(len(data.labels), (training.batch_size,), device=device)
        loss = steps.step(pixels(data, chosen), step, learning_rate(share * training.steps, training))
        step += 1
        if step % 50 == 0 and not math.isfinite(last := loss.item()):  # waits, which keeps the elapsed time true
            raise SystemExit(f"tokenizer: step {step}: loss {last}")
        if step % 1000 == 0:
            report.say(f"tokenizer: step {step}, loss {last:.4f}")
    report.add(tokenizer_steps=step)
    return AutoencoderTokenizer(steps.model, 1.0)


class Latents:
    """The latents of all images under a tokenizer.

    Args:
        data: images on the device.
        tokenizer: its latent scale is measured, unless it comes from a file.
        is_new: whether it does not.
        report: gets tokenizer.safetensors.
    """

    def __init__(self, data: ImageTree, tokenizer: AutoencoderTokenizer, report: Report, *, is_new: bool) -> None:
        self.tokenizer, self.moments = tokenizer, _encode(tokenizer, data)
        if is_new:
            tokenizer.latent_scale = 1 / float(Posterior(self.moments).sample().std())
        save_autoencoder(report.out / "tokenizer.safetensors", tokenizer.autoencoder, tokenizer.latent_scale)
        report.add(tokenizer={"shape": asdict(tokenizer.autoencoder.config), "latent_scale": tokenizer.latent_scale})

    def draw(self, chosen: Tensor) -> Tensor:
        """Latents of those images, drawn from their posteriors."""
        return Posterior(self.moments[chosen]).sample() * self.tokenizer.latent_scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, in float32."""
        with torch.autocast(self.tokenizer.device.type, enabled=False):
            return self.tokenizer.decode(latents.to(self.tokenizer.device).float(), DECODED)


def _encode(tokenizer: AutoencoderTokenizer, data: ImageTree) -> Tensor:
    """Moments ``[N, 2 c, h, w]`` of all images."""
    device = tokenizer.device
    parts = torch.arange(len(data.labels), device=device).split(DECODED)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return torch.cat([tokenizer.encode(pixels(data, part)).float() for part in parts])


def judge_reconstructions(tokenizer: AutoencoderTokenizer, real: ImageTree, judge: Judge, report: Report) -> None:
    """How much of held-out images the tokenizer keeps."""
    device = tokenizer.device
    held_out = ImageTree(real.images.to(device), real.labels.to(device), real.class_names)
    images = tokenizer.decode(Posterior(_encode(tokenizer, held_out)).mode() * tokenizer.latent_scale, DECODED)
    whole = pixels(held_out, torch.arange(len(real.labels), device=device))
    psnr = 10 * math.log10(4 / float((images - whole).square().mean()))
    right = (judge.look(to_bytes(images).contiguous())[1].cpu() == real.labels).double().mean().item()
    report.say(f"tokenizer: {psnr:.1f} dB, the judge recognises {right:.4f} of held-out reconstructions")
    report.add(reconstruction={"psnr": psnr, "judge_accuracy": right})


def find_latents(
    data: ImageTree,
    path: Path | None,
    shape: AutoencoderConfig,
    training: TokenizerTraining,
    seconds: float,
    report: Report,
) -> Latents:
    """Latents of the images, under the tokenizer of a file or one trained now.

    Raises:
        SystemExit: the file's tokenizer has another shape.
    """
    if path is None:
        return Latents(data, train_tokenizer(data, shape, training, seconds, report), report, is_new=True)
    tokenizer = load_latent_tokenizer(path, data.images.device)
    if (tokenizer.downsampling, tokenizer.latent_channels) != (shape.downsampling, shape.latent_channels):
        raise SystemExit(
            f"{path} makes latents of {tokenizer.latent_channels} channels, images {tokenizer.downsampling}"
            f" times as large; this run has {shape.latent_channels} and {shape.downsampling}"
        )
    return Latents(data, tokenizer, report, is_new=False)
