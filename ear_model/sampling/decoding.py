"""The decoding loop, a pure function of model, labels and draws (docs/model.md, "Sampling").

Everything that depends on the schedule is a number of the host, so the loop never waits for the device and each
step has a shape known before it starts.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ear_model.config import ModelConfig, SamplingConfig
from ear_model.draws import Draws
from ear_model.model.masking import draw_orders, guidance_scale, unmasking_schedule
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


def decode_tokens(
    model: SamplingModel,
    labels_B: Tensor,
    sampling: SamplingConfig,
    draws: Draws,
    progress: Progress | None = None,
) -> Tensor:
    """Tokens ``[B, L, T]`` in float32, every one predicted exactly once in a random order per image."""
    batch, num_tokens = labels_B.shape[0], model.config.num_tokens
    device, score = labels_B.device, model.score
    options = {name: getattr(sampling, name) for name in score_entry(model.config.score).sampling_options}
    tokens_BLT = torch.zeros(batch, num_tokens, score.token_size, device=device)
    orders_BL = draw_orders(sampling.order, batch, num_tokens, device, draws)
    ranks_BL = orders_BL.argsort(dim=-1)  # the rank of a token is its place in the order; high ranks come first
    classes = model.backbone.embed_classes(labels_B)
    both = torch.cat([classes, model.backbone.null_class(batch)])

    def images() -> Tensor:
        return model.tokenizer.decode(score.decode(tokens_BLT))

    for step in steps_of(num_tokens, sampling.steps, images, progress):
        left, keep = step.left, step.keep
        masked_BL = ranks_BL < left
        predicted_Bk = orders_BL[:, keep:left]
        if sampling.guides(left, num_tokens):
            hidden = model.backbone(tokens_BLT.repeat(2, 1, 1), masked_BL.repeat(2, 1), both, num_masked=left)
            hidden_RC, null_hidden_RC = (_gather_tokens(half, predicted_Bk).flatten(0, 1) for half in hidden.chunk(2))
        else:
            hidden = model.backbone(tokens_BLT, masked_BL, classes, num_masked=left)
            hidden_RC, null_hidden_RC = _gather_tokens(hidden, predicted_Bk).flatten(0, 1), None
        scale = guidance_scale(sampling.guidance, sampling.guidance_schedule, num_tokens, keep)
        noise_RE = score.draw_noise(batch, left - keep, like=hidden, draws=draws, **options).flatten(0, 1)
        sampled_RT = score.sample(hidden_RC, null_hidden_RC, scale, sampling.temperature, noise_RE, **options)
        index = predicted_Bk.unsqueeze(-1).expand(-1, -1, tokens_BLT.shape[-1])
        tokens_BLT.scatter_(1, index, sampled_RT.unflatten(0, (batch, left - keep)))
    return tokens_BLT


def _gather_tokens(values_BLC: Tensor, positions_Bk: Tensor) -> Tensor:
    """``values_BLC`` at the given positions, ``[B, k, C]``."""
    return values_BLC.gather(1, positions_Bk.unsqueeze(-1).expand(-1, -1, values_BLC.shape[-1]))
