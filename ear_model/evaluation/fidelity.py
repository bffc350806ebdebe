"""FID and Inception Score as the paper reports them: torch-fidelity's Inception and a statistics file."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ear_model.config import SamplingConfig
from ear_model.evaluation.judged import feature_statistics, frechet_distance
from ear_model.evaluation.precision_recall import precision_recall
from ear_model.npz_files import read_npz

# uint8 images [b, 3, S, S] to Inception features [b, 2048] and unbiased logits [b, 1008].
Extractor = Callable[[Tensor], Sequence[Tensor]]

SPLITS = 10  # parts of the samples that Inception Scores are computed on, everywhere


@dataclass(frozen=True)
class FidelityEvaluation:
    """Scores of one sampling setting."""

    guidance: float
    temperature: float
    steps: int
    num_samples: int
    fid: float
    """Frechet distance of Inception features to the statistics file."""
    inception_score: float
    """Mean over ten splits."""
    inception_score_std: float
    """Standard deviation over those splits."""
    statistics: str
    """The statistics file."""
    precision: float | None
    """Share of samples that look real, on Inception features (:func:`precision_recall`); None without real images."""
    recall: float | None
    """Share of real images that samples look like; likewise."""


def load_statistics(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """``mu [F]`` and ``sigma [F, F]`` of a statistics file. Raises ValueError if it is not one."""
    if not path.is_file():
        raise ValueError(f"{path} is not there; give an .npz statistics file with mu and sigma")
    try:
        mean, covariance = read_npz(path, ("mu", "sigma"))
    except ValueError as error:
        raise ValueError(f"{error}; it is no statistics file with mu and sigma") from error
    for name, values in (("mu", mean), ("sigma", covariance)):
        if values.dtype.kind not in "fiu":
            raise ValueError(f"{path}: {name} is {values.dtype}; it must be real numbers")
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: {name} holds NaN or infinite values; it is damaged")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path}: mu has shape {mean.shape} and sigma {covariance.shape}; they must be [F] and [F, F]"
        )
    tolerance = 1e-3 * float(np.abs(covariance).max(initial=0))
    if len(mean) == 0 or (np.diag(covariance) < 0).any() or not np.allclose(covariance, covariance.T, 0, tolerance):
        raise ValueError(f"{path}: sigma is no covariance matrix; it must be symmetric, with variances from 0 on")
    return mean, covariance


def inception_extractor(device: torch.device) -> Extractor:
    """torch-fidelity's Inception-v3, whose weights it downloads once.

    Raises:
        ValueError: torch-fidelity is not installed, or its weights can't be had.
    """
    try:
        from torch_fidelity.utils import create_feature_extractor
    except ImportError as error:
        raise ValueError(
            "FID and IS need torch-fidelity, which is not installed; pip install 'ear-kernels[eval]'"
        ) from error
    try:
        extractor: Any = create_feature_extractor(
            "inception-v3-compat", ["2048", "logits_unbiased"], cuda=device.type == "cuda", verbose=False
        )
    except Exception as error:
        raise ValueError(f"torch-fidelity can't load its Inception weights ({error})") from error

    def extract(images: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            return extractor(images.to(device))

    return extract


def inception_score(logits: Tensor, splits: int = SPLITS, seed: int = 2020) -> tuple[float, float]:
    """Inception Score (Salimans et al. 2016, Eq. 1), mean and standard deviation over ``splits`` of shuffled images.

    Args:
        logits: ``[N, classes]``, N >= splits.
        splits: parts that it is computed on; torch-fidelity's ten.
        seed: of the shuffle; torch-fidelity's.

    Raises:
        ValueError: fewer images than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} images; an Inception Score over {splits} splits needs at least that many")
    shuffled = logits[torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))].double()
    scores = []
    bounds = [index * len(logits) // splits for index in range(splits + 1)]
    log_probabilities = shuffled.log_softmax(dim=1)
    for part in (log_probabilities[a:b] for a, b in itertools.pairwise(bounds)):
        probabilities = part.exp()
        marginal = probabilities.mean(dim=0)
        divergences = torch.xlogy(probabilities, probabilities) - torch.xlogy(probabilities, marginal)
        scores.append(divergences.sum(dim=1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def evaluate_fidelity(
    batches: Iterable[Tensor],
    extractor: Extractor,
    statistics: tuple[np.ndarray, np.ndarray],
    setting: SamplingConfig,
    *,
    where: str,
    real: Iterable[Tensor] = (),
) -> FidelityEvaluation:
    """FID, IS, precision and recall of samples.

    Args:
        batches: uint8 images ``[b, 3, S, S]``; they are read once and not kept.
        extractor: see :func:`inception_extractor`.
        statistics: mean and covariance of the real images, see :func:`load_statistics`.
        setting: what the samples were drawn with; copied into the result.
        where: the statistics file, likewise.
        real: batches of real images, as ``batches``; for precision and recall alone.

    Raises:
        ValueError: statistics of another number of features, or too few images.
    """
    features, logits = [], []
    for images in batches:
        part_features, part_logits = extractor(images)
        if part_features.shape[1] != len(statistics[0]):
            raise ValueError(
                f"{where} has {len(statistics[0])} features; the extractor gives {part_features.shape[1]}"
            )
        features.append(part_features.float().cpu())
        logits.append(part_logits.float().cpu())
    all_features = torch.cat(features)
    score, deviation = inception_score(torch.cat(logits))
    real_features = [extractor(images)[0].float().cpu() for images in real]
    shares = precision_recall(all_features, torch.cat(real_features)) if real_features else (None, None)
    return FidelityEvaluation(
        guidance=setting.guidance,
        temperature=setting.temperature,
        steps=setting.steps,
        num_samples=len(all_features),
        fid=frechet_distance(*feature_statistics(all_features), *statistics),
        inception_score=score,
        inception_score_std=deviation,
        statistics=where,
        precision=shares[0],
        recall=shares[1],
    )


def report_fidelity(results: list[FidelityEvaluation]) -> str:
    """The scores as a few lines of text."""
    lines = ["guidance  temperature      FID  Inception Score"]
    for result in results:
        shares = "" if result.precision is None else f", precision {result.precision:.3f}, recall {result.recall:.3f}"
        lines.append(
            f"{result.guidance:8.1f}  {result.temperature:11.1f}  {result.fid:7.2f}  {result.inception_score:8.2f} "
            f"+- {result.inception_score_std:.2f}  ({result.num_samples} images{shares})"
        )
    return "\n".join(lines)
