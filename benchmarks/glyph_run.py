"""EAR on 64 x 64 glyphs within a time limit: the commands of docs/glyphs.md, one after the other, on one GPU.

    python -m benchmarks.glyph_run OUT --seconds 540 [--judge judge.safetensors] [--set train.lr=2e-3 ...]

Draws the trees, trains a judge (unless one is given) and a tokenizer, encodes the latents, trains the recipe
``glyphs64`` for as many steps as a trial says that fit, samples and scores. OUT gets everything that the commands
write, and ``scores.json``, after every stage, so an interruption loses little; trees and files that are there stay.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.clocks import DEVICE, HAS_GPU
from ear_model import plots
from ear_model.config import RunConfig
from ear_model.data.cache_format import file_sha256
from ear_model.data.cache_writer import CacheWriter
from ear_model.data.config import CacheOptions
from ear_model.data.glyphs import write_tree
from ear_model.data.images import load_tree
from ear_model.evaluation.config import JudgeConfig, ScoringConfig
from ear_model.evaluation.judge import train_judge
from ear_model.evaluation.scoring import Scoring
from ear_model.presets import RUNS
from ear_model.run_dir import read_metrics
from ear_model.sampling.decoder import Decoder
from ear_model.tokenizers.config import SMALL, TokenizerTraining
from ear_model.tokenizers.latent import load_latent_tokenizer
from ear_model.training.autoencoder import train_autoencoder
from ear_model.training.trainer import Trainer

TRIAL_STEPS = 40


class Run:
    """The stages, and what is known so far in OUT/scores.json."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.out, self.begun = options, options.out, time.perf_counter()
        sections = {"model": RUNS["glyphs64"].model, "train": RUNS["glyphs64"].train, "autoencoder": SMALL}
        sections |= {"tokenizer": TokenizerTraining(), "judge": JudgeConfig(epochs=3, batch_size=512)}
        changed: dict[str, dict[str, Any]] = {name: {} for name in sections}
        for assignment in options.set:
            field, _, value = assignment.partition("=")
            section, _, name = field.partition(".")
            changed[section][name] = json.loads(value)
        self.settings = {name: replace(section, **changed[name]) for name, section in sections.items()}
        self.size, self.classes = self.settings["tokenizer"].image_size, self.settings["model"].num_classes
        self.out.mkdir(parents=True, exist_ok=True)
        self.scores: dict[str, Any] = {"environment": harness.environment(), "seconds": {}}

    def note(self, stage: str, **values: Any) -> None:
        """Write what a stage found."""
        spent = sum(self.scores["seconds"].values())
        self.scores["seconds"][stage] = round(time.perf_counter() - self.begun - spent, 1)
        self.scores |= values
        harness.write_json(self.out / "scores.json", self.scores)
        print(f"[{time.perf_counter() - self.begun:6.1f} s] {stage} {values}", flush=True)

    def trees(self) -> None:
        for split, count in (("train", self.options.images), ("test", self.options.real)):
            given = {"num_classes": self.classes, "size": self.size, "split": split}
            write_tree(self.out / split, count, workers=self.options.workers, **given)
        self.note("trees", images_per_class=self.options.images)

    def judge(self) -> Path:
        path = self.options.judge or self.out / "judge.safetensors"
        if not path.is_file():
            trees = (load_tree(self.out / split, self.size) for split in ("train", "test"))
            trained = train_judge(*trees, self.settings["judge"], device=DEVICE)
            trained.save(path)
            self.note("judge", judge_accuracy=trained.accuracy)
        return path

    def tokenizer(self) -> Path:
        path = self.out / "tokenizer.safetensors"
        if not path.is_file():
            shape, training = self.settings["autoencoder"], self.settings["tokenizer"]
            given = {"device": DEVICE, "threads": self.options.workers, "quiet": True}
            report = train_autoencoder(self.out / "train", path, shape, training, **given)
            self.note("tokenizer", psnr=report.psnr, latent_scale=report.latent_scale)
        return path

    def cache(self, tokenizer: Path) -> Path:
        description = {"tokenizer": "autoencoder", "weights": tokenizer.name}
        description["weights_sha256"] = file_sha256(tokenizer)
        encoder = load_latent_tokenizer(tokenizer, DEVICE)
        given = {"image_size": self.size, "flips": False, "workers": self.options.workers, "batch_size": 256}
        options = CacheOptions(**given)
        CacheWriter(self.out / "train", self.out / "cache", encoder, description, options).run(quiet=True)
        self.note("cache")
        return self.out / "cache"

    def steps_that_fit(self, config: RunConfig) -> int:
        """By a trial of this very training: what is left of the time, less setting up and scoring."""
        with tempfile.TemporaryDirectory(dir=self.out) as folder:
            begun = time.perf_counter()
            trial = Trainer(config, Path(folder) / "trial", device=DEVICE.type)
            trial.train_step()[0].item()
            set_up = time.perf_counter() - begun
            begun = time.perf_counter()
            torch.stack([trial.train_step()[0] for _ in range(TRIAL_STEPS)]).tolist()
            seconds = (time.perf_counter() - begun) / TRIAL_STEPS
        left = self.begun + self.options.seconds - time.perf_counter() - set_up - self.options.scoring_seconds
        if left < 100 * seconds:
            raise SystemExit(f"{left:.0f} s are left to train; give more --seconds, or draw the trees before")
        return int(left / seconds)

    def train(self, cache: Path, tokenizer: Path, judge: Path) -> None:
        """Train, sample and score."""
        config = replace(RUNS["glyphs64"], model=self.settings["model"], train=self.settings["train"])
        config = replace(config, data_path=str(cache), tokenizer=str(tokenizer))
        given = {"judge": judge, "num": self.options.num, "batch_size": 256}
        given |= {"real": self.out / "test", "train_images": self.out / "train"}
        scoring = Scoring(config, ScoringConfig(**given), Decoder(config, DEVICE), DEVICE.type)
        steps = self.steps_that_fit(config)
        self.note("trial", steps=steps, config=asdict(config))
        config = replace(config, train=replace(config.train, steps=steps, checkpoint_every=steps))
        trainer = Trainer(config, self.out / "run", device=DEVICE.type)
        trainer.run(quiet=True)
        metrics = read_metrics(self.out / "run")
        curve = {name: [line[name] for line in metrics[:: max(1, len(metrics) // 300)]] for name in ("step", "loss")}
        plots.save_loss_curve(curve["step"], curve["loss"], self.out / "loss.png")
        self.note("training", images_per_second=metrics[-1]["images_per_second"], curve=curve)
        print(scoring.score(trainer.averaged_model(), self.out))
        self.note("scoring", evaluation=json.loads((self.out / "evaluation.json").read_text()))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    parser.add_argument("--scoring-seconds", type=float, default=60, help="of them kept for sampling and scores")
    parser.add_argument("--images", type=int, default=1000, help="training images a class")
    parser.add_argument("--real", type=int, default=100, help="held-out images a class")
    parser.add_argument("--num", type=int, default=960, help="samples scored per setting")
    parser.add_argument("--judge", type=Path, help="judge.safetensors of `ear train-judge`")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=JSON",
        help="a field of model, train, autoencoder, tokenizer or judge",
    )  # fmt: skip
    run = Run(parser.parse_args(arguments))
    if not HAS_GPU:
        torch.set_num_threads(1)
    run.trees()
    judge, tokenizer = run.judge(), run.tokenizer()
    run.train(run.cache(tokenizer), tokenizer, judge)


if __name__ == "__main__":
    main()
