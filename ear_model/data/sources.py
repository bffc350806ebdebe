"""The data set that a run names."""

from pathlib import Path

from ear_model.config import RunConfig
from ear_model.data.batches import TrainingData
from ear_model.data.cache import load_cache
from ear_model.data.digits import load_digits
from ear_model.data.npz import load_npz_cache


def load_training_data(config: RunConfig) -> TrainingData:
    """The data set that a run names. Raises ValueError if it is not there, damaged or does not fit."""
    if config.data == "digits":
        return load_digits()[0]
    if config.data in ("cache", "npz") and not config.data_path:
        raise ValueError(f"data {config.data!r} needs data_path, the directory of the cache")
    if config.data == "cache":
        return load_cache(Path(config.data_path), tokenizer=Path(config.tokenizer) if config.tokenizer else None)
    if config.data == "npz":
        return load_npz_cache(Path(config.data_path), tokenizer=Path(config.tokenizer) if config.tokenizer else None)
    raise ValueError(f"data {config.data!r} is unknown; use digits, cache or npz")
