"""The EAR model of "Continuous Visual Autoregressive Generation via Score Maximization", training and sampling."""

from typing import TYPE_CHECKING, Any

from ear_model.config import ModelConfig, RunConfig, SamplingConfig, TrainConfig

if TYPE_CHECKING:
    from ear_model.ear import EAR

__all__ = ["EAR", "ModelConfig", "RunConfig", "SamplingConfig", "TrainConfig"]


def __getattr__(name: str) -> Any:
    """EAR, imported when it is asked for: it needs torch, for which the command line's help need not wait."""
    if name != "EAR":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ear_model.ear import EAR

    return EAR
