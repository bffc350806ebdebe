"""How a judge is made."""

from dataclasses import dataclass


@dataclass(frozen=True)
class JudgeConfig:
    """A judge's network and how it is trained."""

    channels: tuple[int, int, int, int] = (32, 64, 128, 256)
    """Channels of the four stages, one residual block each; the last is F, the number of features."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 128
    """Images a step."""
    lr: float = 4e-3
    """Peak learning rate of AdamW, warmed up and annealed to 0."""
    weight_decay: float = 0.05
    """AdamW weight decay."""
    shift: int = 4
    """Images are shifted by up to so many pixels in training; they are never flipped: b is not d."""
    seed: int = 0
    """Seed of weights, order and shifts."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if min(self.weight_decay, self.shift, self.seed) < 0:
            raise ValueError(f"weight_decay, shift and seed must not be negative: {self}")
        if len(self.channels) != 4 or min(self.channels) < 1:
            raise ValueError(f"channels are {self.channels}; give four positive numbers")
