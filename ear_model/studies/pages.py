"""What a study found, as JSON, a plot and a page; and the table of all studies."""

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ear_model.config import SamplingConfig
from ear_model.files import write_atomically, write_json
from ear_model.json_files import read_json
from ear_model.studies.study import METRICS, Arm, Findings, Plot, Study

COLOURS = (
    "#0b3f7a",
    "#d1480b",
    "#1f77d0",
    "#f2b134",
    "#7ab8f5",
    "#8a8f98",
    "#3c8d5a",
    "#9b59b6",
    "#111111",
    "#c0392b",
)


def write(study: Study, results: Sequence[dict[str, Any]], command: str, report: Path, *, quick: bool) -> Path:
    """Write REPORT/<study>.json, .png and .md, and the table REPORT/README.md; returns the page.

    Args:
        study: the study.
        results: of all its runs.
        command: that makes them.
        report: the directory.
        quick: whether the runs were too short to tell anything.
    """
    findings = Findings(study, results)
    word, reasons = study.verdict(findings)
    if quick:
        word, reasons = "cannot be told at this size", "quick runs, which show that all works and tell nothing"
    report.mkdir(parents=True, exist_ok=True)
    stored = {"study": study.name, "source": study.source, "claim": study.claim, "verdict": word, "reasons": reasons}
    write_json(report / f"{study.name}.json", {**stored, "command": command, "quick": quick, "runs": list(results)})
    if study.plot is not None:
        _draw(findings, study.plot, report / f"{study.name}.png")
    page = report / f"{study.name}.md"
    _write_text(page, _page(findings, word, reasons, command))
    _write_text(report / "README.md", _index(report))
    return page


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _page(findings: Findings, word: str, reasons: str, command: str) -> str:
    study = findings.study
    environment: dict[str, Any] = next((each["environment"] for each in _all(findings)), {})
    packages = environment.get("packages", {})
    made = f"torch {packages.get('torch')}, {environment.get('device')}, Python {environment.get('python')}"
    lines = [
        f"# {study.source}, {study.name}: {word}",
        "",
        _wrapped(f"The paper: {study.claim}"),
        "",
        _wrapped(f"Here: {reasons}."),
        "",
        f"    {command}",
        "",
        _wrapped(
            "Mean and standard deviation over seeds, at each arm's setting of least energy distance. It is to "
            "held-out digits; the class consistency is by a support vector machine."
        ),
        "",
        "| arm | runs | setting | class consistency | energy distance | ms an image | final loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_row(findings, arm) for arm in study.arms),
        "",
        *([f"![{study.plot.label}]({study.name}.png)", ""] if study.plot is not None else []),
        _wrapped(f"{_floor(findings)} Every run and setting: [{study.name}.json]({study.name}.json) ({made})."),
    ]
    return "\n".join(lines) + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def _all(findings: Findings) -> list[dict[str, Any]]:
    return [each for arm in findings.study.arms for each in findings.results(arm.name)]


def _row(findings: Findings, arm: Arm) -> str:
    diverged, runs = findings.diverged(arm.name), findings.runs(arm.name)
    count = f"{runs}" if not diverged else f"{runs}, {diverged} diverged"
    if diverged == runs:
        return f"| {arm.name} | {count} | - | - | - | - | - |"
    setting = arm.settings[findings.best(arm.name)]
    numbers = (_number(findings.values(arm.name, metric)) for metric in ("class_consistency", "energy_distance"))
    losses = [each["loss"] for each in findings.results(arm.name) if each["loss"] is not None]
    speed = findings.mean(arm.name, "ms_per_image")
    return f"| {arm.name} | {count} | {shown(setting)} | {' | '.join(numbers)} | {speed:.2f} | {_number(losses)} |"


def shown(setting: SamplingConfig) -> str:
    """A setting in a few words."""
    words = f"guidance {setting.guidance:g}, temperature {setting.temperature:g}, {setting.steps} steps"
    return words if setting.diffusion_steps == 100 else f"{words}, {setting.diffusion_steps} of diffusion"


def _number(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}" if values else "-"


def _floor(findings: Findings) -> str:
    scored = [score for each in _all(findings) for score in each["scores"]]
    if not scored:
        return ""
    floor, judge = scored[0]["energy_distance_floor"], scored[0]["classifier_test_accuracy"]
    return f"Training digits have the energy distance {floor:.3f}, held-out digits the class consistency {judge:.3f}."


def _index(report: Path) -> str:
    lines = [
        "# Studies: the paper's findings, asked again at a size that anyone can afford",
        "",
        "`ear study NAME` runs one and rewrites its page and this table; `ear study list` lists them.",
        "",
        "| study | the paper | what it says | here |",
        "| --- | --- | --- | --- |",
    ]
    for path in sorted(report.glob("*.json")):
        stored = read_json(path)
        if {"study", "source", "claim", "verdict"} <= stored.keys():
            name = stored["study"]
            lines.append(f"| [{name}]({name}.md) | {stored['source']} | {stored['claim']} | {stored['verdict']} |")
    return "\n".join(lines) + "\n"


def _draw(findings: Findings, plot: Plot, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    arms = [arm for arm in findings.study.arms if findings.diverged(arm.name) < findings.runs(arm.name)]
    if plot.x == "arm":
        placed = [arm for arm in arms if arm.x is not None]
        _errors(axes, findings, [(arm, findings.best(arm.name), float(arm.x or 0)) for arm in placed], plot, "", 0)
    for number, arm in enumerate(arms if plot.x != "arm" else ()):
        settings = range(len(arm.settings))
        if plot.x in METRICS:
            points = [(arm, each, findings.mean(arm.name, plot.x, each)) for each in settings]
        else:
            points = [(arm, each, float(getattr(arm.settings[each], plot.x))) for each in settings]
        _errors(axes, findings, points, plot, arm.name, number)
    axes.set(xlabel=plot.label, ylabel=METRICS[plot.y], title=f"{findings.study.source}: {findings.study.name}")
    if plot.log:
        axes.set_xscale("log")
    drawn = [findings.mean(arm.name, plot.y, number) for arm in arms for number, _ in enumerate(arm.settings)]
    if min(drawn, default=0) > 0 and max(drawn) > 20 * min(drawn):
        axes.set_yscale("log")
    if plot.x != "arm" and len(arms) > 1:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    plt.close(figure)


def _errors(
    axes: Any, findings: Findings, points: Sequence[tuple[Arm, int, float]], plot: Plot, label: str, number: int
) -> None:
    points = sorted(points, key=lambda point: point[2])
    means = [findings.mean(arm.name, plot.y, setting) for arm, setting, _ in points]
    spreads = [findings.spread(arm.name, plot.y, setting) for arm, setting, _ in points]
    colour = COLOURS[number % len(COLOURS)]
    axes.errorbar([x for *_, x in points], means, spreads, marker="o", capsize=3, color=colour, label=label or None)
