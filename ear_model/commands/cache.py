"""``ear cache``: a tree of images into a cache of latents or pixels."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ear_model.commands.parsing import parse_command
from ear_model.data.config import CacheOptions
from ear_model.processes import job_rank, job_size


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
    options: Annotated[CacheOptions, tyro.conf.arg(name="")] = field(default_factory=CacheOptions)
    """What to cache, and how."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""


def run(arguments: list[str]) -> int:
    """Run the command; returns the exit status."""
    command = parse_command(Cache, arguments, "ear cache")
    _write(command)
    return 0


def _write(command: Cache) -> None:
    """Check everything, then write the cache and print what it holds."""
    from ear_model.data.cache_format import file_sha256
    from ear_model.data.cache_writer import CacheWriter
    from ear_model.devices import resolve_device
    from ear_model.tokenizers.config import KL16
    from ear_model.tokenizers.latent import load_latent_tokenizer

    device = resolve_device(command.device)
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
    ranks = {"rank": job_rank(), "world_size": job_size()}
    writer = CacheWriter(command.images, command.out, tokenizer, description, command.options, **ranks)
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
