"""Options of a command from the command line, by its dataclass."""

import contextlib
import io
import itertools
import re
from typing import TypeVar

import tyro

Command = TypeVar("Command")


def parse_command(kind: type[Command], arguments: list[str], program: str, default: Command | None = None) -> Command:
    """The command's dataclass from its arguments; bad ones as a ValueError of one line."""
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words):
            if default is None:
                return tyro.cli(kind, args=arguments, prog=program)
            return tyro.cli(kind, args=arguments, prog=program, default=default)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{_one_line(words.getvalue())} (see `{program} --help`)") from None


_COLOUR = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")


def _one_line(framed: str) -> str:
    """The message in tyro's frame, up to its first rule, as one line; on a terminal tyro colours it."""
    framed = _COLOUR.sub("", framed)
    lines = [line.strip("│ ") for line in framed.splitlines() if not line.startswith(("╭", "╰"))]
    message = itertools.takewhile(lambda line: not line.startswith("─"), lines)
    return " ".join(" ".join(message).split()) or "unusable options"
