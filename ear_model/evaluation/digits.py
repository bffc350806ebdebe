"""How good a digits model is: class consistency, energy distance, memorisation."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ear_kernels import energy_distance
from ear_model.config import SamplingConfig
from ear_model.data.batches import Dataset
from ear_model.data.digits import load_digits, to_pixels
from ear_model.ear import EAR
from ear_model.files import write_json
from ear_model.sampling.images import sample_images

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """Scores of one sampling setting."""

    guidance: float
    temperature: float
    steps: int
    num_samples: int
    class_consistency: float
    """Share of samples that the SVC gives the class they were asked for."""
    classifier_test_accuracy: float
    """Accuracy of that SVC, fitted on the training digits, on the held-out ones."""
    energy_distance: float
    """To the held-out digits, on 64-dim images of pixels 0..16."""
    energy_distance_floor: float
    """The same between the training digits and the held-out ones."""
    nearest_train_samples: float
    """Median distance of a sample to its nearest training digit."""
    nearest_train_held_out: float
    """Median distance of a held-out digit to its nearest training digit; samples far below it are copies."""
    share_below_closest_held_out: float
    """Share of samples nearer to a training digit than the nearest 1 % of held-out digits are."""


def evaluate_samples(
    samples: Tensor, labels: Tensor, train: Dataset, held_out: Dataset, setting: SamplingConfig
) -> Evaluation:
    """Scores of digit samples ``[N, 1, 8, 8]`` in -1..1 that were asked for ``labels`` and drawn with ``setting``."""
    from sklearn.svm import SVC

    train_pixels, test_pixels, pixels = map(to_pixels, (train.images, held_out.images, samples))
    classifier = SVC(gamma=0.001, C=10.0).fit(train_pixels.numpy(), train.labels.numpy())
    predicted = classifier.predict(pixels.numpy())
    nearest = torch.cdist(pixels, train_pixels).amin(dim=1)
    nearest_held_out = torch.cdist(test_pixels, train_pixels).amin(dim=1)
    return Evaluation(
        guidance=setting.guidance,
        temperature=setting.temperature,
        steps=setting.steps,
        num_samples=len(samples),
        class_consistency=float(np.mean(predicted == labels.numpy())),
        classifier_test_accuracy=float(classifier.score(test_pixels.numpy(), held_out.labels.numpy())),
        energy_distance=energy_distance(pixels, test_pixels).item(),
        energy_distance_floor=energy_distance(train_pixels, test_pixels).item(),
        nearest_train_samples=float(nearest.median()),
        nearest_train_held_out=float(nearest_held_out.median()),
        share_below_closest_held_out=float((nearest < nearest_held_out.quantile(0.01)).double().mean()),
    )


def evaluate_digits(
    model: EAR, settings: Sequence[SamplingConfig], *, num: int = 1000, seed: int = 0
) -> list[Evaluation]:
    """Scores at every setting, on ``num`` samples, the same number a class."""
    train, held_out = load_digits()
    labels = torch.arange(num) % model.config.num_classes
    return [
        evaluate_samples(sample_images(model, labels, seed=seed, **asdict(setting)), labels, train, held_out, setting)
        for setting in settings
    ]


def save_evaluation(run_dir: Path, results: Sequence[Any], out: Path | None = None, **more: Any) -> Path:
    """Write RUN/evaluation.json, or ``out``: the first setting's scores at the top level, the others under
    "other_settings".

    Args:
        run_dir: the run.
        results: a dataclass of scores for each setting; may be empty.
        out: the file, if not the run's own.
        **more: further entries.
    """
    content: dict[str, Any] = {}
    if results:
        content = {**asdict(results[0]), "other_settings": [asdict(result) for result in results[1:]]}
    path = out or run_dir / EVALUATION_FILE
    write_json(path, {**content, **more})
    return path


def report(results: list[Evaluation]) -> str:
    """The scores as a few lines of text."""
    first = results[0]
    lines = ["guidance  temperature  class consistency  energy distance  median nearest training digit"]
    for result in results:
        lines.append(
            f"{result.guidance:8.1f}  {result.temperature:11.1f}  {result.class_consistency:17.3f}"
            f"  {result.energy_distance:15.3f}  {result.nearest_train_samples:29.1f}"
        )
    lines.append(
        f"real held-out digits: SVC accuracy {first.classifier_test_accuracy:.3f}, energy distance of the "
        f"training digits {first.energy_distance_floor:.3f}, median nearest {first.nearest_train_held_out:.1f}"
    )
    return "\n".join(lines)
