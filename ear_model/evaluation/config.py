"""How a judge is made, and what a run is scored with."""

from dataclasses import dataclass
from pathlib import Path

from ear_model.config_checks import check_range, check_types


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
        if isinstance(self.channels, tuple) and len(self.channels) != 4:
            raise ValueError(f"channels are {self.channels}; give four positive numbers")
        check_types(self)
        check_range(self, "positive", "epochs", "batch_size", "lr")
        check_range(self, "at least 0", "weight_decay", "shift", "seed")
        if min(self.channels) < 1:
            raise ValueError(f"channels are {self.channels}; give four positive numbers")


@dataclass(frozen=True)
class ScoringConfig:
    """What a run is scored with."""

    num: int = 1000
    """Samples per setting, the same number of every class."""
    guidance: float | None = None
    """Guidance scale of the setting scored first; 1 if not given (the run's own with --fidelity)."""
    temperature: float | None = None
    """Temperature of the setting scored first; 1 if not given (the run's own with --fidelity)."""
    steps: int | None = None
    """Decoding steps. The run's own default if not given."""
    judge: Path | None = None
    """Judge of `ear train-judge`; needs --real. Digits need none."""
    real: Path | None = None
    """Image tree of held-out real images, for a judge, or for precision and recall beside --fidelity."""
    train_images: Path | None = None
    """Image tree of the training images, to look for copies; the run's own data if it is pixels."""
    fidelity: Path | None = None
    """Statistics file (.npz with mu, sigma) for FID and Inception Score by torch-fidelity; scores one setting."""
    batch_size: int = 64
    """Images sampled at a time; other sizes give other samples."""

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "at least 1", "num", "batch_size")
        if self.judge is not None and self.real is None:
            raise ValueError("--judge was given without --real TREE; a judge compares samples with real images")
        if self.real is not None and self.judge is None and self.fidelity is None:
            raise ValueError("--real was given without --judge FILE or --fidelity STATISTICS, which compare with it")
