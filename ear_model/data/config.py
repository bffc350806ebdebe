"""How a tree of images is cached."""

import os
from dataclasses import dataclass
from typing import Literal

from ear_model.config_checks import check_range


@dataclass(frozen=True)
class CacheOptions:
    """What is cached of images, and how they are worked through."""

    image_size: int = 256
    """Height and width that images are scaled and cropped to."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    """Numbers of the latents; pixels are always uint8."""
    flips: bool = True
    """Also encode every mirror image (pixels: mirror at random in training)."""
    workers: int = min(8, os.cpu_count() or 1)
    """Processes that decode images; 0 decodes in the main one."""
    batch_size: int = 64
    """Images encoded at once."""
    shard_size: int = 4096
    """Images of a shard, which is held in memory while it is made."""
    allow_empty: bool = False
    """Take folders without images as classes too."""

    def __post_init__(self) -> None:
        check_range(self, "from 0 to 1024", "workers")
        check_range(self, "at least 1", "image_size", "batch_size", "shard_size")
