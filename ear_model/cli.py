"""The command ``ear``: its commands, errors and exit status."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence

from ear_model.errors import RunError
from ear_model.processes import end_process, launched

# What the extra "train" installs; the kernels alone need none of it.
EXTRA = ("PIL", "matplotlib", "safetensors", "sklearn", "timm", "tqdm", "tyro")

# A module each in ear_model/commands, imported when called; what its ``run(arguments)`` raises, ``main`` reports.
COMMANDS = ("train", "convert", "cache", "train-tokenizer", "sample", "evaluate", "glyphs", "train-judge")

USAGE = """usage: ear COMMAND ...

  ear train digits --out RUN       train EAR on handwritten digits (a few minutes on a laptop)
  ear sample RUN --classes 3 7     sample a picture from a trained model
  ear evaluate RUN                 score a trained model
  ear convert FILE.pth --out RUN   make a run directory of a public EAR checkpoint, or the reverse
  ear cache IMAGES --out CACHE     encode a tree of images for training
  ear train-tokenizer IMAGES       train a small autoencoder on a tree of images
  ear glyphs --out TREE --num-per-class 1000
                                   draw an image tree of characters
  ear train-judge TREE --out JUDGE train a classifier that scores samples

`ear COMMAND --help` explains a command's options."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 (an error, reported in one line), 2 (usage) or 130 (Ctrl-C)."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        _check_installed()
        return _run(arguments)
    except KeyboardInterrupt as interrupt:
        if not _another_process_reports(interrupt):
            how = "`ear train --resume` goes on from the last checkpoint, other commands by the same options"
            print(f"ear: interrupted; {how}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, NotImplementedError, ImportError, RunError) as error:
        return _fail(error)


def _check_installed() -> None:
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{', '.join(missing)} can't be imported; the kernels need none of it, the command does: "
            'pip install "ear-kernels[train]"'
        )


def _fail(error: BaseException) -> int:
    if not _another_process_reports(error):
        print("ear: error: " + " ".join(str(error).split()), file=sys.stderr)
    return 1


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
