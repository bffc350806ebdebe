"""Errors of a run that the command line reports in one line."""


class RunError(RuntimeError):
    """What went wrong while a run was going on, not for a mistake in what was asked for."""

    on_every_process = False
    """Whether every process of a job raises it with the same message, so that one of them reports it."""
