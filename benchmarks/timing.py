"""Time on the GPU, time from Python, peak memory, and the card's copy rate."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone

import torch


def percentiles(values: list[float]) -> dict[str, float]:
    """median, p20 and p80."""
    ordered = sorted(values)
    pick = lambda q: ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]  # noqa: E731
    return {"median": statistics.median(ordered), "p20": pick(0.2), "p80": pick(0.8)}


def gpu_milliseconds(calls: list[Callable[[], object]], budget_s: float = 1.0, rounds: int = 15) -> dict[str, float]:
    """Milliseconds a call on the GPU.

    ``calls`` do the same on different inputs, in turn, so that inputs which would fit into the L2 cache are not found
    there. Each round lies between two events; a long sleep kernel in front lets the host run ahead, so that the GPU
    never waits for Python. Without a GPU: wall time.
    """
    if not torch.cuda.is_available():
        return wall_milliseconds(calls, budget_s, rounds)
    for call in calls:
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    calls[0]()
    torch.cuda.synchronize()
    one = max(time.perf_counter() - start, 1e-5)
    per_round = int(max(len(calls), min(100, budget_s / rounds / one)))
    times = []
    for _ in range(rounds):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The host needs up to 0.2 ms a call; 2e6 cycles are about a millisecond.
        torch.cuda._sleep(int(2e6 * min(0.25 * per_round, 30)))
        before.record()
        for index in range(per_round):
            calls[index % len(calls)]()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after) / per_round)
    return percentiles(times)


def wall_milliseconds(calls: list[Callable[[], object]], budget_s: float = 1.0, rounds: int = 15) -> dict[str, float]:
    """Milliseconds a call from Python, the GPU's work included where it is the longer of the two."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    for call in calls:
        call()
    synchronize()
    start = time.perf_counter()
    calls[0]()
    synchronize()
    one = max(time.perf_counter() - start, 1e-5)
    per_round = int(max(1, min(200, budget_s / rounds / one)))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for index in range(per_round):
            calls[index % len(calls)]()
        synchronize()
        times.append((time.perf_counter() - start) / per_round * 1e3)
    return percentiles(times)


def peak_bytes(call: Callable[[], object]) -> int:
    """Memory a call needs on top of what is there; 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_rate() -> float:
    """Bytes a second, read plus written, of a 1 GB copy on the device (or on the host)."""
    size = 1 << (28 if torch.cuda.is_available() else 24)
    source = torch.empty(size, device="cuda" if torch.cuda.is_available() else "cpu")
    target = torch.empty_like(source)
    return 8 * size / (gpu_milliseconds([lambda: target.copy_(source)])["median"] * 1e-3)


def environment() -> dict[str, str]:
    """GPU, versions, date and command, for every record."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "triton": triton_version,
        "python": sys.version.split()[0],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "commit": commit.stdout.strip(),
    }
