"""One file a score: what turns a hidden state into a training loss and into a sampled token."""

from ear_model.scores.base import Score, make_score
from ear_model.scores.energy import EnergyScore
from ear_model.scores.generator import GeneratorScore

__all__ = ["EnergyScore", "GeneratorScore", "Score", "make_score"]
