"""Locks of directories and of files."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ear_model.files import DirectoryLock, writing

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


def test_a_file_is_written_by_one_process(tmp_path):
    """Killed or not, whoever had it is not waited for; another one is named."""
    code = (
        "import sys, time; from pathlib import Path; from ear_model.files import writing\n"
        "with writing(Path(sys.argv[1])): print('locked', flush=True); time.sleep(100)"
    )
    path = tmp_path / "new" / "judge.safetensors"
    arguments = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        named = r"process \d+ is writing .*judge.safetensors; wait for it, or end it"
        with pytest.raises(ValueError, match=named), writing(path):
            pass
        other.kill()
    with writing(path):
        with writing(path.with_name("other.safetensors")):
            pass
        with pytest.raises(ValueError, match="is writing"), writing(path):
            pass
    assert not list(path.parent.iterdir())
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link"), writing(path):
        pass


def test_one_after_the_other_never_two_at_a_time(tmp_path):
    """The lock's file goes with its owner; one that was opened before that is no lock."""
    inside: list[int] = []

    def work() -> None:
        for _ in range(50):
            while True:
                try:
                    with writing(tmp_path / "file"):
                        inside.append(1)
                        assert len(inside) == 1
                        inside.pop()
                        break
                except ValueError:
                    pass

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result()
