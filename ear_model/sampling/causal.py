"""The decoding loop of causal models: one token a step, from cached keys and values (docs/model.md, "Orders")."""

import torch
from torch import Tensor

from ear_model.config import ModelConfig, SamplingConfig
from ear_model.draws import Draws
from ear_model.model.masking import guidance_scale
from ear_model.sampling.steps import Progress, SamplingModel, Step, score_options


def check_order(config: ModelConfig, sampling: SamplingConfig) -> None:
    """Raise ValueError where a causal model is to decode in another order than its own."""
    if config.order != "masked" and sampling.order == "halton":
        raise ValueError(
            f"order is 'halton' and the model's order is {config.order!r}; a causal model has its own order, "
            "give order 'random'"
        )


@torch.no_grad()
def decode_causal(
    model: SamplingModel,
    labels_B: Tensor,
    sampling: SamplingConfig,
    draws: Draws,
    progress: Progress | None = None,
) -> Tensor:
    """Tokens ``[B, L, T]`` in float32, in the model's order, of a model in eval mode.

    The class's and, where there is guidance, the null class's sequences stand one behind the other in one cache. The
    null class's are computed from the first guided step to the last. ``sampling.steps`` is not used.

    Raises:
        ValueError: ``sampling.order`` is "halton": the order is the model's own.
    """
    check_order(model.config, sampling)
    batch, num_tokens, prefix = labels_B.shape[0], model.config.num_tokens, model.config.class_tokens
    backbone, score = model.backbone, model.score
    options = score_options(model, sampling)
    tokens_BLT = torch.zeros(batch, num_tokens, score.token_size, device=labels_B.device)  # in the order

    def row_by_row() -> Tensor:
        return torch.empty_like(tokens_BLT).index_copy_(1, backbone.order_L, tokens_BLT)

    def images() -> Tensor:
        return model.tokenizer.decode(score.decode(row_by_row()))

    steps = [Step(number, num_tokens - number, num_tokens - number - 1, images) for number in range(num_tokens)]
    guided = {step.number for step in steps if sampling.guides(step.left, num_tokens)}
    sequences = batch * (2 if guided else 1)
    classes = backbone.embed_classes(labels_B)
    both = torch.cat([classes, backbone.null_class(batch)]) if guided else classes
    cache = backbone.new_cache(sequences)
    for step in steps if progress is None else progress(steps):
        number, is_guided = step.number, step.number in guided
        start = prefix + number - 1 if number else 0
        is_joint = is_guided and (number == 0 or number - 1 in guided)
        rows = sequences if is_joint else batch
        if number:
            inputs = backbone.embed_tokens(tokens_BLT[:, number - 1 : number], number - 1).repeat(
                2 if is_joint else 1, 1, 1
            )
        else:
            inputs = backbone.embed_prefix(both[:rows])
        hidden = backbone.extend(inputs, cache[:, :, :rows], start)
        hidden_RC, null_hidden_RC = hidden[:batch], hidden[batch:] if is_joint else None
        if is_guided and not is_joint:
            # Guidance begins here: the null class's sequences catch up.
            known = [backbone.embed_prefix(both[batch:]), backbone.embed_tokens(tokens_BLT[:, :number])]
            null_hidden_RC = backbone.extend(torch.cat(known, dim=1), cache[:, :, batch:], 0)
        scale = guidance_scale(sampling.guidance, sampling.guidance_schedule, num_tokens, step.keep)
        noise_RE = score.draw_noise(batch, 1, like=hidden, draws=draws, **options).flatten(0, 1)
        sampled_RT = score.sample(hidden_RC, null_hidden_RC, scale, sampling.temperature, noise_RE, **options)
        tokens_BLT[:, number] = sampled_RT
    return row_by_row()
