"""Sampling that is watched while it goes on, and given up when nobody watches."""

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

from torch import Tensor

from ear_model.config import SamplingConfig
from ear_model.draws import ImageDraws
from ear_model.errors import RunError
from ear_model.sampling.engine import compute_dtype
from ear_model.sampling.preview import Preview
from ear_model.sampling.steps import SamplingModel, Step

SECONDS_BETWEEN_SIGNS = 0.5


class StoppedError(RunError):
    """Nobody waits for these images any more."""


@dataclass(frozen=True)
class View:
    """How far a sampling is."""

    done: int
    """Steps made."""
    steps: int
    """Of so many; 0 while it waits for another one to end."""
    images: Tensor | None
    """``[N, 1 or 3, H, W]`` in -1..1 on the CPU as far as known; None if there are none that were not seen."""
    seconds: float | None = None
    """Of the sampling and the decoding of its result, without those of the views; None before its end."""


class LiveSampler:
    """Samples in a thread of its own, one after the other.

    Args:
        model: in eval mode; nothing else may use it meanwhile.
        decoder: what makes images of its output: :class:`ear_model.sampling.decoder.Decoder`.
        precision: as for :meth:`ear_model.ear.EAR.sample`.

    Raises:
        ValueError: an unknown precision.
    """

    def __init__(self, model: SamplingModel, decoder: Callable[[Tensor], Tensor], *, precision: str = "auto") -> None:
        parameter = next(model.parameters())
        compute_dtype(precision, parameter)
        self.model, self.decoder, self.precision = model, decoder, precision
        self._device = parameter.device
        self._closing = threading.Event()
        self._worker = ThreadPoolExecutor(1, "sampling")

    def draw(
        self, labels: Tensor, setting: SamplingConfig, seed: int, *, every: int = 8
    ) -> Generator[View, None, None]:
        """Views of the sampling, some a second; the last one has the images of
        :func:`ear_model.sampling.images.sample_images`.

        A view that is overtaken by the next is left out. Closing the iterator ends the sampling at its next step.

        Args:
            labels: int64 ``[N]``.
            setting: how.
            seed: not negative, of any size.
            every: steps between images.

        Raises:
            ValueError: a seed, label or setting that makes no sense. RunError: what goes wrong in sampling.
            StoppedError: :meth:`close` was called.
        """
        draws = ImageDraws(seed, range(len(labels)))
        views: queue.SimpleQueue[View | None] = queue.SimpleQueue()
        left = threading.Event()
        progress = [0, 0]
        preview = Preview(lambda done, steps, images: views.put(View(done, steps, images)), self.decoder, every)

        def watched(steps: Iterable[Step]) -> Iterator[Step]:
            planned = list(steps)
            for done, step in enumerate(preview(planned)):
                self._go_on(left)
                progress[:] = done, len(planned)
                yield step

        def work() -> View:
            self._go_on(left)
            began = time.perf_counter()
            output = self.model.sample(
                labels.to(self._device), draws=draws, precision=self.precision, progress=watched, **asdict(setting)
            )
            images = self.decoder(output.cpu())
            return View(progress[1], progress[1], images, time.perf_counter() - began - preview.seconds)

        future: Future[View] = self._worker.submit(work)
        future.add_done_callback(lambda _: views.put(None))
        try:
            while not future.done() or not views.empty():
                try:
                    view = newest(views, SECONDS_BETWEEN_SIGNS)
                except queue.Empty:
                    view = View(progress[0], progress[1], None)
                if view is not None:
                    yield view
            yield future.result()
        except CancelledError:
            raise StoppedError("the server is stopping") from None
        finally:
            left.set()
            future.cancel()

    def close(self) -> None:
        """End all samplings at their next step, and wait for that."""
        self._closing.set()
        self._worker.shutdown(cancel_futures=True)

    def _go_on(self, left: threading.Event) -> None:
        if self._closing.is_set() or left.is_set():
            raise StoppedError("the server is stopping")


def newest(views: "queue.SimpleQueue[View | None]", seconds: float) -> View | None:
    """The last of what lies in the queue, once there is something. Raises queue.Empty after so long."""
    view = views.get(timeout=seconds)
    while not views.empty():
        view = views.get()
    return view
