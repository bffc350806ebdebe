"""What every tokenizer provides."""

from typing import Protocol

from torch import Tensor


class Tokenizer(Protocol):
    """Images to tokens ``[B, L, D]`` and back."""

    num_tokens: int
    """L, tokens of an image."""
    token_dim: int
    """D, numbers in a token."""

    def encode(self, images: Tensor) -> Tensor:
        """Images ``[B, channels, height, width]`` to tokens ``[B, L, D]``."""
        ...

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, L, D]`` to images ``[B, channels, height, width]``."""
        ...
