"""The lock of a directory."""

import subprocess
import sys
from pathlib import Path

import pytest

from ear_model.files import DirectoryLock

ROOT = Path(__file__).parents[2]


def test_a_lock_ends_with_its_process(tmp_path):
    """So the main process waits for others that work, and not for dead ones."""
    code = (
        "import sys, time; from pathlib import Path; from ear_model.files import DirectoryLock\n"
        "lock = DirectoryLock(Path(sys.argv[1]), shared=True); print('locked', flush=True); time.sleep(100)"
    )
    with DirectoryLock(tmp_path) as lock:
        lock.share()
        arguments = [sys.executable, "-c", code, str(tmp_path)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=ROOT) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"locked\n"
            with pytest.raises(ValueError, match=r"process \d+ is writing in"):
                DirectoryLock(tmp_path)
            other.kill()
            lock.wait_for_others()
    with DirectoryLock(tmp_path):
        pass
