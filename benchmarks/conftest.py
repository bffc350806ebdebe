"""``pytest benchmarks --benchmark-only``: every row of every file, and one table of them at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from benchmarks import harness
from benchmarks.clocks import HAS_GPU, Call

RECORDS = pytest.StashKey[list[dict]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []
    # Rows in processes of their own are in our table alone.
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")
    if not HAS_GPU:
        torch.set_num_threads(1)  # waiting threads would be timed on a machine that does other work, too


@pytest.fixture
def run_row(request: pytest.FixtureRequest, benchmark) -> Callable[[harness.Row], None]:
    """Measures a row, which pytest-benchmark sees as calls that are waited for one by one."""

    def run(row: harness.Row) -> None:
        def hand_over(calls: Sequence[Call]) -> None:
            def call() -> None:
                calls[0]()
                if HAS_GPU:
                    torch.cuda.synchronize()

            benchmark.pedantic(call, rounds=3)

        record = harness.measure(row, hand_over)
        request.config.stash[RECORDS].append(record)
        benchmark.group = row.case
        benchmark.extra_info.update(record)
        if "skipped" in record:
            pytest.skip(record["skipped"])
        if "failed" in record:
            pytest.fail(record["failed"], pytrace=False)

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["ear"] = harness.environment()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if records := config.stash[RECORDS]:
        terminalreporter.section("what ran, what was skipped and why")
        terminalreporter.write_line(harness.table(records))
