"""The decoding loop, a pure function of model, labels and draws (docs/model.md, "Sampling").

Everything that depends on the schedule is a number of the host, so the loop never waits for the device and each
step has a shape known before it starts.
"""

import torch
from torch import Tensor

from ear_model.config import SamplingConfig
from ear_model.draws import Draws
from ear_model.model.masking import draw_orders, guidance_scale
from ear_model.sampling.causal import decode_causal
from ear_model.sampling.steps import Progress, SamplingModel, score_options, steps_of


def decode_tokens(
    model: SamplingModel,
    labels_B: Tensor,
    sampling: SamplingConfig,
    draws: Draws,
    progress: Progress | None = None,
) -> Tensor:
    """Tokens ``[B, L, T]`` in float32, every one predicted exactly once, in a random order per image or the model's.

    Raises:
        ValueError: a Halton order of a causal model.
    """
    if model.config.order != "masked":
        return decode_causal(model, labels_B, sampling, draws, progress)
    batch, num_tokens = labels_B.shape[0], model.config.num_tokens
    device, score = labels_B.device, model.score
    options = score_options(model, sampling)
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
