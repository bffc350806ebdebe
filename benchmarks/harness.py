"""What every benchmark stands on: the check, the record of the environment, tables and result files.

A benchmark is a list of :class:`Row`: a rival in a case. ``pytest benchmarks --benchmark-only`` runs them all, and
``python -m benchmarks.bench_NAME --out FILE.json --only PATTERN`` the rows of one file. Either way a row is checked
before it is timed, and GPU time (benchmarks/clocks.py), wall time and memory stand side by side. ``python -m`` adds
the sum of the kernels by the profiler, and fails where it disagrees with the GPU time.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import clocks
from benchmarks.clocks import HAS_GPU, Call, UnprovenError
from ear_kernels.testing import assert_close_to_eager, errors

Results = Callable[[str], dict[str, Tensor]]
EAGER, COMPILED, OURS = "eager", "torch.compile", "ours"
PUBLIC, FP8 = "public", f"{OURS}, FP8"
PUBLIC_COMPILED, PUBLIC_ACCELERATED = f"{PUBLIC}, blocks compiled", f"{PUBLIC}, accelerate()"


class Unavailable(Exception):
    """Why a row cannot be measured here."""


def environment() -> dict[str, Any]:
    """GPU, versions, date, command and commit, for every result."""
    try:
        from triton import __version__ as triton_version
    except ImportError:
        triton_version = "none"
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        commit = ""
    return {
        "device": torch.cuda.get_device_name() if HAS_GPU else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        # A machine that gets the files without their history is told.
        "commit": os.environ.get("GIT_COMMIT") or commit or "unknown",
    }


def write_json(path: Path, content: object) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def check_results(results: Results, rival: str, scale: Callable[[str, Tensor], float] | None = None) -> float:
    """Hold a rival's results against eager's by the project's rule.

    Args:
        results: the tensors by name of "eager", of "exact" (eager in a higher precision) and of the rival.
        rival: whose are checked.
        scale: from a name and its exact result the magnitude of the terms that it is a sum of; by default its own.

    Returns:
        The largest RMS error over eager's.
    """
    exact, eager, found = (results(which) for which in ("exact", "eager", rival))
    worst = 0.0
    for name, truth in exact.items():
        assert_close_to_eager(name, found[name], eager[name], truth, scale(name, truth) if scale else 0.0)
        ours, theirs = errors(found[name], truth)[1], errors(eager[name], truth)[1]
        worst = max(worst, ours / theirs if theirs else 0.0)
    return worst


@dataclass(frozen=True)
class Row:
    """A rival in a case.

    Args:
        case, rival: names, for the tables.
        prepare: makes the inputs and returns the calls to time, in turn. Raises :class:`Unavailable` with the reason
            if it cannot.
        check: raises AssertionError if the result is wrong; returns its error over eager's.
        work: ``bytes`` that must be moved and ``flops`` that must be done by one call, for the rates.
        reason: why this row is not measured on this machine, if so.
        on_host: whether the GPU has no part in it.
        measure: in the place of all this: returns everything that there is to record.
    """

    case: str
    rival: str
    prepare: Callable[[], Sequence[Call]] = list
    check: Callable[[], float] | None = None
    work: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    on_host: bool = False
    measure: Callable[[], dict[str, Any]] | None = None

    def __str__(self) -> str:
        return f"{self.case}: {self.rival}"


def needs_gpu(rows: Iterable[Row]) -> list[Row]:
    """The rows, with the reason why they are not measured without a GPU."""
    return list(rows) if HAS_GPU else [replace(row, reason="needs a GPU") for row in rows]


def in_new_process(
    run: Callable[..., dict[str, Any]], *arguments: Any, start: Literal["forkserver", "spawn"] = "forkserver"
) -> dict[str, Any]:
    """``run(*arguments)`` in a process of its own: cuBLAS, caches and allocator read their environment only once.

    Only "spawn" knows of an environment that has changed; it imports everything anew, which takes seconds.
    """
    context = multiprocessing.get_context(start)
    context.set_forkserver_preload(["timm.models.vision_transformer", "torch._dynamo"])
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(run, *arguments).result()


def measure(row: Row, also: Callable[[Sequence[Call]], object] | None = None) -> dict[str, Any]:
    """Check and time a row; what went wrong if something did. ``also`` gets the calls at the end."""
    record: dict[str, Any] = {"case": row.case, "rival": row.rival}
    try:
        if row.reason:
            raise Unavailable(row.reason)
        if row.measure is None:
            _time(row, record, also)
        else:
            record |= row.measure()
    except Exception as error:
        _note(row, record, error)
    gc.collect()
    torch.cuda.empty_cache()
    return record


def _time(row: Row, record: dict[str, Any], also: Callable[[Sequence[Call]], object] | None) -> None:
    if row.check is not None:
        record["error_over_eager"] = row.check()
    calls = row.prepare()
    if row.rival.startswith(OURS) and not HAS_GPU and not row.on_host:
        record["note"] = "eager backend"
    record["wall_ms"] = clocks.wall_milliseconds(calls, **({} if HAS_GPU else {"budget_s": 0.4, "rounds": 5}))
    if HAS_GPU and not row.on_host:
        record["peak_bytes"] = clocks.peak_bytes(calls[0])
        record["gpu_ms"] = clocks.gpu_milliseconds(calls)
    seconds = record.get("gpu_ms", record["wall_ms"])["median"] * 1e-3
    record |= {f"{name}_per_s": amount / seconds for name, amount in row.work.items()}
    if also is not None:
        also(calls)


def _note(row: Row, record: dict[str, Any], error: Exception) -> None:
    """Why there is no time, or none to rely on: a reason, or a failure."""
    text = " ".join(str(error).split())
    if isinstance(error, Unavailable):
        record["skipped"] = text
    elif isinstance(error, torch.cuda.OutOfMemoryError):
        record["skipped"] = "does not fit into memory"
    elif row.rival == COMPILED and not isinstance(error, AssertionError | UnprovenError):
        record["skipped"] = f"fails to compile: {text}"
    else:
        record["failed"] = f"{type(error).__name__}: {text}"


def add_kernels(row: Row, record: dict[str, Any]) -> None:
    """The sum of the row's kernels by the profiler, and whether it agrees with the time on the GPU."""
    if "gpu_ms" not in record or row.measure is not None:
        return
    try:
        kernels = clocks.profiled(row.prepare())
        record["kernels_ms"], record["launches"] = kernels.ms, kernels.launches
        clocks.cross_check(record["gpu_ms"]["median"], kernels.ms, kernels.launches)
    except Exception as error:
        _note(row, record, error)
    gc.collect()
    torch.cuda.empty_cache()


def describe(record: dict[str, Any]) -> list[str]:
    """The cells of a record in the table."""

    def milliseconds(name: str) -> str:
        value = record.get(name)
        value = value["median"] if isinstance(value, dict) else value
        return "" if value is None else f"{value:.4f}" if value < 10 else f"{value:.1f}"

    peak = record.get("peak_bytes")
    note = record.get("note", "")
    if "images_per_s" in record:
        note = f"{record['images_per_s']:,.0f} images/s {note}".rstrip()
    for status in ("skipped", "failed"):
        if status in record:
            note = f"{status}: {record[status]}"[:120]
    return [
        record["case"], record["rival"], milliseconds("gpu_ms"), milliseconds("kernels_ms"), milliseconds("wall_ms"),
        "" if peak is None else f"{peak / 1e6:,.1f}", note,
    ]  # fmt: skip


def table(records: Iterable[dict[str, Any]]) -> str:
    """A line a record; a case that was skipped as a whole for one reason has one line."""
    lines = [["case", "rival", "GPU ms", "kernels ms", "wall ms", "peak MB", ""]]
    for record in records:
        cells = describe(record)
        if "skipped" in record and lines[-1][0] == cells[0] and lines[-1][-1] == cells[-1]:
            lines[-1][1] = "several"
        else:
            lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(7)]

    def aligned(line: list[str]) -> str:
        cells = zip(line, "<<>>>><", widths, strict=True)
        return "  ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip()

    return "\n".join(map(aligned, lines))


def main(rows: Sequence[Row], doc: str | None, arguments: Sequence[str] | None = None) -> int:
    """Measure the rows of one file; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="result file, written after every row")
    parser.add_argument("--only", default="", help="regular expression: rows whose 'case: rival' has it")
    parser.add_argument("--no-kernels", action="store_true", help="leave out the sums of kernels by the profiler")
    options = parser.parse_args(arguments)
    chosen = [row for row in rows if re.search(options.only, str(row))]
    result: dict[str, Any] = {"environment": environment(), "rows": (records := list[dict[str, Any]]())}

    def save() -> None:
        if options.out is not None:
            write_json(options.out, result)

    if HAS_GPU:
        result["copy_bytes_per_s"] = clocks.copy_rate()
    for row in chosen:
        records.append(measure(row))
        print("  ".join(describe(records[-1])), flush=True)
        save()
    # At the end: a profiler that was there once can slow down every later launch.
    for row, record in zip(chosen, records, strict=True) if HAS_GPU and not options.no_kernels else ():
        add_kernels(row, record)
        save()
    print(table(records))
    return int(any("failed" in record for record in records))
