"""How a run is scored: on digits, by a judge, or by Inception."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ear_model.config import RunConfig, SamplingConfig
from ear_model.data.cache_format import class_names
from ear_model.data.images import LabelledImages, load_tree
from ear_model.data.sources import load_training_data
from ear_model.devices import resolve_device
from ear_model.ear import EAR
from ear_model.evaluation import digits, fidelity, judged
from ear_model.evaluation.config import ScoringConfig
from ear_model.evaluation.judge import Judge
from ear_model.evaluation.precision_recall import NEIGHBOURS
from ear_model.plots import to_bytes
from ear_model.sampling.decoder import Decoder
from ear_model.sampling.images import Sampler, class_labels

MAX_TRAIN_IMAGES = 20_000  # training images that are searched for copies


class Scoring:
    """How a run is scored; everything that can be wrong is found before anything is sampled.

    Args:
        config: the run.
        options: what to score with.
        decoder: what turns samples into images; their size is checked.
        device: "auto", "cpu", "cuda", ...

    Raises:
        ValueError: nothing to score with, or files that are not there, damaged or do not fit each other.
    """

    def __init__(self, config: RunConfig, options: ScoringConfig, decoder: Decoder, device: str = "auto") -> None:
        if options.judge is None and options.fidelity is None and config.data != "digits":
            raise ValueError(
                f"a run on data {config.data!r} is scored with --judge FILE --real TREE (`ear train-judge` makes "
                f"the file) or with --fidelity STATISTICS"
            )
        self.config, self.options, self.decoder = config, options, decoder
        given = {name: getattr(options, name) for name in ("guidance", "temperature", "steps")}
        given = {name: value for name, value in given.items() if value is not None}
        self.own = dataclasses.replace(config.sampling, steps=given.get("steps", config.sampling.steps))
        """The run's own setting."""
        self.first = dataclasses.replace(self.own, **{"guidance": 1.0, "temperature": 1.0, **given})
        self.for_inception = dataclasses.replace(self.own, **given)
        self.device = resolve_device(device)
        self.judge: Judge | None = None
        if options.judge is not None and options.real is not None:
            self.judge = Judge.load(options.judge, self.device)
            self._check_judge(self.judge)
            self.real = load_tree(options.real, self.judge.image_size)
            judged.check_comparable(self.judge, self.real, options.num)
        if options.fidelity is not None:
            if options.num < fidelity.SPLITS:
                raise ValueError(
                    f"num is {options.num}; an Inception Score over {fidelity.SPLITS} splits needs at least that many"
                )
            self.statistics = fidelity.load_statistics(options.fidelity)
            self.real_images: Tensor = torch.empty(0, dtype=torch.uint8)
            if options.real is not None:
                self.real_images = self._real_images(options.real)
            self.extractor = fidelity.inception_extractor(self.device)

    def _real_images(self, tree: Path) -> Tensor:
        """As many real images as there are samples, at most, uint8 ``[N, 3, S, S]``."""
        images = load_tree(tree, self.decoder.image_size).images
        if min(len(images), self.options.num) <= NEIGHBOURS:
            raise ValueError(f"{tree} has {len(images)} images; precision and recall need at least {NEIGHBOURS + 1}")
        chosen = np.random.default_rng(0).permutation(len(images))[: self.options.num]
        return images[torch.from_numpy(np.sort(chosen))]

    def _check_judge(self, judge: Judge) -> None:
        path, classes = self.options.judge, self.config.model.num_classes
        if self.decoder.image_size != judge.image_size:
            raise ValueError(
                f"the model makes images of {self.decoder.image_size} pixels; {path} reads {judge.image_size}"
            )
        if len(judge.class_names) > classes:
            raise ValueError(f"{path} knows {len(judge.class_names)} classes; the model {classes}")
        names = class_names(self.config)
        if names is not None and names != judge.class_names:
            raise ValueError(
                f"{path} knows other classes, {list(judge.class_names[:3])}..., than {self.config.data_path}, "
                f"{list(names[:3])}..."
            )

    def score(self, model: EAR, run_dir: Path, *, seed: int = 0, out: Path | None = None) -> str:
        """Sample, score, write RUN/evaluation.json (or ``out``); returns the scores as text."""
        results: list[Any] = []
        texts, more = [], {}
        if self.judge is not None:
            train, note = self._train_images(self.judge, seed)
            comparison = judged.JudgedComparison(
                self.judge, self.real, self.options.num, train=train, seed=seed, device=self.device
            )
            for setting in (self.first, self.own):
                labels, batches = self._sample(model, setting, len(self.judge.class_names), seed)
                results.append(comparison.score(torch.cat(list(batches)), labels, setting))
            texts.append(judged.report_judged(results) + note)
        elif self.options.fidelity is None:
            results += digits.evaluate_digits(model, [self.first, self.own], num=self.options.num, seed=seed)
            texts.append(digits.report(results))
        if self.options.fidelity is not None:
            _, batches = self._sample(model, self.for_inception, self.config.model.num_classes, seed)
            where, real = str(self.options.fidelity), self.real_images.split(self.options.batch_size)
            result = fidelity.evaluate_fidelity(
                batches, self.extractor, self.statistics, self.for_inception, where=where,
                real=[images for images in real if len(images)],
            )  # fmt: skip
            more["fidelity"] = dataclasses.asdict(result)
            texts.append(fidelity.report_fidelity([result]))
        if said := model.score.sampling_report():
            texts.append(said)
        digits.save_evaluation(run_dir, results, out, **more)
        return "\n".join(texts)

    def _sample(
        self, model: EAR, setting: SamplingConfig, classes: int, seed: int
    ) -> tuple[Tensor, Iterator[Tensor]]:
        """Labels of the first ``classes`` classes, and 8-bit images of them, batch after batch."""
        labels = class_labels(range(classes), self.options.num, self.config.model.num_classes)
        sampler = Sampler(model, self.decoder.on_device, setting, seed, self.options.batch_size)
        batches = sampler.batches(labels)
        return labels, (images for _, images in batches)

    def _train_images(self, judge: Judge, seed: int) -> tuple[LabelledImages | None, str]:
        """Training images to search for copies, and a line that says why there are none."""
        names = judge.class_names
        if self.options.train_images is not None:
            most = -(-MAX_TRAIN_IMAGES // len(names))
            return load_tree(self.options.train_images, judge.image_size, most, seed), ""
        if self.config.tokenizer:
            return None, "\nno search for copies: the run's data are latents; give --train-images TREE"
        try:
            data = load_training_data(self.config)
        except ValueError as error:
            return None, f"\nno search for copies: {error}"
        chosen = np.random.default_rng(seed).permutation(len(data))[:MAX_TRAIN_IMAGES]
        images, labels = data.gather(torch.from_numpy(np.sort(chosen)), torch.Generator().manual_seed(seed))
        return LabelledImages(to_bytes(images).contiguous(), labels, names), ""
