"""Damaged files of every kind that the product reads: refused in one line that names the file, or read as they were.

`pytest -m soak tests/model/test_mutated_files.py` tries EAR_MUTATIONS of them (2,000), each in a process of its own.
"""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.conftest import SESSION_SEED
from tests.model import mutations


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    mutations.make_folder(folder)
    return folder, mutations.baseline(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("index", range(len(mutations.KINDS)), ids=[kind.file for kind in mutations.KINDS])
def test_damaged_files_are_refused_or_read_as_they_were(folder, index) -> None:
    """In this process, fresh mutations in every run; a whole file still reads as before."""
    where, expected = folder
    outcomes = Counter()
    for turn in range(5):
        number = (SESSION_SEED % 1_000_000 + turn) * len(mutations.KINDS) + index
        outcome = mutations.attempt(number, where, expected[index])
        assert not outcome.startswith("FAULT"), f"mutation {number}: {outcome}"
        outcomes[outcome] += 1
    assert sum(outcomes.values()) == 5
    assert mutations.same(mutations.KINDS[index].read(where), expected[index])


def _tried(folder, first: int, count: int, capsys) -> dict:
    """The outcomes by file of mutations in processes of their own, printed."""
    command = [sys.executable, "-m", "tests.model.mutations", str(folder), str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + count * mutations.SECONDS)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    with capsys.disabled():
        total = sum((Counter(counts) for counts in report["counts"].values()), Counter())
        print(f"\n{total.total()} mutated files from {first}: {dict(total)}")
    assert report["faults"] == []
    return report["counts"]


@pytest.mark.slow
def test_damaged_files_in_processes_and_by_commands(tmp_path, capsys) -> None:
    """No signal, no hang of 20 s, no more than 4 GiB; one in four through ``ear``."""
    counts = _tried(tmp_path, SESSION_SEED % 10**9, 4 * len(mutations.KINDS), capsys)
    assert all(sum(outcomes.values()) == 4 for outcomes in counts.values())


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_thousands_of_damaged_files(tmp_path, capsys) -> None:
    count = int(os.environ.get("EAR_MUTATIONS", "2000"))
    counts = _tried(tmp_path, SESSION_SEED % 10**9, count, capsys)
    assert sum(sum(outcomes.values()) for outcomes in counts.values()) == count
    assert all(outcomes.get("refused") for name, outcomes in counts.items() if "verified" not in name)
