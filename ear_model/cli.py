"""The command ``ear``: its commands, errors and exit status."""

import contextlib
import errno
import importlib
import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from ear_model import signals
from ear_model.errors import RunError, WriteError, words_of
from ear_model.processes import end_process, end_with_parent, launched

EXPECTED = (ValueError, TypeError, OSError, NotImplementedError, ImportError, RunError)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

# What the extra "train" installs; the kernels alone need none of it.
EXTRA = ("PIL", "matplotlib", "safetensors", "sklearn", "timm", "tqdm", "tyro")

# A module each in ear_model/commands, imported when called; what its ``run(arguments)`` raises, ``main`` reports.
COMMANDS = (
    *("train", "convert", "cache", "train-tokenizer", "train-codebook"),
    *("sample", "evaluate", "glyphs", "mnist", "train-judge", "serve", "study"),
)

USAGE = """usage: ear COMMAND ...

  ear train digits --out RUN       train EAR on handwritten digits (a few minutes on a laptop)
  ear sample RUN --classes 3 7     sample a picture from a trained model
  ear serve RUN                    sample on a local web page
  ear evaluate RUN                 score a trained model
  ear convert FILE.pth --out RUN   make a run directory of a public EAR checkpoint, or the reverse
  ear cache IMAGES --out CACHE     encode a tree of images for training
  ear train-tokenizer IMAGES       train a small autoencoder on a tree of images
  ear train-codebook CACHE         train the codebook of a categorical model
  ear glyphs --out TREE --num-per-class 1000
                                   draw an image tree of characters
  ear mnist --out TREE             write 5,000 images of MNIST as an image tree
  ear train-judge TREE --out JUDGE train a classifier that scores samples
  ear study NAME                   ask one of the paper's findings again with small runs

`ear COMMAND --help` explains a command's options."""


# What is kept of a command that a signal, or a disk without room, ended.
KEPT = {
    "train": "`--resume` goes on from the last checkpoint",
    "cache": "whole shards are kept, the same command goes on",
    "train-tokenizer": "the same command goes on from the last .partial file",
    "train-codebook": "no codebook was written",
    "sample": "images of --images-out and --npz are kept, the same command goes on",
    "glyphs": "whole images are kept, the same command goes on",
    "mnist": "whole images are kept, the same command goes on",
    "convert": "nothing was converted",
    "evaluate": "no scores were written",
    "train-judge": "no judge was written",
    "serve": "the page is closed",
    "study": "finished runs and checkpoints are kept, the same command goes on",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0; 1: an error, reported in one line; 2: usage; 143, 129, 130: ended by SIGTERM, SIGHUP, Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    kept = KEPT.get(arguments[0] if arguments else "", "")
    try:
        with signals.caught():
            if "TORCHELASTIC_RUN_ID" in os.environ:
                # As if torchrun had passed it on: without it nobody ends this process.
                end_with_parent(os.getppid(), signal.SIGTERM)
            _check_installed()
            status = _run(arguments)
            sys.stdout.flush()
        return status
    except KeyboardInterrupt as interrupt:
        return _ended(signals.received() or signal.SIGINT, interrupt, getattr(interrupt, "kept", "") or kept)
    except Exception as error:
        number = signals.received()
        if number is not None:  # it comes of the signal: a worker that ended, a terminal that is gone
            return _ended(number, KeyboardInterrupt(), kept)
        return _fail(error, kept)


def _ended(number: int, interrupt: KeyboardInterrupt, kept: str) -> int:
    if not _another_process_reports(interrupt):
        what = "interrupted" if number == signal.SIGINT else f"ended by {signals.name(number)}"
        _say(f"ear: {what}; {kept}")
    return 128 + number


def _check_installed() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{', '.join(missing)} can't be imported; the kernels need none of it, the command does: "
            'pip install "ear-kernels[train]"'
        )


def _fail(error: Exception, kept: str) -> int:
    # The reader of a closed pipe, such as `head`, has what it wanted.
    if not isinstance(error, BrokenPipeError) and not _another_process_reports(error):
        _say(f"ear: error: {_words(error, kept)}")
    try:
        sys.stdout.flush()
    except OSError:  # what can't be written must not fail once more when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _words(error: Exception, kept: str) -> str:
    """What an error says, as a user needs it."""
    if isinstance(error, OSError):
        is_full = isinstance(error, WriteError) or error.errno in FULL
        return f"{words_of(error)}; {kept}" if is_full and kept else words_of(error)
    if isinstance(error, EXPECTED):
        return str(error)
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "allocate memory" in str(error):
        return f"there is not enough memory for this ({_first_line(error)})"
    if os.environ.get("EAR_TRACEBACK"):
        traceback.print_exception(error)
    where = f"{type(error).__name__}: {_first_line(error)}"
    return f"{where} (a fault of this program; EAR_TRACEBACK=1 in the environment shows where)"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _say(line: str) -> None:
    """One line on the standard error, if that still is there."""
    plain = "".join(each if each.isprintable() else repr(each)[1:-1] for each in " ".join(line.split()))
    with contextlib.suppress(OSError, ValueError):
        print(plain, file=sys.stderr, flush=True)


def _another_process_reports(error: BaseException) -> bool:
    """Whether another process of a `torchrun` job reports the same; without one torch need not be imported."""
    if not launched():
        return False
    from ear_model.training.distributed import another_process_reports

    return another_process_reports(error)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        raise ValueError(f"unknown command {command!r}; use one of {', '.join(COMMANDS)}")
    return importlib.import_module(f"ear_model.commands.{command.replace('-', '_')}").run(rest)


if __name__ == "__main__":
    end_process(main())
