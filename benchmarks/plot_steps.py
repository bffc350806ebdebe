"""Bars of saved benchmarks: the generator's forward + backward, and the training step by phase.

python benchmarks/plot_steps.py generator benchmarks/results/generator_h200_2026-11-22.json docs/generator_speed.png
python benchmarks/plot_steps.py train_step benchmarks/results/train_step_h200_2026-11-24.json docs/train_step.png
"""

import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt

COLOURS = {"eager": "#9aa0a6", "public": "#9aa0a6", "compile": "#5b8def", "compiled": "#5b8def", "triton": "#d2691e"}
PHASES = ("forward", "backward", "clip_and_adamw", "ema")


def generator(saved: dict, out: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 3.5))
    sizes: list[str] = []
    for entry in saved["benchmarks"]:
        match = re.fullmatch(r"test_whole\[(\w+)-fwd_bwd-(\w+)\]", entry["name"])
        if not match:
            continue
        size, rival = match.groups()
        if size not in sizes:
            sizes.append(size)
        place = sizes.index(size) + 0.27 * (("eager", "compile", "triton").index(rival) - 1)
        ms = entry["extra_info"]["gpu_ms"]
        label = {"eager": "eager", "compile": "torch.compile", "triton": "ours"}[rival]
        axis.bar(place, ms, 0.25, color=COLOURS[rival], label=label if size == sizes[0] else None)
        axis.text(
            place, ms, f"{ms:.1f}\n{entry['extra_info']['peak_gib']:.1f} GiB", ha="center", va="bottom", fontsize=7
        )
    axis.set_xticks(range(len(sizes)), sizes)
    axis.set_ylabel("ms, forward + backward")
    axis.set_title("MLP generator, 65,536 rows, bf16, one H200", fontsize=10)
    finish(figure, axis, out)


def train_step(saved: dict, out: Path) -> None:
    figure, axis = plt.subplots(figsize=(8, 3.5))
    names: list[str] = []
    for entry in saved["benchmarks"]:
        info = entry["extra_info"]
        which = {"public": 0, "compiled": 1, "ours": 2}.get(info.get("which"))
        if which is None:
            continue
        if info["name"] not in names:
            names.append(info["name"])
        place, bottom = names.index(info["name"]) + 0.27 * (which - 1), 0.0
        for number, phase in enumerate(PHASES):
            colour = ("#9aa0a6", "#5b8def", "#d2691e")[which]
            axis.bar(
                place, info[phase], 0.25, bottom=bottom, color=colour, alpha=1 - 0.22 * number, edgecolor="white"
            )
            bottom += info[phase]
        # What CUDA graphs keep between their kernels counts as reserved only.
        memory = info.get("peak_reserved_gb", info["peak_gb"])
        label = f"{('public', 'compiled', 'ours')[which]}\n{info['step']:.0f} ms\n{memory:.0f} GB"
        axis.text(place, bottom, label, ha="center", va="bottom", fontsize=7)
    axis.set_xticks(range(len(names)), names)
    axis.set_ylabel("ms: forward, backward,\nclip and AdamW, EMA")
    axis.set_title("Training step of 64 images, 4 samples a token, bf16, one H200", fontsize=10)
    finish(figure, axis, out)


def finish(figure, axis, out: Path) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.2)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(out, dpi=130)


if __name__ == "__main__":
    {"generator": generator, "train_step": train_step}[sys.argv[1]](
        json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    )
