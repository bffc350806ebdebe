"""Sampling images of chosen classes from a trained model."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ear_model.config import SamplingConfig
from ear_model.draws import ImageDraws, check_seed
from ear_model.progress import Progress
from ear_model.sampling.decoder import Bytes
from ear_model.sampling.memory import halving
from ear_model.sampling.steps import SamplingModel


class ReleasingModel(SamplingModel, Protocol):
    """A model whose memory can be asked back."""

    def release(self) -> None: ...


def class_labels(classes: Sequence[int], num: int, num_classes: int) -> Tensor:
    """``num`` labels spread evenly over ``classes``, in their order.

    Raises:
        ValueError: no or unknown classes, or fewer than one image.
    """
    if num < 1:
        raise ValueError(f"num is {num}; it must be at least 1")
    if not classes:
        raise ValueError("no classes were given; name at least one")
    for label in classes:
        if not 0 <= label < num_classes:
            raise ValueError(f"class {label} is out of range; this model knows 0..{num_classes - 1}")
    return torch.tensor([classes[index * len(classes) // num] for index in range(num)])


def sample_images(
    model: ReleasingModel,
    labels: Tensor,
    *,
    seed: int = 0,
    batch_size: int = 64,
    indices: Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    """What the model makes, ``[N, channels, size, size]`` on the CPU: an image of every label.

    Image i is a function of the model, its label, the options, the seed and i alone: the batch size, other images,
    the device and the number of processes change it by rounding only. Where memory does not suffice for a batch, it
    is halved, which is said in a line.

    Args:
        model: the model.
        labels: int64 ``[N]``.
        seed: not negative, of any size.
        batch_size: images at a time, at most.
        indices: of the images; 0 .. N - 1 if None.
        **options: of :meth:`ear_model.ear.EAR.sample`: steps, guidance, guidance_schedule, temperature, precision.

    Raises:
        ValueError: a seed, batch size, label or option that makes no sense. RunError: samples that are not finite, or
            no memory for one image.
    """
    shape = (0, model.config.channels, model.config.image_size, model.config.image_size)
    numbers = range(len(labels)) if indices is None else indices
    parts = [
        output.cpu()
        for _, output in _outputs(model, labels, numbers, seed=seed, batch_size=batch_size, options=options)
    ]
    return torch.cat([torch.empty(shape), *parts])


def _outputs(
    model: ReleasingModel,
    labels: Tensor,
    indices: Sequence[int],
    *,
    seed: int,
    batch_size: int,
    options: dict[str, Any],
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Indices of each batch and what the model makes of them, on its device; arguments of :func:`sample_images`."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    check_seed(seed)
    if len(indices) != len(labels):
        raise ValueError(f"{len(indices)} indices were given for {len(labels)} labels")
    device = next(model.parameters()).device

    def sample(size: int) -> Tensor:
        numbers, own = indices[first : first + size], labels[first : first + size]
        # A GPU's graphs are of one batch size: the last batch repeats its last image rather than capture another.
        repeated = size - len(numbers) if device.type == "cuda" else 0
        draws = ImageDraws(seed, [*numbers, *[numbers[-1]] * repeated])
        own = torch.cat([own, own[-1:].expand(repeated)]).to(device)
        return model.sample(own, draws=draws, **options)[: len(numbers)]

    first, size = 0, even_size(len(indices), batch_size)
    while first < len(indices):
        output, fitting = halving(sample, size, "sampling", model.release)
        yield indices[first : first + fitting], output
        first += fitting
        if fitting < size:
            size = even_size(len(indices) - first, fitting)


def even_size(count: int, most: int) -> int:
    """Size of as few batches as ``most`` allows, the last of them as full as it can be."""
    batches = max(1, -(-count // most))
    return -(-count // batches)


@dataclass(frozen=True)
class Sampler:
    """Many 8-bit images of a model, batch after batch.

    Image i is that of :func:`sample_images`, so one that is there already need not be drawn.
    """

    model: ReleasingModel
    decoder: Callable[[Tensor], Tensor]
    """What makes images of the model's output: :meth:`ear_model.sampling.decoder.Decoder.on_device`."""
    setting: SamplingConfig
    seed: int = 0
    """The same seed gives the same images."""
    batch_size: int = 64
    """Images at a time, at most."""
    precision: str = "auto"
    """What is computed in, as :meth:`ear_model.ear.EAR.sample` takes it."""

    def batches(
        self, labels: Tensor, indices: Sequence[int] | None = None, *, done: int = 0, quiet: bool = False
    ) -> Iterator[tuple[Sequence[int], Tensor]]:
        """The indices of each batch, and its images, uint8 ``[b, 3, H, W]``.

        On a GPU a batch is decoded while the next is sampled.

        Args:
            labels: int64 ``[N]``, the classes of all images.
            indices: the images that are wanted; all if None.
            done: images that were there before, for the progress.
            quiet: show no progress.

        Raises:
            ValueError, RunError: as :func:`sample_images`; and RunError for decoded images that are not finite.
        """
        numbers = range(len(labels)) if indices is None else indices
        options = {"precision": self.precision, **asdict(self.setting)}
        outputs = _outputs(
            self.model,
            labels[list(numbers)],
            numbers,
            seed=self.seed,
            batch_size=self.batch_size,
            options=options,
        )
        begin = Bytes(self.decoder, next(self.model.parameters()).device)
        begun: deque[tuple[Sequence[int], Callable[[], Tensor]]] = deque()
        with Progress(done + len(numbers), done, "image", quiet=quiet, stays=False) as shown:

            def finish() -> tuple[Sequence[int], Tensor]:
                own, wait = begun.popleft()
                images = wait()
                shown.update(len(own))
                return own, images

            for own, output in outputs:
                begun.append((own, begin(output)))
                if len(begun) > begin.ahead:
                    yield finish()
            while begun:
                yield finish()
