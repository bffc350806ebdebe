"""SIGTERM, SIGHUP and Ctrl-C: the first one asks a command to end plainly, a second one ends it at once.

:func:`caught` is around every command. A signal raises :class:`Interrupted` where the command stands; files are
written to temporary names, so what is whole is kept. Work that ends better at a moment of its own, such as a step of
training, is done in :func:`deferred`, which looks at :func:`received`.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

from ear_model.processes import launched

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A signal asked this command to end.

    Args:
        number: of the signal.
        kept: what was done and is kept, in words; empty if the command's general words do.
    """

    def __init__(self, number: int, kept: str = "") -> None:
        super().__init__(number, kept)
        self.number, self.kept = number, kept


class _Process:
    """What this process was told. Signals belong to a process, and so does this."""

    received: int | None = None
    deferring = False
    catching = False


def received() -> int | None:
    """Number of the signal that asked this process to end; None if none did since :func:`caught` began."""
    return _Process.received


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Take the signals in this block, then leave them to who had them before.

    Signals that are ignored, as under `nohup`, stay so. Outside the main thread nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread() or _Process.catching:
        yield
        return
    _Process.received, _Process.deferring, _Process.catching = None, False, True
    before = {number: signal.getsignal(number) for number in SIGNALS}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    woken = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    try:
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, _handle)
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        signal.set_wakeup_fd(woken)
        os.close(writer)  # ends the thread
        _Process.catching = False


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Raise nothing in this block, which is to look at :func:`received` and end soon; at its end, raise."""
    outer, _Process.deferring = _Process.deferring, True
    try:
        yield
    finally:
        _Process.deferring = outer
    if _Process.received is not None and not outer:
        raise Interrupted(_Process.received)


def name(number: int) -> str:
    """Such as "SIGTERM"."""
    return signal.Signals(number).name


def _handle(number: int, frame: object) -> None:
    # A second one within a moment is the same one, by another way; a later one never comes here: _watch ends it all.
    if _Process.received is None:
        _Process.received = number
        if not _Process.deferring:
            raise Interrupted(number)


def _watch(reader: int) -> None:
    """End the process at a second signal, also while its main thread waits in a library that no handler runs in.

    `timeout` and schedulers signal a process and then its group, torchrun passes on what its processes had already:
    signals that come together count as one.
    """
    first, together = None, 1.0 if launched() else 0.2
    while word := os.read(reader, 1):
        if word[0] not in SIGNALS:
            continue
        now = time.monotonic()
        if first is None:
            first = now
        elif now - first > together:
            with contextlib.suppress(OSError):
                os.write(2, f"ear: a second signal, {name(word[0])}: ended at once\n".encode())
            os._exit(128 + word[0])
    os.close(reader)


def _leave_to_parent() -> None:
    """In a forked child: the parent handles the signals, and ends its children."""
    if _Process.catching:
        _Process.catching = False
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


os.register_at_fork(after_in_child=_leave_to_parent)
