"""GPU time that is proven, wall time, kernels by the profiler, peak memory, and the card's rate of copying.

The calls are queued behind a sleep of the GPU that is sized by the host's time for them; only if that sleep is still
going on when the last call is in the queue does a round count: then the GPU had no occasion to wait for the host.
"""

from __future__ import annotations

import functools
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
Call = Callable[[], object]

MOST_CALLS = 20  # in a round, so that their launches fit into the queue of about 1,024
TRIES = 7
# What the GPU may take between two kernels, and by how much clocks may differ between two measurements.
GAP_MS, DRIFT = 0.004, 1.2


class UnprovenError(RuntimeError):
    """Nothing shows that the GPU never waited for the host."""


class Gpu:
    """The GPU's queue and its clock, as far as timing needs them."""

    now = staticmethod(time.perf_counter)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def mark(self) -> torch.cuda.Event:
        """An event behind everything that is queued."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_over(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def between(self, first: torch.cuda.Event, last: torch.cuda.Event) -> float:
        """Milliseconds."""
        return first.elapsed_time(last)

    @functools.cached_property
    def cycles_per_ms(self) -> float:
        self.synchronize()
        first = self.mark()
        torch.cuda._sleep(20_000_000)
        last = self.mark()
        self.synchronize()
        return 20_000_000 / self.between(first, last)

    def sleep(self, milliseconds: float) -> None:
        """Queue a kernel that does nothing for that long."""
        torch.cuda._sleep(int(milliseconds * self.cycles_per_ms))


GPU = Gpu()


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """median, p20 and p80."""
    ordered = sorted(values)
    pick = [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8)]
    return {"median": statistics.median(ordered), "p20": pick[0], "p80": pick[1]}


def gpu_milliseconds(
    calls: Sequence[Call], *, gpu: Gpu = GPU, budget_s: float = 1.0, rounds: int = 15
) -> dict[str, float]:
    """Milliseconds that a call takes on a GPU which never waits for the host.

    Args:
        calls: the same on different inputs, in turn, so that inputs which fit into the L2 cache are not found there.
        gpu: the clock and the queue.
        budget_s: about how long the rounds may take.
        rounds: that count.

    Returns:
        median, p20 and p80; ``host_ms``, the host's time for one call; ``head_start_ms`` and ``calls_a_round``.

    Raises:
        UnprovenError: the head start was over before all calls were queued, in :data:`TRIES` rounds in a row.
    """
    for call in [*calls, *calls]:
        call()
    host, whole = [], []
    for number in range(3):
        gpu.synchronize()
        begun = gpu.now()
        calls[number % len(calls)]()
        host.append(gpu.now() - begun)
        gpu.synchronize()
        whole.append(gpu.now() - begun)
    host_ms, one_s = 1e3 * max(host), max(min(whole), 1e-5)
    per_round = int(max(1, min(MOST_CALLS, budget_s / rounds / one_s)))
    stretch, failures, number, times = 1.5, 0, 0, list[float]()
    while len(times) < rounds:
        head_start = stretch * per_round * host_ms + 0.3
        gpu.synchronize()
        begun = gpu.now()
        gpu.sleep(head_start)
        first = gpu.mark()
        for _ in range(per_round):
            calls[number % len(calls)]()
            number += 1
        last = gpu.mark()
        is_proven, queued_ms = not gpu.is_over(first), 1e3 * (gpu.now() - begun)
        gpu.synchronize()
        if is_proven:
            times.append(gpu.between(first, last) / per_round)
            failures = 0
            continue
        failures += 1
        if failures == TRIES:
            raise UnprovenError(
                f"the GPU may have waited for the host: queueing {per_round} calls took {queued_ms:.2f} ms, their "
                f"head start only {head_start:.2f}; the call waits for the GPU or has more launches than its queue"
            )
        # A full queue holds the host back until the head start is over, so there are fewer calls, too.
        stretch, per_round = 2 * stretch, max(1, per_round // 2)
    return {**percentiles(times), "host_ms": host_ms, "head_start_ms": head_start, "calls_a_round": per_round}


def wall_milliseconds(
    calls: Sequence[Call], *, synchronize: Call | None = None, budget_s: float = 1.0, rounds: int = 15
) -> dict[str, float]:
    """Milliseconds a call between two clocks of the host round many calls, the last of them waited for."""
    synchronize = synchronize or (torch.cuda.synchronize if HAS_GPU else lambda: None)
    for call in calls:
        call()
    synchronize()
    begun = time.perf_counter()
    calls[0]()
    synchronize()
    one_s = max(time.perf_counter() - begun, 1e-5)
    per_round = int(max(1, min(200, budget_s / rounds / one_s)))
    times, number = [], 0
    for _ in range(rounds):
        begun = time.perf_counter()
        for _ in range(per_round):
            calls[number % len(calls)]()
            number += 1
        synchronize()
        times.append((time.perf_counter() - begun) / per_round * 1e3)
    return percentiles(times)


class Kernels(NamedTuple):
    """What the GPU did in one call, by the profiler; means over several calls.

    ``table`` has name, ms and launches of every kernel, the longest first; ``ms`` and ``launches`` are its sums;
    ``busy_ms`` is how long at least one kernel ran: the GPU's time without what it waited, whatever for.
    """

    table: list[dict[str, Any]]
    ms: float
    launches: float
    busy_ms: float


def profiled(calls: Sequence[Call], least: int = 5) -> Kernels:
    """The kernels of a call: means over all ``calls``, and over ``least`` calls at least."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    repeats = -(-least // len(calls))
    calls[0]()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for call in [*calls] * repeats:
            call()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    # Annotations lie over the kernels that they name.
    events = [e for e in events if not (getattr(e, "is_user_annotation", False) or e.name.startswith("Optimizer."))]
    return summed_up([(e.name, e.time_range.start, e.time_range.end) for e in events], repeats * len(calls))


def summed_up(spans: Iterable[tuple[str, float, float]], count: int) -> Kernels:
    """Name, begin and end in us of every kernel of ``count`` calls."""
    rows, busy_us, until = dict[str, dict[str, Any]](), 0.0, -math.inf
    for name, begin, end in sorted(spans, key=lambda span: span[1]):
        row = rows.setdefault(name, {"name": name, "ms": 0.0, "launches": 0.0})
        row["ms"] += (end - begin) / 1e3 / count
        row["launches"] += 1 / count
        busy_us += max(0.0, end - max(until, begin))
        until = max(until, end)
    table = sorted(rows.values(), key=lambda row: -row["ms"])
    ms, launches = (sum(row[name] for row in table) for name in ("ms", "launches"))
    return Kernels(table, ms, launches, busy_us / 1e3 / count)


def grouped(table: Iterable[dict[str, Any]], kinds: Mapping[str, str]) -> dict[str, float]:
    """ms of kernels by kind: of ``kinds`` (pattern by name) the first whose pattern is in the kernel's name."""
    groups = dict.fromkeys(kinds, 0.0)
    for kernel in table:
        groups[next(kind for kind, pattern in kinds.items() if re.search(pattern, kernel["name"]))] += kernel["ms"]
    return groups


def cross_check(gpu_ms: float, kernels_ms: float, launches: float) -> None:
    """Raise :class:`UnprovenError` if the GPU's time is more than its kernels and the gaps between them."""
    allowed = DRIFT * kernels_ms + GAP_MS * (launches + 1)
    if gpu_ms > allowed:
        raise UnprovenError(
            f"{gpu_ms:.4f} ms on the GPU, but its {launches:.0f} kernels take {kernels_ms:.4f}: it idled in between"
        )


def graphed(call: Call) -> Call:
    """Replays of ``call`` in a CUDA graph; the call itself without a GPU."""
    if not HAS_GPU:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(call: Call) -> int:
    """Memory a call needs on top of what is there."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@functools.cache
def copy_rate() -> float:
    """Bytes a second, read plus written, of a copy of 1 GB on the GPU."""
    source = torch.randn(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    return 8 * source.numel() / (gpu_milliseconds([lambda: target.copy_(source)])["median"] * 1e-3)
