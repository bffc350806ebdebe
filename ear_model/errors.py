"""Errors of a run that the command line reports in one line."""


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
