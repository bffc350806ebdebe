"""How many images fit the memory, and what is done when they do not."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from ear_model.config import ModelConfig
from ear_model.errors import RunError
from ear_model.progress import say
from ear_model.score_names import score_entry

Result = TypeVar("Result")

DECODED_AT_A_TIME = 16
"""Images that an autoencoder decodes at a time."""
ON_A_CPU = 16
"""Images at a time where there is no GPU: larger batches are not faster there, and an interruption costs more."""
FEWEST, MOST = 64, 1024
_BUSY = 64 * 2 * 320 * 768  # rows x width of 64 guided images of EAR-B, which keep an H200 busy
_USED_SHARE = 0.8  # of the free memory


def sampling_bytes(config: ModelConfig, *, guided: bool, itemsize: int) -> int:
    """Bytes that an image takes on a GPU while it is sampled.

    Args:
        config: the model.
        guided: whether there is guidance, which takes two sequences an image.
        itemsize: bytes of a number that is computed with.
    """
    width, inner = config.width, int(config.width * config.mlp_ratio)
    # Two residual streams in float32; two of query, key and value; norm, attention, projection, MLP before and after
    # its GELU, and its output.
    row = 2 * 4 * width + (2 * 3 * width + 4 * width + 2 * inner) * itemsize
    options = score_entry(config.score).options
    modulation = (3 * config.generator_depth + 2) * config.generator_width * itemsize
    token = 4 * 3 * config.token_dim + (modulation if "generator_depth" in options else 0)
    token += 4 * config.noise_dim if "noise_dim" in options else 0
    inputs = config.class_tokens + config.num_tokens
    sequences = 2 if guided else 1
    # The keys and values of a causal model.
    cache = 0 if config.order == "masked" else 2 * config.depth * (inputs - 1) * width * itemsize
    return sequences * (inputs * row + cache) + config.num_tokens * token


def busy_batch(config: ModelConfig, *, guided: bool) -> int:
    """Images at a time with which a large GPU is busy: 64 of the paper's models, more of smaller ones."""
    work = (2 if guided else 1) * (config.class_tokens + config.num_tokens) * config.width
    return max(FEWEST, min(MOST, _BUSY // work))


def batch_that_fits(free: int, fixed: int, per_image: int, most: int) -> int:
    """Images at a time, at least one.

    Args:
        free: bytes of memory that nothing is in.
        fixed: bytes taken at any batch size.
        per_image: bytes of each image.
        most: more are not faster.
    """
    return max(1, min(most, (int(free * _USED_SHARE) - fixed) // per_image))


def automatic_batch_size(
    config: ModelConfig, device: torch.device, *, guided: bool, itemsize: int, decoding_bytes: int, image_size: int
) -> int:
    """Images to sample at a time on a device that model and decoder are on.

    Args:
        config: the model.
        device: its own.
        guided, itemsize: as in :func:`sampling_bytes`.
        decoding_bytes: what decoding one image takes.
        image_size: height and width of an image.
    """
    if device.type != "cuda":
        return ON_A_CPU
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    # Two batches at a time are in memory as images, in float32 and as bytes.
    images = 2 * 3 * 5 * image_size**2
    per_image = sampling_bytes(config, guided=guided, itemsize=itemsize) + images
    return batch_that_fits(free, DECODED_AT_A_TIME * decoding_bytes, per_image, busy_batch(config, guided=guided))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that memory did not suffice, a GPU's or the host's."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    if isinstance(error, RuntimeError) and any(word in str(error) for word in words):
        return True
    # A capture that ran out of memory ends with another error.
    return error.__context__ is not None and is_out_of_memory(error.__context__)


def halving(
    work: Callable[[int], Result], size: int, what: str, free: Callable[[], object] = lambda: None
) -> tuple[Result, int]:
    """What ``work`` makes with ``size``, halved as often as memory does not suffice, and the size that did.

    Args:
        work: called with a size.
        size: to begin with.
        what: what is done, for messages, such as "sampling".
        free: frees what the failed attempt keeps.

    Raises:
        RunError: memory does not suffice for one.
    """
    while True:
        try:
            return work(size), size
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or ["no memory"])[0][:200]
        # Behind the except block: the error holds the frames, and with them the tensors, of the failed attempt.
        free()
        gc.collect()
        torch.cuda.empty_cache()
        if size == 1:
            raise RunError(f"memory does not suffice for {what} one image at a time: {reason}")
        say(f"memory does not suffice for {what} {size} images at a time; going on with {size // 2}")
        size //= 2
