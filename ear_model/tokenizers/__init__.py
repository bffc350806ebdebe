"""Tokenizers: what turns images or latents into tokens and back."""

from ear_model.tokenizers.base import Tokenizer
from ear_model.tokenizers.pixels import PixelPatches

__all__ = ["PixelPatches", "Tokenizer"]
