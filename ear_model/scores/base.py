"""What every score of the framework provides (paper section 3.2)."""

from typing import Protocol

from torch import Tensor

from ear_model.draws import Draws


class Score(Protocol):
    """A strictly proper score over tokens and the head that it trains. R rows, C backbone width, D token size."""

    def loss(self, hidden_RC: Tensor, targets_RD: Tensor, draws: Draws) -> Tensor:
        """The mean loss over the rows, a scalar."""

    def draw_noise(self, *shape: int, like: Tensor, draws: Draws) -> Tensor:
        """What tokens of this shape ``[B, k]`` are made of, ``[B, k, E]`` on the device of ``like``."""

    def sample(
        self, hidden_RC: Tensor, null_hidden_RC: Tensor | None, guidance: float, temperature: float, noise_RE: Tensor
    ) -> Tensor:
        """One token ``[R, D]`` per row, a function of its arguments.

        ``null_hidden_RC`` is the hidden state under the null class where there is guidance. How the two are
        combined is the score's own affair: EAR mixes hidden states, MAR mixes predicted noise.
        """
