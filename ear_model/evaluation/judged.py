"""Scores of samples by a judge: do they show what was asked for, and are they distributed as real images are?

Every distance stands beside its floor, the same distance between two sets of real images of the same size.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ear_kernels import energy_distance
from ear_model.config import SamplingConfig
from ear_model.data.images import LabelledImages, split_classes
from ear_model.evaluation.judge import Judge
from ear_model.evaluation.precision_recall import NEIGHBOURS, precision_recall

PIXELS = 32  # a side of the images whose pixels are compared; more would take minutes on a CPU


@dataclass(frozen=True)
class JudgeEvaluation:
    """Scores of one sampling setting. "Real" is always the held-out tree, never what was trained on."""

    guidance: float
    temperature: float
    steps: int
    num_samples: int
    accuracy: float
    """Share of samples that the judge gives the class they were asked for."""
    accuracy_real: float
    """The judge's accuracy on the real images."""
    num_compared: int
    """Images in each of the sets that the distances compare, the same number of every class."""
    energy_distance_features: float
    """Energy distance to real images, on the judge's features."""
    energy_distance_features_floor: float
    """The same between two sets of real images."""
    energy_distance_pixels: float
    """Energy distance to real images, on pixels in -1..1 of images averaged down to 32 x 32 at most."""
    energy_distance_pixels_floor: float
    """The same between two sets of real images."""
    frechet_distance: float
    """Frechet distance to real images, on the judge's features."""
    frechet_distance_floor: float
    """The same between two sets of real images."""
    precision: float | None
    """Share of samples that look real, on the judge's features (:func:`precision_recall`); None of too few images."""
    precision_real: float | None
    """The same of a second set of real images."""
    recall: float | None
    """Share of real images that samples look like."""
    recall_real: float | None
    """The same of a second set of real images."""
    nearest_train_samples: float | None
    """Median distance of a sample to its nearest training image, on features; None without training images."""
    nearest_train_real: float | None
    """The same of a real held-out image; samples far below it are copies."""
    share_below_closest_real: float | None
    """Share of samples nearer to a training image than the nearest 1 % of real ones are."""
    num_train: int
    """Training images that were searched."""
    accuracy_per_class: dict[str, float]
    """Share recognised, by class name."""


def frechet_distance(
    mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
    """Squared Frechet distance of two Gaussians, ``|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2))`` (Dowson and Landau
    1982; the FID on Inception features).

    The root's trace is that of ``(A^(1/2) B A^(1/2))^(1/2)``, symmetric, so singular covariances do no harm.

    Args:
        mean_a, mean_b: ``[F]``.
        covariance_a, covariance_b: ``[F, F]``, symmetric, positive semi-definite.

    Raises:
        ValueError: shapes that do not fit.
    """
    features = mean_a.shape[0] if mean_a.ndim == 1 else -1
    shapes = [array.shape for array in (mean_a, covariance_a, mean_b, covariance_b)]
    if shapes != [(features,), (features, features)] * 2:
        raise ValueError(f"means and covariances have shapes {shapes}; they must be [F], [F, F], [F], [F, F]")
    values, vectors = np.linalg.eigh(covariance_a.astype(np.float64))
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ covariance_b.astype(np.float64) @ root)
    difference = mean_a.astype(np.float64) - mean_b
    trace = np.trace(covariance_a) + np.trace(covariance_b) - 2 * np.sqrt(product.clip(min=0)).sum()
    return float(difference @ difference + trace)


def feature_statistics(features: Tensor | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean ``[F]`` and unbiased covariance ``[F, F]`` of features ``[N, F]``, N >= 2, in float64."""
    array = np.asarray(features, dtype=np.float64)
    return array.mean(axis=0), np.atleast_2d(np.cov(array, rowvar=False))


def nearest_distances(points: Tensor, others: Tensor, chunk: int = 1024) -> Tensor:
    """Distance of each of ``points [N, F]`` to the nearest of ``others [M, F]``: ``[N]``."""
    return torch.cat([torch.cdist(part, others).amin(dim=1) for part in points.split(chunk)])


def check_comparable(judge: Judge, real: LabelledImages, num: int) -> None:
    """Raise ValueError unless ``num`` samples can be scored by this judge against this tree."""
    classes = len(judge.class_names)
    if real.class_names != judge.class_names:
        raise ValueError(
            f"the real tree has {len(real.class_names)} classes {list(real.class_names[:3])}...; the judge was "
            f"trained on {classes}, {list(judge.class_names[:3])}..."
        )
    counts = torch.bincount(real.labels, minlength=classes)
    if int(counts.min()) < 2:
        name = real.class_names[int(counts.argmin())]
        raise ValueError(f"class {name} has {int(counts.min())} real images; every class needs at least two")
    if num < classes:
        raise ValueError(f"num is {num}; a judge of {classes} classes needs at least one sample of each")


class JudgedComparison:
    """What samples are compared with, computed once for all settings.

    Args:
        judge: the classifier.
        real: held-out real images.
        num: samples that will be scored; the real sets are no larger.
        train: images the generator was trained on, to look for copies; None to leave that out.
        seed: of the choice of real images.
        device: where distances are computed.

    Raises:
        ValueError: other classes than the judge's, or fewer than two real images of some class.
    """

    def __init__(
        self,
        judge: Judge,
        real: LabelledImages,
        num: int,
        *,
        train: LabelledImages | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_comparable(judge, real, num)
        classes = len(judge.class_names)
        counts = torch.bincount(real.labels, minlength=classes)
        # Two disjoint sets of real images, equal a class, as large as the sample set where there are so many.
        self.per_class = min(num // classes, int(counts.min()) // 2)
        first, others = split_classes(real.labels, self.per_class, seed)
        second = others[split_classes(real.labels[others], self.per_class, seed + 1)[0]]
        self.judge, self.seed, self.device = judge, seed, torch.device(device)
        features, predicted = judge.classify(real.images)
        self.accuracy_real = float((predicted == real.labels).double().mean())
        self.features, self.pixels = features[first], _flat(real.images[first])
        floor_features, floor_pixels = features[second], _flat(real.images[second])
        self.statistics = feature_statistics(self.features)
        self.floors = self._distances(floor_features, floor_pixels)
        self.precision_recall_real = self._precision_recall(floor_features)
        self.train_features = None if train is None else judge.classify(train.images)[0]
        self.nearest_real = None
        if self.train_features is not None:
            self.nearest_real = self._nearest(self.features, self.train_features)

    def _distances(self, features: Tensor, pixels: Tensor) -> tuple[float, float, float]:
        """Energy distance on features and on pixels, and Frechet distance, to the first set of real images."""
        pairs = ((features, self.features), (pixels, self.pixels))
        energy = [energy_distance(a.to(self.device), b.to(self.device)).item() for a, b in pairs]
        return energy[0], energy[1], frechet_distance(*feature_statistics(features), *self.statistics)

    def _precision_recall(self, features: Tensor) -> tuple[float, float] | tuple[None, None]:
        """Of these features against the first set of real images."""
        if len(features) <= NEIGHBOURS:
            return None, None
        return precision_recall(features.to(self.device), self.features.to(self.device))

    def _nearest(self, features: Tensor, train_features: Tensor) -> Tensor:
        return nearest_distances(features.to(self.device), train_features.to(self.device)).cpu()

    def score(self, samples: Tensor, labels: Tensor, setting: SamplingConfig) -> JudgeEvaluation:
        """Scores of samples, uint8 ``[N, 3, S, S]``, that were asked for ``labels [N]`` and drawn with ``setting``.

        Raises:
            ValueError: samples of another size, or too few of a class.
        """
        features, predicted = self.judge.classify(samples)
        right = (predicted == labels).double()
        names = self.judge.class_names
        counts = torch.bincount(labels, minlength=len(names))
        if int(counts.min()) < self.per_class:
            raise ValueError(
                f"{int(counts.min())} samples of some class; the comparison takes {self.per_class} of each"
            )
        compared = split_classes(labels, self.per_class, self.seed)[0]
        energy_features, energy_pixels, frechet = self._distances(features[compared], _flat(samples[compared]))
        precision, recall = self._precision_recall(features[compared])
        nearest_samples = nearest_real = share = None
        if self.train_features is not None and self.nearest_real is not None:
            nearest = self._nearest(features, self.train_features)
            nearest_samples, nearest_real = float(nearest.median()), float(self.nearest_real.median())
            share = float((nearest < self.nearest_real.quantile(0.01)).double().mean())
        sums = torch.zeros(len(names), dtype=torch.float64).index_add_(0, labels, right)
        return JudgeEvaluation(
            guidance=setting.guidance,
            temperature=setting.temperature,
            steps=setting.steps,
            num_samples=len(samples),
            accuracy=float(right.mean()),
            accuracy_real=self.accuracy_real,
            num_compared=len(compared),
            energy_distance_features=energy_features,
            energy_distance_features_floor=self.floors[0],
            energy_distance_pixels=energy_pixels,
            energy_distance_pixels_floor=self.floors[1],
            frechet_distance=frechet,
            frechet_distance_floor=self.floors[2],
            precision=precision,
            precision_real=self.precision_recall_real[0],
            recall=recall,
            recall_real=self.precision_recall_real[1],
            nearest_train_samples=nearest_samples,
            nearest_train_real=nearest_real,
            share_below_closest_real=share,
            num_train=0 if self.train_features is None else len(self.train_features),
            accuracy_per_class=dict(zip(names, (sums / counts).tolist(), strict=True)),
        )


def _flat(images: Tensor) -> Tensor:
    """uint8 images as vectors of pixels in -1..1, averaged down to ``PIXELS`` a side at most, ``[N, 3 * S * S]``."""
    scaled = images.float() / 127.5 - 1
    if images.shape[-1] > PIXELS:
        scaled = functional.adaptive_avg_pool2d(scaled, PIXELS)
    return scaled.flatten(1)


def report_judged(results: list[JudgeEvaluation]) -> str:
    """The scores as a few lines of text."""
    first = results[0]
    lines = [
        "guidance  temperature  accuracy  energy distance: features   pixels  Frechet distance  precision  recall  "
        "nearest training"
    ]

    def line(start: str, accuracy: float, distances: tuple[float, float, float], *shares: float | None) -> str:
        features, pixels, frechet = distances
        precision, recall, nearest = ("-" if share is None else f"{share:.3f}" for share in shares)
        numbers = f"{start:21s}  {accuracy:8.3f}  {features:25.4f}  {pixels:7.4f}  {frechet:16.4f}"
        return f"{numbers}  {precision:>9s}  {recall:>6s}  {nearest:>16s}"

    for result in results:
        distances = (result.energy_distance_features, result.energy_distance_pixels, result.frechet_distance)
        start = f"{result.guidance:8.1f}  {result.temperature:11.1f}"
        shares = result.precision, result.recall, result.nearest_train_samples
        lines.append(line(start, result.accuracy, distances, *shares))
    floors = (first.energy_distance_features_floor, first.energy_distance_pixels_floor, first.frechet_distance_floor)
    shares = first.precision_real, first.recall_real, first.nearest_train_real
    lines.append(line("real images", first.accuracy_real, floors, *shares))
    worst = sorted(first.accuracy_per_class.items(), key=lambda item: item[1])[:5]
    lines.append("least recognised: " + ", ".join(f"{name} {share:.2f}" for name, share in worst))
    return "\n".join(lines)
