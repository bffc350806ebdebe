"""A study: runs that differ in one thing, how their samples are made, and what their scores say of a claim."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ear_model.config import RunConfig, SamplingConfig

Metric = Literal["energy_distance", "class_consistency", "ms_per_image"]
METRICS: dict[str, str] = {
    "energy_distance": "energy distance to held-out images",
    "class_consistency": "class consistency",
    "ms_per_image": "ms an image",
}
"""What samples are scored by, and its name on an axis."""

Word = Literal["reproduces", "does not reproduce", "cannot be told at this size"]


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    Args:
        name: fit for a directory.
        run: how it is trained; the study gives the seeds.
        settings: how its samples are made; each is scored.
        x: where it is on the plot's axis, if the arms are numbers.
    """

    name: str
    run: RunConfig
    settings: tuple[SamplingConfig, ...]
    x: float | None = None


@dataclass(frozen=True)
class Plot:
    """Scores over what varies.

    Args:
        x: "arm" for :attr:`Arm.x`, a field of the settings, or a metric.
        label: of that axis.
        y: the metric.
        log: whether the x axis is logarithmic.
    """

    x: str
    label: str
    y: Metric = "energy_distance"
    log: bool = False


@dataclass(frozen=True)
class Study:
    """What is asked and how.

    Args:
        name: of the command line and of its files.
        source: where the paper has it, such as "Table 2".
        claim: what the paper finds there, a sentence.
        arms: what is compared.
        plot: None for a table alone.
        verdict: what the scores say of the claim: a word of ``Word`` and a sentence of reasons.
    """

    name: str
    source: str
    claim: str
    arms: tuple[Arm, ...]
    plot: Plot | None
    verdict: Callable[["Findings"], tuple[Word, str]]

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


class Findings:
    """Results of a study's runs.

    Args:
        study: the study.
        results: of each run, what :mod:`ear_model.studies.job` wrote, with ``arm`` and ``seed``.
    """

    def __init__(self, study: Study, results: Sequence[dict[str, Any]]) -> None:
        self.study = study
        self._results = {arm.name: [each for each in results if each["arm"] == arm.name] for arm in study.arms}

    def results(self, arm: str) -> list[dict[str, Any]]:
        """Of the arm's runs."""
        return self._results[arm]

    def values(self, arm: str, metric: str, setting: int | None = None) -> list[float]:
        """A metric of an arm's runs that did not diverge, at a setting; None is the arm's :meth:`best`."""
        number = self.best(arm) if setting is None else setting
        return [each["scores"][number][metric] for each in self._results[arm] if each["scores"]]

    def mean(self, arm: str, metric: str, setting: int | None = None) -> float:
        """Their mean; infinite if all runs diverged."""
        values = self.values(arm, metric, setting)
        return statistics.fmean(values) if values else math.inf

    def spread(self, arm: str, metric: str, setting: int | None = None) -> float:
        """Their standard deviation; 0 of a single run."""
        values = self.values(arm, metric, setting)
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def diverged(self, arm: str) -> int:
        """How many of the arm's runs ended with a loss that was not finite."""
        return sum(not each["scores"] for each in self._results[arm])

    def runs(self, arm: str) -> int:
        """How many runs the arm has."""
        return len(self._results[arm])

    def best(self, arm: str) -> int:
        """The setting at which the arm's energy distance is least on average."""
        whole = [each for each in self._results[arm] if each["scores"]]
        if not whole:
            return 0
        settings = range(len(whole[0]["scores"]))
        return min(settings, key=lambda number: self.mean(arm, "energy_distance", number))

    def order(self, one: str, other: str, metric: str = "energy_distance") -> int:
        """-1, 1 or 0: the first arm's metric is lower, higher, or the runs do not tell.

        Told is a difference of means of more than twice its standard error, of two runs each at least. An arm that
        diverged in all runs has no lower bound.
        """
        values = [self.values(arm, metric) for arm in (one, other)]
        if not all(values):
            return bool(values[1]) - bool(values[0])
        if min(map(len, values)) < 2:
            return 0
        error = math.sqrt(sum(statistics.variance(each) / len(each) for each in values))
        difference = statistics.fmean(values[0]) - statistics.fmean(values[1])
        return 0 if abs(difference) <= 2 * error else int(math.copysign(1, difference))
