"""The studies, all on the digits: each is data and a rule that reads its scores.

A run is that of ``ear train digits`` but for what its arm says.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from ear_model.config import RunConfig, SamplingConfig
from ear_model.presets import RUNS, with_score_and_order
from ear_model.studies.study import Arm, Findings, Plot, Study, Word

DIGITS = RUNS["digits"]
GUIDANCES = (1.0, 1.5, 2.0, 3.0)
REPRODUCES: Word = "reproduces"
NOT: Word = "does not reproduce"
UNKNOWN: Word = "cannot be told at this size"


def run_of(
    score: str = "energy", order: str = "masked", *, train: dict[str, Any] | None = None, **model: Any
) -> RunConfig:
    """The digits' run with a score and an order, and with fields of the model and of the training."""
    run = with_score_and_order("digits", DIGITS, score, order)
    return replace(run, model=replace(run.model, **model), train=replace(run.train, **(train or {})))


def settings_of(
    run: RunConfig, guidances: Sequence[float] = GUIDANCES, temperatures: Sequence[float] | None = None
) -> tuple[SamplingConfig, ...]:
    """Every guidance with every temperature; that of the run by default."""
    pairs = product(guidances, temperatures or (run.sampling.temperature,))
    return tuple(replace(run.sampling, guidance=guidance, temperature=heat) for guidance, heat in pairs)


def arm_of(name: str, run: RunConfig, x: float | None = None, **settings: Any) -> Arm:
    """An arm with :func:`settings_of` its run."""
    return Arm(name, run, settings_of(run, **settings), x)


def lowest(findings: Findings, metric: str = "energy_distance") -> str:
    """The arm of the least mean."""
    return min((arm.name for arm in findings.study.arms), key=lambda name: findings.mean(name, metric))


def told(findings: Findings, arm: str) -> str:
    """An arm's energy distance and class consistency in words."""
    if findings.diverged(arm) == findings.runs(arm):
        return f"{arm} diverges"
    distance, right = (findings.mean(arm, metric) for metric in ("energy_distance", "class_consistency"))
    return f"{arm} {distance:.3f} (consistency {right:.3f})"


def _better(one: str, other: str) -> Any:
    """A verdict for "one is better than the other"."""

    def verdict(findings: Findings) -> tuple[Word, str]:
        order = findings.order(one, other)
        word = {-1: REPRODUCES, 1: NOT, 0: UNKNOWN}[order]
        return word, f"energy distances: {told(findings, one)}, {told(findings, other)}"

    return verdict


def _scores(findings: Findings) -> tuple[Word, str]:
    others = [arm.name for arm in findings.study.arms if arm.name not in ("energy-masked", "gaussian-masked")]
    fair = [name for name in others if name.endswith("-masked")]
    poor = findings.order("gaussian-masked", "energy-masked")
    right = {name: findings.mean(name, "class_consistency") for name in ("energy-masked", *others)}
    word = REPRODUCES if poor == 1 and min(right.values()) >= 0.9 else NOT if poor == -1 else UNKNOWN
    distances = ", ".join(told(findings, name) for name in ("energy-masked", *fair, "gaussian-masked"))
    return word, f"energy distances: {distances}"


def _alpha(findings: Findings) -> tuple[Word, str]:
    inner = [arm.name for arm in findings.study.arms if arm.x is not None and 0.75 <= arm.x <= 1.5]
    best = min(inner, key=lambda name: findings.mean(name, "energy_distance"))
    collapses = findings.order("alpha-2", best) == 1
    finite = not findings.diverged("alpha-0.5")
    reasons = (
        f"energy distances: {', '.join(told(findings, arm.name) for arm in findings.study.arms)}; alpha = 2 "
        f"{'is far worse than' if collapses else 'is not told from'} {best}, and alpha = 0.5 "
        f"{'trains' if finite else 'diverges'} with gradients that are 0 where points coincide"
    )
    return (REPRODUCES if collapses else UNKNOWN), reasons


def _least_at(*names: str) -> Any:
    """A verdict for "one of these arms has the least energy distance"."""

    def verdict(findings: Findings) -> tuple[Word, str]:
        best = lowest(findings)
        others = [arm.name for arm in findings.study.arms if arm.name not in names]
        mine = min(names, key=lambda name: findings.mean(name, "energy_distance"))
        word = UNKNOWN
        if best in names and all(findings.order(mine, other) == -1 for other in others):
            word = REPRODUCES
        elif best not in names and findings.order(best, mine) == -1:
            word = NOT
        return word, f"energy distances: {', '.join(told(findings, arm.name) for arm in findings.study.arms)}"

    return verdict


def _middle(field: str) -> Any:
    """A verdict for "there is a best value between the ends of this field of the settings"."""

    def verdict(findings: Findings) -> tuple[Word, str]:
        arm = findings.study.arms[0]
        best, last = findings.best(arm.name), len(arm.settings) - 1
        distances = [findings.mean(arm.name, "energy_distance", number) for number in (0, best, last)]
        ends = [getattr(arm.settings[number], field) for number in (0, best, last)]
        slack = 2 * findings.spread(arm.name, "energy_distance", best)
        word = REPRODUCES if 0 < best < last and min(distances[0], distances[2]) > distances[1] + slack else UNKNOWN
        numbers = ", ".join(f"{value:g}: {distance:.3f}" for value, distance in zip(ends, distances, strict=True))
        return word, f"energy distance by {field} at its ends and at its best: {numbers}"

    return verdict


SCORES = Study(
    "scores",
    "Section 3 and Figures 3 and 4",
    "any strictly proper score trains a continuous autoregressive model; a Gaussian of fixed width is too narrow a "
    "family to draw good images.",
    tuple(
        arm_of(f"{score}-{order}", run_of(score, order))
        for score, order in (
            ("energy", "masked"), ("diffusion", "masked"), ("mixture", "masked"), ("categorical", "masked"),
            ("kernel", "masked"), ("gaussian", "masked"), ("energy", "causal"), ("energy", "random"),
        )
    ),
    Plot("guidance", "guidance"),
    _scores,
)  # fmt: skip

ORDER = Study(
    "order",
    "Table 5",
    "masked tokens with bidirectional attention are better than causal attention (FID 3.55 against 8.10).",
    tuple(arm_of(order, run_of("energy", order)) for order in ("masked", "causal", "random")),
    Plot("guidance", "guidance"),
    _better("masked", "causal"),
)

ALPHA = Study(
    "alpha",
    "Table 2",
    "any alpha from 1 to below 2 draws good images, 1 the best; alpha = 2, which is not strictly proper, draws none; "
    "below 1 training collapses.",
    tuple(
        arm_of(f"alpha-{alpha:g}", run_of(alpha=alpha), alpha, guidances=(1.0, 2.0))
        for alpha in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
    ),
    Plot("arm", "alpha"),
    _alpha,
)

NOISE = Study(
    "noise",
    "Table 3",
    "uniform noise is better than Gaussian noise, and 64 numbers of it better than 32 or 128.",
    tuple(
        arm_of(f"{noise}-{size}", run_of(noise=noise, noise_dim=size), guidances=(1.0, 2.0))
        for noise, size in product(("uniform", "gaussian"), (32, 64, 128))
    ),
    None,
    _better("uniform-64", "gaussian-64"),
)

DISCRETE = Study(
    "discrete",
    "Figure 3",
    "continuous tokens with the energy loss are better than the discrete tokens of a codebook.",
    (
        arm_of("energy", run_of()),
        *(
            arm_of(f"codebook-{size}", run_of("categorical", codebook_size=size), guidances=GUIDANCES)
            for size in (64, 256, 1024)
        ),
    ),
    Plot("guidance", "guidance"),
    _least_at("energy"),
)

SIGMA = Study(
    "sigma",
    "Figure 4",
    "a Gaussian of fixed sigma around a predicted mean is far from the energy loss at the best sigma; no guidance.",
    (
        arm_of("gaussian", run_of("gaussian"), guidances=(1.0,), temperatures=(0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)),
        arm_of("energy", run_of(), guidances=(1.0,), temperatures=(0.7,)),
    ),
    Plot("temperature", "temperature, the factor on sigma"),
    _better("energy", "gaussian"),
)

RATE = Study(
    "rate",
    "Figure 5",
    "with one learning rate for all parts training collapses; with a quarter of it for the generator it is stable.",
    tuple(
        arm_of(f"rate-{scale:g}", run_of(train={"generator_lr_scale": scale}), scale, guidances=(1.0, 2.0))
        for scale in (1.0, 0.5, 0.25, 0.1)
    ),
    Plot("arm", "generator's learning rate over the backbone's", log=True),
    _better("rate-0.25", "rate-1"),
)

GUIDANCE = Study(
    "guidance",
    "Figure 7",
    "some guidance improves samples, and more of it than the best worsens them.",
    (arm_of("energy", run_of(), guidances=(1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)),),
    Plot("guidance", "guidance"),
    _middle("guidance"),
)

TEMPERATURE = Study(
    "temperature",
    "Figure 8",
    "a temperature below 1 improves samples, in sampling (0.7) and in the last part of training (0.99).",
    tuple(
        arm_of(
            f"tau-{tau:g}",
            run_of(train={"finetune_steps": 400 if tau < 1 else 0, "finetune_tau": tau}),
            guidances=(1.5,),
            temperatures=(0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1),
        )
        for tau in (1.0, 0.99, 0.97)
    ),
    Plot("temperature", "temperature"),
    _middle("temperature"),
)

LATENCY = Study(
    "latency",
    "Figure 2",
    "the energy loss draws better images in less time than the diffusion loss, which needs many steps a token.",
    (
        arm_of("energy-small", run_of(width=64, generator_width=64), guidances=(1.5,)),
        arm_of("energy", run_of(), guidances=(1.5,)),
        arm_of("energy-large", run_of(width=160, generator_width=160), guidances=(1.5,)),
        Arm(
            "diffusion",
            run_of("diffusion"),
            tuple(
                replace(run_of("diffusion").sampling, guidance=1.5, diffusion_steps=steps)
                for steps in (10, 25, 50, 100)
            ),
        ),
    ),
    Plot("ms_per_image", "ms an image", log=True),
    _better("energy", "diffusion"),
)

PAIRS = Study(
    "pairs",
    "Section 4 (ours)",
    "two samples a token are enough for the energy loss; more samples make its gradient less noisy.",
    tuple(arm_of(f"samples-{n}", run_of(num_samples=n), n, guidances=(1.0, 2.0)) for n in (2, 4, 8)),
    Plot("arm", "samples of a token in training", log=True),
    _better("samples-4", "samples-2"),
)

POOL = Study(
    "pool",
    "noise pool (ours)",
    "noise vectors that several rows share cost no quality (docs/noise_pool.md).",
    tuple(
        arm_of(f"rows-{share}", run_of(train={"rows_per_noise": share}), share, guidances=(1.0, 2.0))
        for share in (1, 4, 16)
    ),
    Plot("arm", "rows that share a noise vector", log=True),
    _better("rows-1", "rows-16"),
)

STUDIES = {
    study.name: study
    for study in (
        SCORES, ORDER, ALPHA, NOISE, DISCRETE, SIGMA, RATE, GUIDANCE, TEMPERATURE, LATENCY, PAIRS, POOL,
    )
}  # fmt: skip
"""By name."""
