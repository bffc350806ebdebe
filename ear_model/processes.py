"""What `torchrun` says of this process, in environment variables; processes that end with the one they serve."""

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from typing import Any, NoReturn

from ear_model.errors import RunError

# torchrun ends the others as soon as one process ends; the main one is to report the error first.
MAIN_REPORTS_SECONDS = 2.0


def launched() -> bool:
    """Whether `torchrun`, or what sets the same environment variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ


def job_rank() -> int:
    """This process's number in the job, from 0."""
    return int(os.environ.get("RANK", "0"))


def job_size() -> int:
    """Number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def end_process(status: int) -> NoReturn:
    """End this process with ``status``; one that torchrun started without the interpreter's own shutdown.

    After an error that would wait for collectives that can't end. After success torch's threads abort in it now and
    then (torch 2.15, FSDP over gloo: 3 of 9 jobs, all work done), and torchrun reports a failed job.
    """
    if launched():
        if status != 0 and job_rank() != 0:
            time.sleep(MAIN_REPORTS_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when the one that started it ends, however that ends (Linux).

    Args:
        parent: the process that started this one; if it has ended already, so does this.
        number: the signal.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, int(number), 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def begin_worker(parent: int, *_: object) -> None:
    """To be called first in a worker process: it ends with its parent, which Ctrl-C and SIGHUP are for."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _print_but_broken_connections
    end_with_parent(parent)


def _print_but_broken_connections(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """In the place of sys.excepthook, which a thread of multiprocessing calls when the parent hangs up on it in the
    middle of a tensor, because it ends."""
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)


def worker_initializer() -> Callable[..., None]:
    """:func:`begin_worker` for the workers that this process starts, such as a DataLoader's ``worker_init_fn``."""
    return partial(begin_worker, os.getpid())


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """So many processes that end with this one. After an error or a signal only what they are at is finished.

    Raises:
        RunError: one of them was killed.
    """
    # Not forked: the caller may have started threads or a GPU.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=worker_initializer())
    try:
        yield pool
    except BrokenProcessPool as error:
        raise RunError("a worker process was killed, perhaps for memory; the same command goes on") from error
    finally:
        pool.shutdown(cancel_futures=True)
