"""``ear cache``: a tree of images into a cache of latents or pixels."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from ear_model.commands.parsing import parse_command
from ear_model.processes import job_rank, job_size, local_rank

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Cache:
    """Encode a tree of images (IMAGES/<class>/<file>) into a cache to train from.

    The same command goes on after an interruption. Under torchrun the processes share the work.
    """

    images: tyro.conf.Positional[Path]
    """Directory with a folder of images a class."""
    out: Path
    """Cache directory to write."""
    tokenizer: Literal["kl16", "autoencoder", "pixels"] = "kl16"
    """kl16 (the public weights), autoencoder (of `ear train-tokenizer`), or pixels, which keeps the images."""
    weights: Path | None = None
    """Weight file of the tokenizer: kl16.ckpt, or a .safetensors of `ear train-tokenizer`."""
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
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    command = parse_command(Cache, arguments, "ear cache")
    try:
        write_cache(command)
    except KeyboardInterrupt:
        print("ear: interrupted; the same command goes on from the last whole shard", file=sys.stderr)
        return 130
    return 0


def write_cache(command: Cache) -> None:
    """Check everything, then write the cache and print what it holds."""
    from ear_model.data.cache_format import file_sha256
    from ear_model.data.cache_writer import CacheOptions, CacheWriter
    from ear_model.tokenizers.config import KL16
    from ear_model.tokenizers.latent import load_latent_tokenizer

    options = CacheOptions(command.workers, command.batch_size, job_rank(), job_size())
    device = _device(command.device)
    tokenizer, weights, checksum = None, "", ""
    if command.tokenizer == "pixels":
        if command.weights is not None:
            raise ValueError(f"pixels need no weights; leave --weights {command.weights} out")
    elif command.weights is None:
        raise ValueError(f"tokenizer {command.tokenizer} needs --weights, such as kl16.ckpt")
    else:
        tokenizer = load_latent_tokenizer(command.weights, device)
        if command.tokenizer == "kl16" and tokenizer.autoencoder.config != KL16:
            raise ValueError(f"{command.weights} is another autoencoder than KL-16; use --tokenizer autoencoder")
        weights, checksum = command.weights.name, file_sha256(command.weights)
    description = {"tokenizer": command.tokenizer, "weights": weights, "weights_sha256": checksum}
    writer = CacheWriter(
        command.images,
        command.out,
        tokenizer,
        description,
        image_size=command.image_size,
        dtype=command.dtype,
        flips=command.flips,
        shard_size=command.shard_size,
        options=options,
    )
    print(
        f"{command.images}: {len(writer.tree):,} images of {len(writer.tree.classes)} classes on {device}", flush=True
    )
    manifest = writer.run()
    if manifest is None:
        print(f"{command.out}: this process's part is written; other parts are not yet")
        return
    size = sum(shard.size for shard in manifest.shards)
    print(
        f"{command.out}: {len(manifest):,} images as {manifest.key} {manifest.row_shape()} of {manifest.dtype} in "
        f"{len(manifest.shards)} shards, {size / 1e6:,.1f} MB"
    )


def _device(name: str) -> torch.device:
    import torch

    from ear_model.devices import resolve_device

    device = resolve_device(name)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", local_rank())
    return device
