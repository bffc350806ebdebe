"""Errors of a run that the command line reports in one line."""

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


def shown(value: Any) -> str:
    """A value in a message: a few words, however large or deeply nested it is."""
    return " ".join(_SHORT.repr(value).split())[:200]


class RunError(RuntimeError):
    """What went wrong while a run was going on, not for a mistake in what was asked for."""

    on_every_process = False
    """Whether every process of a job raises it with the same message, so that one of them reports it."""


def words_of(error: OSError) -> str:
    """What an error of the system says: the file and the reason."""
    if not error.strerror:
        return str(error)
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


class WriteError(OSError):
    """A file that can't be written, named with the reason: a full disk, a quota, a device that fails."""
