"""What sampling options cost in quality: precisions, fewer steps, orders and guidance intervals, side by side.

    python -m benchmarks.sampling_quality --data digits|glyphs [--run RUN] [--num 5000] [--seeds 3] --out FILE.json

Without RUN it trains the recipe first: ``ear train digits``, 25 s on an H200, or ``benchmarks.glyph_run``, whose OUT
is RUN for the glyphs. Every setting is the run's own but for what is named, and all draw from the same seeds. Scores
are those of ``ear evaluate``: for digits the SVC's accuracy, and energy and Frechet distance of pixels 0..16 to the
held-out digits; for glyphs the judge's accuracy, and both distances on its features. At the end what saves most
without harm is combined. ``python -m benchmarks.report FILE.json`` prints the table again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import glyph_run, harness, report
from benchmarks.clocks import DEVICE, HAS_GPU
from benchmarks.harness import Row, Unavailable
from ear_model.config import RunConfig, SamplingConfig
from ear_model.data.batches import Dataset
from ear_model.data.digits import load_digits, to_pixels
from ear_model.data.images import LabelledImages
from ear_model.ear import EAR
from ear_model.errors import RunError
from ear_model.evaluation.config import ScoringConfig
from ear_model.evaluation.digits import evaluate_samples
from ear_model.evaluation.judge import Judge
from ear_model.evaluation.judged import JudgedComparison, feature_statistics, frechet_distance
from ear_model.evaluation.scoring import Scoring
from ear_model.files import require_writable
from ear_model.model.masking import unmasking_schedule
from ear_model.plots import to_bytes
from ear_model.presets import RUNS
from ear_model.run_dir import load_config
from ear_model.sampling.decoder import Decoder
from ear_model.sampling.images import class_labels, even_size, sample_images
from ear_model.training.trainer import Trainer

OWN = "the run's own"
PRECISIONS = ("bf16", "fp8") if HAS_GPU else ("fp32",)
# The steps are divided by these.
PARTS, FROM, TO = (2, 4, 8), (0.1, 0.25), (0.9,)
BATCH = 256
# A setting does no harm if no score is worse by more than this share of the run's own, or than twice its spread.
TOLERATED = {"accuracy": 0.01, "energy_distance": 0.05, "frechet_distance": 0.05}

Scores = dict[str, float]


class DigitsScores:
    """Of images ``[N, 1, 8, 8]`` in -1..1; the SVC is that of ``ear evaluate``, and there is no judge of 8 pixels."""

    def __init__(self) -> None:
        self._train, self._held_out = load_digits()
        self._statistics = feature_statistics(to_pixels(self._held_out.images))
        self.real = self(self._train.images, self._train.labels)
        """Of real images: the SVC on the held-out digits, and the training digits' distances to them."""
        self.real["accuracy"] = self._evaluate(self._held_out).classifier_test_accuracy

    def _evaluate(self, samples: Dataset) -> Any:
        return evaluate_samples(samples.images, samples.labels, self._train, self._held_out, SamplingConfig())

    def __call__(self, images: Tensor, labels: Tensor) -> Scores:
        found = self._evaluate(Dataset(images, labels))
        frechet = frechet_distance(*feature_statistics(to_pixels(images)), *self._statistics)
        values = (found.class_consistency, found.energy_distance, frechet)
        return dict(zip(TOLERATED, values, strict=True))


class JudgedScores:
    """Of images ``[N, 3, S, S]`` in -1..1."""

    def __init__(self, judge: Judge, real: LabelledImages, num: int) -> None:
        self._comparison = JudgedComparison(judge, real, num, device=DEVICE)
        values = (self._comparison.accuracy_real, self._comparison.floors[0], self._comparison.floors[2])
        self.real = dict(zip(TOLERATED, values, strict=True))
        """Of two disjoint sets of real images."""

    def __call__(self, images: Tensor, labels: Tensor) -> Scores:
        found = self._comparison.score(to_bytes(images).cpu(), labels, SamplingConfig())
        values = (found.accuracy, found.energy_distance_features, found.frechet_distance)
        return dict(zip(TOLERATED, values, strict=True))


@dataclass(frozen=True)
class Study:
    """A trained model, and how what it samples is scored."""

    config: RunConfig
    model: EAR
    decoder: Decoder
    scores: DigitsScores | JudgedScores
    classes: int
    num: int
    """Samples a seed."""
    seeds: int

    @classmethod
    def of(cls, run: Path, given: argparse.Namespace) -> Study:
        """Load a run. Raises ValueError if it is none, or can't be scored."""
        is_glyphs = given.data == "glyphs"
        if is_glyphs and not (run / "run").is_dir():
            raise ValueError(f"{run} has no run/; give OUT of `python -m benchmarks.glyph_run OUT`")
        folder = run / "run" if is_glyphs else run
        config = load_config(folder)
        if (config.data == "digits") == is_glyphs:
            raise ValueError(f"{folder} is a run on data {config.data!r}; --data is {given.data}")
        files: dict[str, Any] = {}
        if is_glyphs:
            config = replace(config, tokenizer=str(run / "tokenizer.safetensors"))
            files = {"judge": given.judge or run / "judge.safetensors", "real": run / "test"}
        decoder = Decoder(config, DEVICE)
        scoring = Scoring(config, ScoringConfig(num=given.num, **files), decoder, DEVICE.type)
        model = EAR.from_pretrained(folder, device=DEVICE)
        classes = config.model.num_classes if scoring.judge is None else len(scoring.judge.class_names)
        if given.num < classes:
            raise ValueError(f"num is {given.num}; each of {classes} classes needs a sample")
        scores = DigitsScores() if scoring.judge is None else JudgedScores(scoring.judge, scoring.real, given.num)
        return cls(config, model, decoder, scores, classes, given.num, given.seeds)

    def measure(self, changes: dict[str, Any], precision: str) -> dict[str, Any]:
        """Scores of every seed, the backbone's work, and on a GPU the time of sampling, without decoding."""
        if precision == "fp8" and torch.cuda.get_device_capability() < (9, 0):
            raise Unavailable("needs a GPU of compute capability 9")
        own = self.config.sampling
        setting = replace(own, **changes)
        tokens = self.config.model.num_tokens
        count, before = evaluations(setting, tokens), evaluations(own, tokens)
        record: dict[str, Any] = {"changes": changes, "evaluations": count, "evaluations_saved": 1 - count / before}
        labels = class_labels(range(self.classes), self.num, self.config.model.num_classes)

        def sample(own_labels: Tensor, seed: int) -> Tensor:
            options = {"precision": precision, **asdict(setting)}
            return sample_images(self.model, own_labels, seed=seed, batch_size=BATCH, **options)

        if HAS_GPU:  # graphs are captured outside the time
            sample(labels[: even_size(self.num, BATCH)], 0)
        found, times = [], []
        for seed in range(self.seeds):
            begun = time.perf_counter()
            output = sample(labels, seed)
            times.append(1e3 * (time.perf_counter() - begun) / self.num)
            found.append(self.scores(self.decoder(output), labels))
        if HAS_GPU:
            record["image_ms"] = {"median": statistics.median(times), "seeds": times}
        return record | {"scores": {name: summary([scores[name] for scores in found]) for name in TOLERATED}}


def evaluations(setting: SamplingConfig, num_tokens: int) -> int:
    """Sequences that the backbone reads for an image: one a step, two with guidance."""
    steps = [step for step in unmasking_schedule(num_tokens, setting.steps) if step[0] > step[1]]
    return sum(1 + setting.guides(left, num_tokens) for left, _ in steps)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds. Raises ValueError for a score that is not finite."""
    if not all(map(math.isfinite, values)):
        raise ValueError(f"scores are {values}; they must be finite")
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "spread": spread, "seeds": list(values)}


def approximations(own: SamplingConfig) -> dict[str, dict[str, Any]]:
    """What each setting changes, by name."""
    found: dict[str, dict[str, Any]] = {"halton order": {"order": "halton"}}
    for steps in dict.fromkeys(max(1, own.steps // part) for part in PARTS):
        for order in ("random", "halton"):
            found[f"{steps} steps, {order} order"] = {"steps": steps, "order": order}
    found |= {f"guidance from {share:g}": {"guidance_from": share} for share in FROM}
    return found | {f"guidance to {share:g}": {"guidance_to": share} for share in TO}


def is_harmless(record: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether no score is worse than the run's own by more than is tolerated."""
    for name, share in TOLERATED.items():
        here, there = record["scores"][name], own["scores"][name]
        worse = (there["mean"] - here["mean"]) * (1 if name == "accuracy" else -1)
        if worse > max(share * abs(there["mean"]), 2 * math.hypot(here["spread"], there["spread"])):
            return False
    return True


def combination(records: Sequence[dict[str, Any]], precision: str) -> dict[str, Any]:
    """Of each kind of saving the largest that does no harm, and the smallest energy distance of equal ones.

    Empty if there are fewer than two kinds to combine.
    """
    scored = [record for record in records if "scores" in record and record["rival"] == precision]
    own = next((record for record in scored if record["case"] == OWN), None)
    changes: dict[str, Any] = {}
    kinds = 0
    for kind in ("steps", "guidance_from", "guidance_to"):
        fitting = [record for record in scored if kind in record["changes"] and own and is_harmless(record, own)]
        if fitting:
            best = min(fitting, key=lambda each: (each["evaluations"], each["scores"]["energy_distance"]["mean"]))
            changes |= best["changes"]
            kinds += 1
    return changes if kinds > 1 else {}


def train(data: str, folder: Path, given: argparse.Namespace) -> Path:
    """Train the recipe; returns what ``--run`` takes."""
    if data == "digits":
        Trainer(RUNS["digits"], folder / "run", device=DEVICE.type).run(quiet=True)
        return folder / "run"
    # Twice as many real images as samples, as the floors need two sets of them.
    real = 2 * math.ceil(given.num / RUNS["glyphs64"].model.num_classes)
    judge = ["--judge", str(given.judge)] if given.judge else []
    glyph_run.main([str(folder / "run"), "--real", str(real), *judge])
    return folder / "run"


def records_of(study: Study) -> Iterator[dict[str, Any]]:
    """Every setting's record, the combination last."""

    def measured(name: str, changes: dict[str, Any], precision: str) -> dict[str, Any]:
        return harness.measure(Row(name, precision, measure=lambda: study.measure(changes, precision)))

    done = []
    for precision in PRECISIONS:
        done.append(measured(OWN, {}, precision))
        yield done[-1]
    precision = PRECISIONS[0]
    for name, changes in approximations(study.config.sampling).items():
        done.append(measured(name, changes, precision))
        yield done[-1]
    changes = combination(done, precision)
    if changes:
        yield measured(
            f"together: {', '.join(f'{name} {value}' for name, value in changes.items())}", changes, precision
        )


def run(given: argparse.Namespace, folder: Path) -> int:
    """The command; returns the exit status. Raises ValueError or RunError for what can't be done."""
    for name in ("num", "seeds"):
        if getattr(given, name) < 1:
            raise ValueError(f"{name} is {getattr(given, name)}; it must be at least 1")
    require_writable(given.out)
    where = given.run or train(given.data, folder, given)
    study = Study.of(where, given)
    noted = (where / "run" if given.data == "glyphs" else where) / "environment.json"
    trained_on = json.loads(noted.read_text())["device"] if noted.is_file() else "unknown"
    about = {"data": given.data, "trained_on": trained_on, "num": given.num, "seeds": given.seeds}
    result: dict[str, Any] = {"environment": harness.environment(), **about, "config": asdict(study.config)}
    result |= {"real": study.scores.real, "rows": (records := list[dict[str, Any]]())}
    for record in records_of(study):
        records.append(record)
        harness.write_json(given.out, result)
        print(report.quality([record])[-1], flush=True)
    print(report.markdown(result, records))
    return int(any("failed" in record for record in records))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "glyphs"), required=True)
    parser.add_argument("--run", type=Path, help="of `ear train digits`, or OUT of benchmarks.glyph_run")
    parser.add_argument("--judge", type=Path, help="for glyphs, if RUN has no judge.safetensors")
    parser.add_argument("--num", type=int, default=5000, help="samples a seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="result file, written after every setting")
    given = parser.parse_args(arguments)
    if not HAS_GPU:
        torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return run(given, Path(folder))
    except (ValueError, RunError) as error:
        raise SystemExit(f"sampling_quality: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
