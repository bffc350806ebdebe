"""What every score of the framework provides (paper section 3.2)."""

import importlib
from typing import Any

from torch import Tensor, nn

from ear_model.config import ModelConfig
from ear_model.draws import TORCH_DRAWS, Draws
from ear_model.score_names import score_entry


class Score(nn.Module):
    """A strictly proper score over tokens and the head that it trains, made from a ModelConfig.

    R rows, C backbone width, D token size, E numbers of noise for a token, T numbers of a token as the backbone
    reads it. All losses and samples are float32 whatever the parameters are in.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token_size = config.token_dim
        """T."""

    def encode(self, tokens_BLD: Tensor) -> Tensor:
        """Tokens as the backbone reads and :meth:`sample` gives them ``[B, L, T]``: themselves, if not overridden."""
        return tokens_BLD

    def decode(self, tokens_BLT: Tensor) -> Tensor:
        """The inverse of :meth:`encode`, ``[B, L, D]``."""
        return tokens_BLT

    def loss(self, hidden_RC: Tensor, targets_RT: Tensor, draws: Draws = TORCH_DRAWS) -> Tensor:
        """The mean loss over the rows, a scalar."""
        raise NotImplementedError

    def draw_noise(self, *shape: int, like: Tensor, draws: Draws = TORCH_DRAWS) -> Tensor:
        """What tokens of this shape ``[B, k]`` are made of, ``[B, k, E]`` on the device of ``like``.

        It and :meth:`sample` also take those fields of SamplingConfig, as keywords, that the score's entry in
        ``ear_model.score_names`` names.
        """
        raise NotImplementedError

    def sample(
        self,
        hidden_RC: Tensor,
        null_hidden_RC: Tensor | None,
        guidance: float,
        temperature: float,
        noise_RE: Tensor,
    ) -> Tensor:
        """One token ``[R, T]`` per row, a function of its arguments.

        ``null_hidden_RC`` is the hidden state under the null class where there is guidance. How the two are
        combined is the score's own affair: EAR mixes hidden states, MAR mixes predicted noise.
        """
        raise NotImplementedError

    def sampling_report(self) -> str:
        """What is to be said of the samples since the last call, a line without its end; nothing by default.

        It may wait for the device.
        """
        return ""

    def multiply_adds(self) -> float:
        """Of the matrix products of :meth:`loss`, for one row: a product with each matrix, if not overridden."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.ndim > 1)

    def kept_numbers(self) -> float:
        """Numbers that :meth:`loss` keeps for one row until the backward pass, about: likewise what is multiplied."""
        return sum(2 * parameter.shape[0] for parameter in self.parameters() if parameter.ndim > 1)


def make_score(config: ModelConfig) -> Any:
    """The score that a configuration names. Raises ValueError for an unknown one."""
    module, _, name = score_entry(config.score).path.partition(":")
    return getattr(importlib.import_module(module), name)(config)
