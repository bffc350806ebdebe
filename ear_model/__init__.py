"""The EAR model of "Continuous Visual Autoregressive Generation via Score Maximization", training and sampling."""

from ear_model.config import ModelConfig, RunConfig, SamplingConfig, TrainConfig
from ear_model.ear import EAR

__all__ = ["EAR", "ModelConfig", "RunConfig", "SamplingConfig", "TrainConfig"]
