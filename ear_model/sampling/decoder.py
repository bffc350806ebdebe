"""What turns a model's output into images."""

from pathlib import Path

import torch
from torch import Tensor

from ear_model.config import RunConfig
from ear_model.tokenizers.latent import load_latent_tokenizer


class Decoder:
    """What turns a model's output into images ``[B, 1 or 3, H, W]`` in -1..1.

    Args:
        config: the run; its ``tokenizer`` is loaded, or nothing if the model makes pixels.
        device: where the tokenizer decodes.

    Raises:
        ValueError: latents without a tokenizer, or a tokenizer file that is not there or does not fit.
    """

    def __init__(self, config: RunConfig, device: torch.device | str = "cpu") -> None:
        self.device, self._tokenizer = torch.device(device), None
        self.image_size = config.model.image_size
        """Height and width of the images."""
        if config.tokenizer:
            if not Path(config.tokenizer).is_file():
                raise ValueError(
                    f"the run's tokenizer {config.tokenizer} is not there; give another with --tokenizer"
                )
            self._tokenizer = load_latent_tokenizer(config.tokenizer, self.device)
            self.image_size *= self._tokenizer.downsampling
        elif config.model.channels not in (1, 3):
            raise ValueError(
                f"this model makes latents of {config.model.channels} channels and its run names no tokenizer; "
                f"give the autoencoder's weights with --tokenizer"
            )

    @torch.no_grad()
    def __call__(self, output: Tensor, batch_size: int = 32) -> Tensor:
        """Images of what the model sampled, on the CPU; latents are decoded ``batch_size`` at a time."""
        if self._tokenizer is None:
            return output
        parts = [self._tokenizer.decode(part.to(self.device)).float().cpu() for part in output.split(batch_size)]
        return torch.cat(parts)
