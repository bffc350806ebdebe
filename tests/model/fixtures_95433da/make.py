"""Writes the files beside it. To be run with the code of commit 95433da, in an empty directory:

PYTHONPATH=CHECKOUT_OF_95433DA python make.py
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ear_model import cli
from ear_model.config import DIGITS, RUNS, RunConfig, SamplingConfig, TrainConfig
from ear_model.ear import EAR
from ear_model.tokenizers.kl16 import AutoencoderConfig, AutoencoderKL
from ear_model.tokenizers.latent import save_autoencoder
from ear_model.train import Trainer

TINY = replace(
    DIGITS, width=16, depth=1, num_heads=2, class_tokens=2, generator_width=16, generator_depth=1, noise_dim=8
)
TRAIN = TrainConfig(steps=6, batch_size=8, warmup_steps=2, lr=1e-2, generator_lr_scale=1.0, checkpoint_every=3)
SHAPE = AutoencoderConfig(channels=4, multipliers=(1, 1), residual_blocks=1, latent_channels=2, norm_groups=1)
SAMPLING = SamplingConfig(steps=4, guidance=1.5)


def expected(run: Path, config: RunConfig) -> dict:
    """Three steps and a checkpoint; what the fourth loss and samples of the checkpoint are."""
    trainer = Trainer(config, run, device="cpu")
    for _ in range(3):
        trainer.train_step()
    trainer.save()
    loss = float(trainer.train_step()[0])
    model = EAR.from_pretrained(run)
    samples = model.sample(
        torch.arange(3), steps=4, guidance=1.5, temperature=0.7, generator=torch.Generator().manual_seed(1)
    )
    return {"loss": loss, "samples": samples.flatten().tolist()}


def main() -> None:
    torch.manual_seed(0)
    values = {"digits": expected(Path("digits"), RunConfig(model=TINY, train=TRAIN, sampling=SAMPLING))}

    random = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        Path("images", name).mkdir(parents=True)
        for number in range(4):
            pixels = random.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((16, 16)).save(f"images/{name}/{number}.png")
    save_autoencoder(Path("tokenizer.safetensors"), AutoencoderKL(SHAPE), 0.7)
    small = ["--image-size", "16", "--device", "cpu", "--workers", "0"]
    encoded = ["--tokenizer", "autoencoder", "--weights", "tokenizer.safetensors", "--shard-size", "8"]
    assert cli.main(["cache", "images", "--out", "cache", *small, *encoded]) == 0
    config = RunConfig(
        data="cache",
        data_path="cache",
        tokenizer="tokenizer.safetensors",
        model=replace(TINY, channels=2, num_classes=3),
        train=TRAIN,
        sampling=SAMPLING,
    )
    values["latents"] = expected(Path("latents"), config)
    Path("expected.json").write_text(json.dumps(values))

    assert cli.main(["convert", "digits", "--out", "public.pth"]) == 0
    judge = ["train-judge", "images", "--out", "judge.safetensors", "--epochs", "1", "--channels", "2", "2", "2", "2"]
    assert cli.main([*judge, "--device", "cpu"]) == 0
    sample = ["sample", "digits", "--num", "3", "--classes", "3", "7", "--images-out", "samples", "--device", "cpu"]
    assert cli.main(sample) == 0
    assert cli.main(["glyphs", "--out", "glyphs", "--num-per-class", "1", "--classes", "2", "--size", "16"]) == 0
    assert RUNS["digits"].model == DIGITS


if __name__ == "__main__":
    main()
