"""What turns a model's output into images."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ear_model.config import RunConfig
from ear_model.errors import RunError
from ear_model.plots import to_bytes
from ear_model.sampling.memory import DECODED_AT_A_TIME, halving
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

    def __call__(self, output: Tensor) -> Tensor:
        """Images of what the model sampled, on the CPU; latents are decoded a few at a time."""
        return self.on_device(output).cpu()

    @torch.no_grad()
    def on_device(self, output: Tensor) -> Tensor:
        """The same where they are decoded; nothing waits for that."""
        if self._tokenizer is None:
            return output
        parts = output.split(DECODED_AT_A_TIME)
        return torch.cat([self._tokenizer.decode(part.to(self.device)).float() for part in parts])

    @property
    def bytes_per_image(self) -> int:
        """About what decoding one image takes: six tensors of the widest at full resolution, in float32."""
        if self._tokenizer is None:
            return 0
        config = self._tokenizer.autoencoder.config
        return 6 * 4 * config.channels * max(config.multipliers[:2]) * self.image_size**2


class Bytes:
    """8-bit images of a model's outputs, which a GPU decodes beside what the current stream does next.

    Args:
        decoder: images ``[B, 1 or 3, H, W]`` in -1..1 of an output, such as :meth:`Decoder.on_device`.
        device: the model's.
    """

    def __init__(self, decoder: Callable[[Tensor], Tensor], device: torch.device) -> None:
        self._decoder, self._device, self._size = decoder, device, DECODED_AT_A_TIME
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead = 0 if self._stream is None else 1
        """Batches to begin before one is waited for."""

    def __call__(self, output: Tensor) -> Callable[[], Tensor]:
        """Begin with an output ``[B, channels, size, size]``; the result waits for its images, uint8
        ``[B, 3, H, W]`` on the CPU.

        Raises:
            RunError: from the result, for images that are not finite; or no memory for one.
        """
        if self._stream is None:
            levels, finite = self._levels(output)
            return lambda: _checked(levels, finite)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        output.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            levels, finite = (self._to_host(tensor) for tensor in self._levels(output))
            done = self._stream.record_event()

        def wait() -> Tensor:
            done.synchronize()
            return _checked(levels, finite)

        return wait

    def _levels(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """8-bit images, and whether they were finite."""

        def decode(size: int) -> tuple[Tensor, Tensor]:
            levels, finite = [], []
            for part in output.split(size):
                images = self._decoder(part)
                finite.append(images.isfinite().all())
                levels.append(to_bytes(images))
            return torch.cat(levels), torch.stack(finite).all()

        tried = min(self._size, len(output))
        result, fitting = halving(decode, tried, "decoding")
        if fitting < tried:
            self._size = fitting
        return result

    @staticmethod
    def _to_host(tensor: Tensor) -> Tensor:
        # Pinned memory goes back to torch, which waits for the copy before it gives it away again.
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def _checked(levels: Tensor, finite: Tensor) -> Tensor:
    if not bool(finite):
        raise RunError("the decoder makes images that are not finite; its weights are damaged")
    return levels
