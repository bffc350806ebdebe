"""How a run is scored: on digits, by a judge, or by Inception."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ear_model.config import RunConfig, check_sampling_options
from ear_model.data.cache_format import class_names
from ear_model.data.images import LabelledImages, load_tree
from ear_model.data.sources import load_training_data
from ear_model.devices import resolve_device
from ear_model.ear import EAR
from ear_model.evaluation import digits
from ear_model.evaluation.fidelity import (
    SPLITS,
    evaluate_fidelity,
    inception_extractor,
    load_statistics,
    report_fidelity,
)
from ear_model.evaluation.judge import Judge
from ear_model.evaluation.judged import JudgedComparison, check_comparable, report_judged
from ear_model.sampling.decoder import Decoder
from ear_model.sampling.images import class_labels, sample_batches, to_bytes

MAX_TRAIN_IMAGES = 20_000  # training images that are searched for copies


class Scoring:
    """How a run is scored; everything that can be wrong is looked at before anything is sampled.

    Args:
        config: the run.
        decoder: what will turn samples into images; their size is checked.
        judge: judge file; needs ``real``.
        real: image tree of held-out images.
        train_images: image tree of training images; the run's own data, if it is pixels, where None.
        fidelity: statistics file; then FID and IS are computed too.
        num: samples per setting.
        guidance, temperature, steps: the setting scored first; the run's own is the second.
        batch_size: images sampled at a time.
        device: "auto", "cpu", "cuda", ...

    Raises:
        ValueError: nothing to score with, or files that are not there, damaged or do not fit each other.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        decoder: Decoder | None = None,
        judge: Path | None = None,
        real: Path | None = None,
        train_images: Path | None = None,
        fidelity: Path | None = None,
        num: int = 1000,
        guidance: float | None = None,
        temperature: float | None = None,
        steps: int | None = None,
        batch_size: int = 64,
        device: str = "auto",
    ) -> None:
        if num < 1 or batch_size < 1:
            raise ValueError(f"num is {num} and batch_size {batch_size}; both must be at least 1")
        if (judge is None) != (real is None):
            given, missing = ("--judge", "--real TREE") if real is None else ("--real", "--judge FILE")
            raise ValueError(f"{given} was given without {missing}; a judge compares samples with real images")
        if judge is None and fidelity is None and config.data != "digits":
            raise ValueError(
                f"a run on data {config.data!r} is scored with --judge FILE --real TREE (`ear train-judge` makes "
                f"the file) or with --fidelity STATISTICS"
            )
        self.config, self.num, self.batch_size = config, num, batch_size
        self.steps = config.sampling.steps if steps is None else steps
        self.guidance, self.temperature = guidance, temperature
        first_guidance, first_temperature = self._first_setting(1.0, 1.0)
        check_sampling_options(self.steps, first_guidance, config.sampling.guidance_schedule, first_temperature)
        self.device = resolve_device(device)
        self.train_tree = train_images
        self.judge: Judge | None = None
        self.real: LabelledImages | None = None
        self.fidelity_file = fidelity
        if judge is not None and real is not None:
            self.judge = Judge.load(judge, self.device)
            if decoder is not None and decoder.image_size != self.judge.image_size:
                raise ValueError(
                    f"the model makes images of {decoder.image_size} pixels; {judge} reads {self.judge.image_size}"
                )
            if len(self.judge.class_names) > config.model.num_classes:
                raise ValueError(
                    f"{judge} knows {len(self.judge.class_names)} classes; the model {config.model.num_classes}"
                )
            names = class_names(config)
            if names is not None and names != self.judge.class_names:
                raise ValueError(
                    f"{judge} knows other classes, {list(self.judge.class_names[:3])}..., than {config.data_path}, "
                    f"{list(names[:3])}..."
                )
            self.real = load_tree(real, self.judge.image_size)
            check_comparable(self.judge, self.real, num)
        if fidelity is not None:
            if num < SPLITS:
                raise ValueError(f"num is {num}; an Inception Score over {SPLITS} splits needs at least that many")
            self.statistics = load_statistics(fidelity)
            self.extractor = inception_extractor(self.device)

    def _first_setting(self, guidance: float, temperature: float) -> tuple[float, float]:
        """What was asked for, or the given defaults."""
        return (
            guidance if self.guidance is None else self.guidance,
            temperature if self.temperature is None else self.temperature,
        )

    def score(self, model: EAR, decoder: Decoder, run_dir: Path, *, seed: int = 0) -> str:
        """Sample, score, write RUN/evaluation.json; returns the scores as text."""
        own = self.config.sampling
        settings = [self._first_setting(1.0, 1.0), (own.guidance, own.temperature)]
        results: list[Any] = []
        texts = []
        if self.judge is not None:
            judged = self._judge(model, decoder, settings, seed)
            results.extend(judged[0])
            texts.append(judged[1])
        elif self.fidelity_file is None:
            scores = digits.evaluate_digits(model, settings, num=self.num, steps=self.steps, seed=seed)
            results.extend(scores)
            texts.append(digits.report(scores))
        more = {}
        if self.fidelity_file is not None:
            more["fidelity"], text = self._inception(model, decoder, seed)
            texts.append(text)
        digits.save_evaluation(run_dir, results, **more)
        return "\n".join(texts)

    def _options(self, guidance: float, temperature: float) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "guidance": guidance,
            "temperature": temperature,
            "guidance_schedule": self.config.sampling.guidance_schedule,
        }

    def _judge(
        self, model: EAR, decoder: Decoder, settings: list[tuple[float, float]], seed: int
    ) -> tuple[list[Any], str]:

        assert self.judge is not None
        assert self.real is not None
        train, note = self._train_images(seed)
        comparison = JudgedComparison(self.judge, self.real, self.num, train=train, seed=seed, device=self.device)
        classes = range(len(self.judge.class_names))
        labels = class_labels(classes, self.num, self.config.model.num_classes)
        results = []
        for guidance, temperature in settings:
            batches = sample_batches(
                model,
                labels,
                decoder,
                seed=seed,
                batch_size=self.batch_size,
                progress=True,
                **self._options(guidance, temperature),
            )
            samples = torch.cat([images for _, images in batches])
            results.append(
                comparison.score(samples, labels, guidance=guidance, temperature=temperature, steps=self.steps)
            )
        return results, report_judged(results) + note

    def _train_images(self, seed: int) -> tuple[LabelledImages | None, str]:
        """Training images to search for copies, and a line that says why there are none."""
        assert self.judge is not None
        size, names = self.judge.image_size, self.judge.class_names
        if self.train_tree is not None:
            return load_tree(self.train_tree, size, -(-MAX_TRAIN_IMAGES // len(names)), seed), ""
        if self.config.tokenizer:
            return None, "\nno search for copies: the run's data are latents; give --train-images TREE"
        try:
            data = load_training_data(self.config)
        except ValueError as error:
            return None, f"\nno search for copies: {error}"
        chosen = np.random.default_rng(seed).permutation(len(data))[:MAX_TRAIN_IMAGES]
        images, labels = data.gather(torch.from_numpy(np.sort(chosen)), torch.Generator().manual_seed(seed))
        return LabelledImages(to_bytes(images).contiguous(), labels, names), ""

    def _inception(self, model: EAR, decoder: Decoder, seed: int) -> tuple[dict[str, Any], str]:
        own, classes = self.config.sampling, self.config.model.num_classes
        guidance, temperature = self._first_setting(own.guidance, own.temperature)
        batches = sample_batches(
            model,
            class_labels(range(classes), self.num, classes),
            decoder,
            seed=seed,
            batch_size=self.batch_size,
            progress=True,
            **self._options(guidance, temperature),
        )
        result = evaluate_fidelity(
            (images for _, images in batches),
            self.extractor,
            self.statistics,
            guidance=guidance,
            temperature=temperature,
            steps=self.steps,
            where=str(self.fidelity_file),
        )
        return dataclasses.asdict(result), report_fidelity([result])
