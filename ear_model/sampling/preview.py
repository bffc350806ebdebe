"""Images while they form: what a page or a notebook shows of a sampling that goes on."""

import base64
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ear_model.plots import grid_picture, png_bytes
from ear_model.sampling.steps import Progress, Step

Show = Callable[[int, int, Tensor], None]
"""Gets how many steps are done, of how many, and images ``[B, channels, H, W]`` in -1..1 on the CPU, its own copy."""

PICTURE_WIDTH = 1024
"""Pixels that a grid of small images is enlarged to, about."""


class Preview:
    """Shows the images every few steps and after the last one, as ``progress=`` of :meth:`ear_model.ear.EAR.sample`.

    Tokens that are not known yet are 0, a middle grey in a model of pixels.

    Args:
        show: what shows them. What it raises ends the sampling.
        decoder: what makes images of the model's output, such as :class:`ear_model.sampling.decoder.Decoder`;
            needed for a model of latents.
        every: steps from one showing to the next.

    Raises:
        ValueError: fewer than one step.
    """

    def __init__(self, show: Show, decoder: Callable[[Tensor], Tensor] | None = None, every: int = 8) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it must be at least 1")
        self.show, self.decoder, self.every = show, decoder, every
        self.seconds = 0.0
        """What decoding and showing took in the last sampling; the rest of its time is the sampling's own."""

    def __call__(self, steps: Iterable[Step]) -> Iterator[Step]:
        self.seconds = 0.0
        planned = list(steps)
        for done, step in enumerate(planned, start=1):
            yield step
            # Whoever asks for the next step has made this one.
            if done % self.every == 0 or done == len(planned):
                self._show(done, len(planned), step.images())

    def _show(self, done: int, total: int, output: Tensor) -> None:
        # The memory is that of the sampling, which goes on writing; the copy waits for the device.
        device, images = output.device.type, output.to("cpu", torch.float32, copy=True)
        began = time.perf_counter()
        with torch.autocast(device, enabled=False):
            self.show(done, total, images if self.decoder is None else self.decoder(images))
        self.seconds += time.perf_counter() - began


def grid_columns(count: int) -> int:
    """Columns of a grid of ``count`` images that is about as high as wide, at most 8."""
    return next((columns for columns in range(1, 8) if columns * columns >= count), 8)


def grid_png(images: Tensor) -> bytes:
    """A PNG file of images ``[N, 1 or 3, H, W]`` in -1..1 in a grid."""
    columns = grid_columns(len(images))
    return png_bytes(grid_picture(images, columns, min_tile=PICTURE_WIDTH // columns))


def notebook_preview(decoder: Callable[[Tensor], Tensor] | None = None, every: int = 8) -> Progress:
    """Shows the images as they form in Jupyter, in one output that changes::

        model.sample(labels, progress=notebook_preview())

    Args:
        decoder, every: as for :class:`Preview`.

    Raises:
        ImportError: IPython is not installed.
    """
    try:
        from IPython.display import HTML, DisplayHandle
    except ImportError as error:
        raise ImportError("notebook_preview needs IPython, which Jupyter has: pip install ipython") from error

    def progress(steps: Iterable[Step]) -> Iterator[Step]:
        handle, began = DisplayHandle(), time.perf_counter()

        def show(done: int, total: int, images: Tensor) -> None:
            spent = time.perf_counter() - began - preview.seconds
            note = f"{done} of {total} steps, {1000 * spent:.0f} ms, {1000 * spent / len(images):.1f} ms an image"
            png = base64.b64encode(grid_png(images)).decode()
            handle.update(HTML(f'<img src="data:image/png;base64,{png}" style="width: 640px"><br>{note}'))

        preview = Preview(show, decoder, every)
        handle.display(HTML("sampling ..."))
        return preview(steps)

    return progress
