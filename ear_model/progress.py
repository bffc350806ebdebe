"""Progress of long work: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import time
from types import TracebackType

SECONDS_BETWEEN_LINES = 20


class Progress:
    """A tqdm bar, or lines where the output is no terminal.

    Args:
        total: units in all.
        done: units done before.
        unit: its name.
        quiet: show nothing.
    """

    def __init__(self, total: int, done: int, unit: str, *, quiet: bool = False) -> None:
        from tqdm import tqdm

        self.bar = tqdm(
            total=total, initial=done, unit=unit, disable=True if quiet else None, dynamic_ncols=True, smoothing=0.1
        )
        self.total, self.done, self.unit = total, done, unit
        self._lines = self.bar.disable and not quiet
        self._started, self._first, self._printed = time.perf_counter(), done, time.perf_counter()

    def update(self, count: int = 1, note: str = "") -> None:
        """``count`` more units are done."""
        self.done += count
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(count)
        now = time.perf_counter()
        if self._lines and now - self._printed > SECONDS_BETWEEN_LINES:
            rate = (self.done - self._first) / (now - self._started)
            left = (self.total - self.done) / rate
            print(
                f"{self.unit} {self.done}/{self.total}  {rate:.1f}/s  {left:.0f} s left  {note}".rstrip(), flush=True
            )
            self._printed = now

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
