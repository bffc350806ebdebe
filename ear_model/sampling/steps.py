"""What every way of decoding shares: what it needs of a model, and the steps that ``progress=`` gets."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ear_model.config import ModelConfig, SamplingConfig
from ear_model.model.masking import unmasking_schedule
from ear_model.score_names import score_entry


class SamplingModel(Protocol):
    """What sampling needs of a model, such as :class:`ear_model.ear.EAR`."""

    config: ModelConfig
    backbone: Any
    score: Any
    tokenizer: Any

    def sample(self, *arguments: Any, **options: Any) -> Tensor: ...

    def parameters(self, *arguments: Any) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class Step:
    """A step of decoding, which what wraps the steps (``progress=``) gets one by one.

    Args:
        number: 0 for the first.
        left, keep: masked tokens before and after it.
        images: the images ``[B, channels, size, size]`` as far as they are known when it is called; tokens that
            are not known yet are 0. It waits for the device.
    """

    number: int
    left: int
    keep: int
    images: Callable[[], Tensor]


Progress = Callable[[Iterable[Step]], Iterable[Step]]


def steps_of(num_tokens: int, steps: int, images: Callable[[], Tensor], progress: Progress | None) -> Iterable[Step]:
    """The steps of :func:`unmasking_schedule` that predict something, in order, wrapped in ``progress``."""
    schedule = enumerate(unmasking_schedule(num_tokens, steps))
    found = [Step(number, left, keep, images) for number, (left, keep) in schedule if left > keep]
    return found if progress is None else progress(found)


def score_options(model: SamplingModel, sampling: SamplingConfig) -> dict[str, Any]:
    """Keywords for ``draw_noise`` and ``sample`` of the model's score."""
    return {name: getattr(sampling, name) for name in score_entry(model.config.score).sampling_options}
