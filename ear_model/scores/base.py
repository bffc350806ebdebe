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

    def prepare(self, noise_RE: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
        """What can be computed of rows of noise before hidden states are known; its first dimension is R.

        The score's own affair, and read by its ``sample_prepared`` alone. ``out``: memory for it.
        """

    def prepared_bytes(self, rows: int) -> int:
        """Bytes of what ``prepare`` returns for this many rows."""

    def sample_prepared(
        self, hidden_RC: Tensor, null_hidden_RC: Tensor | None, guidance: float | Tensor, prepared_R: Tensor
    ) -> Tensor:
        """What ``sample`` returns, from rows of what ``prepare`` returned.

        ``guidance`` may be a tensor of one number on the device. Nothing waits for the device, and a CUDA graph may
        hold it.
        """
