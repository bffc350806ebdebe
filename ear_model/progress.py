"""Progress of long work: a bar on a terminal, a line now and then in a log file."""

import contextlib
import sys
import time

SECONDS_BETWEEN_LINES = 20


def say(line: str) -> None:
    """Print a line to the standard error, above a bar that is shown there."""
    from tqdm import tqdm

    with contextlib.suppress(OSError):
        tqdm.write(line, file=sys.stderr)


class Progress:
    """A tqdm bar, or lines where the output is no terminal. Nothing more is shown once the output is gone, as of a
    terminal that was closed: the work goes on.

    Args:
        total: units in all.
        done: units done before.
        unit: its name.
        quiet: show nothing.
        stays: leave the finished bar on the terminal.
    """

    def __init__(self, total: int, done: int, unit: str, *, quiet: bool = False, stays: bool = True) -> None:
        from tqdm import tqdm

        hidden = True if quiet else None
        self.bar = tqdm(
            total=total, initial=done, unit=unit, disable=hidden, leave=stays, dynamic_ncols=True, smoothing=0.1
        )
        self.total, self.done, self.unit = total, done, unit
        self._lines = self.bar.disable and not quiet
        self._started, self._first = time.perf_counter(), done
        self._printed: float | None = None

    def update(self, count: int = 1, note: str = "") -> None:
        """``count`` more units are done."""
        self.done += count
        try:
            self._show(count, note)
        except OSError:
            self.bar.disable, self._lines = True, False

    def _show(self, count: int, note: str) -> None:
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(count)
        now = time.perf_counter()
        ends = self.done >= self.total and self._printed is not None
        if self._lines and (ends or now - (self._printed or self._started) > SECONDS_BETWEEN_LINES):
            rate = (self.done - self._first) / (now - self._started)
            left = (self.total - self.done) / rate
            line = f"{self.unit} {self.done}/{self.total}  {rate:.1f}/s  {left:.0f} s left  {note}"
            print(line.rstrip(), flush=True)
            self._printed = now

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self.bar.close()
