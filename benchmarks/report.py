"""A saved benchmark as a table in markdown, and a plot.

pytest benchmarks --benchmark-only --benchmark-json=benchmarks/results/h200.json
python benchmarks/report.py benchmarks/results/h200.json --plot benchmarks/results/h200.png
"""

import argparse
import json
from pathlib import Path


def rows_of(saved: dict) -> list[dict]:
    """One dictionary a benchmark: shape, which, times, rate, memory."""
    rows = []
    for entry in saved["benchmarks"]:
        extra = entry["extra_info"]
        if "gpu_ms" not in extra:
            continue
        wall = entry["stats"]["median"] / extra.get("calls_per_round", 1) * 1e3
        rows.append({**extra, "wall_ms": wall})
    return rows


def table(saved: dict) -> str:
    """Markdown: a line a shape and implementation, with the speed-up over eager (or cdist) in the same run."""
    environment = saved["machine_info"].get("ear", {})
    lines = [
        f"{environment.get('device')}, torch {environment.get('torch')}, triton {environment.get('triton')}, "
        f"{environment.get('date')}, commit {environment.get('commit')}: `{environment.get('command')}`",
        "",
        "| shape | | ms (p20-p80) | against eager | GB/s | of copy | wall ms a call | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = rows_of(saved)
    base = {row["shape"]: row["gpu_ms"]["median"] for row in rows if row["which"] in ("eager", "cdist")}
    for row in rows:
        ms = row["gpu_ms"]
        ratio = f"{base[row['shape']] / ms['median']:.1f}x" if row["shape"] in base else ""
        lines.append(
            f"| {row['shape']} | {row['which']} | {ms['median']:.4f} ({ms['p20']:.4f}-{ms['p80']:.4f}) | {ratio} | "
            f"{row['gb_per_s']:.0f} | {row['share_of_copy']:.0%} | {row['wall_ms']:.4f} | "
            f"{row['peak_bytes'] / 1e6:.1f} MB |"
        )
    return "\n".join(lines)


def plot(saved: dict, path: Path) -> None:
    """Bars of the times, a group a shape, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = rows_of(saved)
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    kinds = list(dict.fromkeys(row["which"] for row in rows))
    figure, axes = plt.subplots(figsize=(1.6 * len(shapes) + 2, 3.6))
    for index, kind in enumerate(kinds):
        points = [(shapes.index(row["shape"]), row["gpu_ms"]["median"]) for row in rows if row["which"] == kind]
        axes.bar(
            [x + (index - (len(kinds) - 1) / 2) * 0.22 for x, _ in points], [y for _, y in points], 0.2, label=kind
        )
    axes.set_yscale("log")
    axes.set_xticks(range(len(shapes)), shapes, rotation=20)
    axes.set_ylabel("ms, forward + backward")
    axes.set_title(saved["machine_info"].get("ear", {}).get("device", ""))
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saved", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    saved = json.loads(arguments.saved.read_text())
    print(table(saved))
    if arguments.plot:
        plot(saved, arguments.plot)


if __name__ == "__main__":
    main()
