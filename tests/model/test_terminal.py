"""What a user sees when the terminal, the disk or the place to write is not as it should be."""

import errno
import os
import pty
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ear_model import cli
from ear_model.errors import WriteError
from ear_model.files import require_writable, write_atomically
from ear_model.run_dir import checkpoint_steps
from tests.model.conftest import write_tree
from tests.model.real_runs import (
    LONG,
    PIXELS,
    has_steps,
    options,
    start,
    training,
    until,
    wait,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("survival")
    write_tree(folder / "tree", {"cat": 20, "dog": 20}, size=8)
    assert cli.main(["cache", str(folder / "tree"), "--out", str(folder / "cache"), *PIXELS]) == 0
    return folder / "cache"


@pytest.mark.parametrize("limit", [3_000, 30_000, 60_000])
def test_a_full_disk_in_training_is_one_line(cache, tmp_path, limit, capsys):
    """It names the file and the checkpoint that is kept; the run goes on when there is room."""
    out = tmp_path / "run"
    log = tmp_path / "log"
    assert wait(start(training(cache, out, *options(train__steps=2)), log), 60) == 0, log.read_text()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        status = cli.main(training(cache, out, "--resume", *options(train__steps=60)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    words = capsys.readouterr().err
    line = [each for each in words.splitlines() if each.startswith("ear: ")]
    assert len(line) == 1, words
    assert "Traceback" not in words
    assert "can't write" in line[0]
    assert str(out) in line[0]
    assert "the checkpoint of step 2 is kept" in line[0]
    assert not list(out.rglob(".tmp-*"))
    assert wait(start(training(cache, out, "--resume", *options(train__steps=6)), log), 60) == 0, log.read_text()


def test_full_disks_are_one_kind_of_error(tmp_path):
    """Whatever library writes: its own error for a full disk names the file and the reason."""

    def raises(error):
        def write(path):
            path.write_text("half")
            raise error

        return write

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    torchs = RuntimeError(
        "[enforce fail at inline_container.cc:861] . PytorchStreamWriter failed writing file data/3"
    )
    (tmp_path / "file").write_text("before")
    for error, reason in ((full, "No space left on device"), (torchs, "the disk takes no more")):
        with pytest.raises(WriteError, match=rf"can't write .*file: {reason}"):
            write_atomically(tmp_path / "file", raises(error))
    with pytest.raises(RuntimeError, match="another"):
        write_atomically(tmp_path / "file", raises(RuntimeError("another fault")))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]


def test_output_over_something_else_is_refused(tmp_path, capsys):
    """A device, a link or a directory in the place of a file; a device or file in the place of a directory."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    what = {"folder": "a directory", "link": "a link", "dangling": "a link", "pipe": "no regular file"}
    for name, kind in what.items():
        with pytest.raises(ValueError, match=rf"{name} is {kind}; give the name of a file"):
            require_writable(tmp_path / name)
    with pytest.raises(ValueError, match="/dev/null is no regular file"):
        require_writable(Path("/dev/null"))
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    for name in ("file", "pipe", "dangling", "/dev/null"):
        assert cli.main(["train", "digits", "--out", str(tmp_path / name)]) == 1
        assert "is no directory" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def on_terminal(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Exit status and output of the command line on a pseudo-terminal."""
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(folder)
        os.execv(sys.executable, [sys.executable, "-m", "ear_model.cli", *arguments])
    words = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:
            break
        if not part:
            break
        words += part
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), words.decode()


BAD = [
    (["train", "digits", "--train.stepz", "5"], "Unrecognized options: --train.stepz"),
    (["train", "digits", "--train.steps", "five"], "five"),
    (["train", "digits", "--train.precision", "x"], "precision"),
    (["sample"], "Missing from ear sample"),
    (["evaluate", "nowhere"], "nowhere is not a directory"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD)
def test_errors_on_a_terminal_are_one_plain_line(tmp_path, arguments, named):
    """No box, no colours, no more than the line."""
    status, words = on_terminal(arguments, tmp_path)
    assert status == 1
    assert words.startswith("ear: error: ")
    assert named in words
    assert words.count("\n") == 1
    assert words.rstrip("\r\n").isprintable()
    assert not set("│╭╰─╮╯") & set(words)


def test_a_closed_terminal_is_a_hangup(cache, tmp_path):
    """SIGHUP, and every write to the terminal fails: the checkpoint is written all the same."""
    process, terminal = pty.fork()
    out = tmp_path / "run"
    if process == 0:
        os.execv(sys.executable, [sys.executable, "-m", "ear_model.cli", *training(cache, out, *LONG)])
    until(lambda: has_steps(out))
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 129
    assert len(checkpoint_steps(out)) == 1
    assert not list(out.rglob(".tmp-*"))


def test_output_that_nobody_reads():
    """`ear --help | head -1`, and a full disk behind the standard output."""
    shell = f"{sys.executable} -m ear_model.cli --help"
    answer = subprocess.run(["bash", "-c", f"{shell} | true"], capture_output=True, text=True, timeout=60)
    assert answer.stderr == ""
    answer = subprocess.run(["bash", "-c", f"{shell} > /dev/full"], capture_output=True, text=True, timeout=60)
    assert (answer.returncode, answer.stderr) == (1, "ear: error: No space left on device\n")
