"""Every published table and plot, from the result files of ``python -m benchmarks.bench_*``.

    python -m benchmarks.report RESULT.json                                        # the table, in Markdown
    python -m benchmarks.report RESULT.json --plot docs/energy_loss_speed.png --only "energy loss" --title "..."
    python -m benchmarks.report RESULT.json --plot docs/sampling_speed.png --only "sampling" --title "..."

A cell of the table is GPU / wall time in ms, of sampling wall time of a call / of an image, with the peak memory on
top of the inputs, of steps and of sampling all of it, where it was measured. Results of benchmarks.sampling_quality
make a line a setting, with mean and standard deviation of every score over the seeds.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import COMPILED, EAGER, FP8, OURS, PUBLIC, PUBLIC_ACCELERATED, PUBLIC_COMPILED

# Apart in hue and in brightness, also for the colour-blind and in print.
COLOURS = {EAGER: "#8a8f98", COMPILED: "#1f77d0"}
COLOURS |= {PUBLIC: "#8a8f98", PUBLIC_COMPILED: "#1f77d0", PUBLIC_ACCELERATED: "#0b3f7a"}
COLOURS |= {OURS: "#d1480b", FP8: "#f2b134"}
METRICS = {"gpu_ms": "ms on the GPU", "wall_ms": "ms of wall time"}
IMAGE_METRICS = {"image_ms": "ms an image"}
SCORES = {"accuracy": "accuracy", "energy_distance": "energy distance", "frechet_distance": "Frechet distance"}


def rounded(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def memory(count: float) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def cell(record: dict[str, Any] | None) -> str:
    """GPU / wall ms (peak memory), or why there is none."""
    if record is None:
        return ""
    for status in ("failed", "skipped"):
        if status in record:
            return record[status].split(":")[0]
    times = " / ".join(rounded(record[metric]["median"]) for metric in (*METRICS, *IMAGE_METRICS) if metric in record)
    return times + (f" ({memory(record['peak_bytes'])})" if "peak_bytes" in record else "")


def source(saved: dict[str, Any]) -> str:
    """GPU, versions, date, commit and command, in one sentence."""
    environment = saved["environment"]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("torch", "triton"))
    where = f"{environment['device']}, {versions}, {environment['date'][:10]}, commit {environment['commit']}"
    return f"{where}: `{environment['command']}`."


def markdown(saved: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """A line a case, a column a rival; and of steps the ms of every group of kernels. Scores: see :func:`quality`."""
    if "real" in saved:
        steps = saved["config"]["train"]["steps"]
        about = (
            f"{saved['data']}, {steps:,} training steps on {saved['trained_on']}; {saved['num']:,} samples, "
            f"{saved['seeds']} seeds; {source(saved)}"
        )
        real = {name: {"mean": value} for name, value in saved["real"].items()}
        return "\n".join([about, "", *quality([*rows, {"case": "real images", "rival": "", "scores": real}])])
    cases, rivals = (list(dict.fromkeys(row[name] for row in rows)) for name in ("case", "rival"))
    found = {(row["case"], row["rival"]): row for row in rows}
    lines = [source(saved), "", f"| | {' | '.join(rivals)} |", "|---" * (len(rivals) + 1) + "|"]
    for case in cases:
        lines.append(f"| {case} | {' | '.join(cell(found.get((case, rival))) for rival in rivals)} |")
    profiles = [row for row in rows if "groups" in row]
    if profiles:
        titles = [f"{row['case'].split(', ')[-1]}, {row['rival']}" for row in profiles]
        lines += ["", f"| ms of kernels | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
        for kind in profiles[0]["groups"]:
            lines.append(f"| {kind} | {' | '.join(rounded(row['groups'][kind]) for row in profiles)} |")
    return "\n".join(lines)


def quality(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a table of benchmarks.sampling_quality: a setting each, its work, scores and, on a GPU, its time."""
    timed = any("image_ms" in row for row in rows)
    titles = ["", "precision", "backbone passes an image", *SCORES.values()]
    titles += ["ms an image"] * timed
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row["case"], row["rival"], str(row.get("evaluations", ""))]
        for name in SCORES:
            found = row.get("scores", {}).get(name, {})
            places = 4 if abs(found.get("mean", 0)) < 10 else 1
            cells.append(" ± ".join(f"{found[key]:.{places}f}" for key in ("mean", "spread") if key in found))
        for status in ("skipped", "failed"):
            if status in row:
                cells[3] = f"{status}: {row[status]}"
        if timed:
            cells.append(rounded(row["image_ms"]["median"]) if "image_ms" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(saved: dict[str, Any], rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of the rivals on a logarithmic axis: GPU time above, wall time below; of sampling the time of an image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["rival"] in COLOURS and "wall_ms" in row]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    rivals = [rival for rival in COLOURS if any(row["rival"] == rival for row in rows)]
    known = IMAGE_METRICS if any("image_ms" in row for row in rows) else METRICS
    metrics = [metric for metric in known if any(metric in row for row in rows)]
    bar, size = 0.87 / max(len(rivals), 3), (1.55 * len(cases) + 1.5, max(3.6, 2.7 * len(metrics)))
    figure, panels = plt.subplots(len(metrics), figsize=size, sharex=True, squeeze=False)
    for axes, metric in zip(panels[:, 0], metrics, strict=True):
        for number, rival in enumerate(rivals):
            values = {row["case"]: row[metric]["median"] for row in rows if row["rival"] == rival and metric in row}
            places = [cases.index(case) + bar * (number - (len(rivals) - 1) / 2) for case in values]
            bars = axes.bar(places, list(values.values()), 0.96 * bar, color=COLOURS[rival], label=rival)
            axes.bar_label(bars, [rounded(value) for value in values.values()], padding=1, fontsize=7)
        axes.set(yscale="log", ylabel=known[metric])
        axes.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xticks(range(len(cases)), [short(case) for case in cases], fontsize=8)
    panels[0, 0].legend(frameon=False, fontsize=8, ncols=len(rivals), loc="lower left", bbox_to_anchor=(0, 1))
    figure.suptitle(f"{title}\n{source(saved).split(', commit')[0]}".strip(), fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def short(case: str) -> str:
    """A case's name over several lines, without the operation that all have in common."""
    return "\n".join(re.sub(r"^(energy loss|generator|training step|sampling), |^generator ", "", case).split(", "))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saved", type=Path)
    parser.add_argument("--only", default="", help="regular expression: rows whose 'case: rival' has it")
    parser.add_argument("--plot", type=Path, help="also write this picture")
    parser.add_argument("--title", default="", help="of the picture")
    options = parser.parse_args(arguments)
    saved = json.loads(options.saved.read_text())
    rows = [row for row in saved["rows"] if re.search(options.only, f"{row['case']}: {row['rival']}")]
    print(markdown(saved, rows))
    if options.plot:
        plot(saved, rows, options.plot, options.title)


if __name__ == "__main__":
    main()
