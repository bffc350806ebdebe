"""What a ``checkpoint-last.pth`` of the public EAR code says, in our words (docs/model.md, "Public files").

The file is a dict of ``model`` and ``model_ema`` (state dicts with the public keys), ``optimizer`` (the state of an
AdamW), ``epoch`` (the last finished one), ``scaler`` and ``args`` (an argparse.Namespace).
"""

import argparse
import math
import pickle
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ear_model.config import ModelConfig, RunConfig, TrainConfig
from ear_model.model.weights import our_key
from ear_model.presets import MODELS

PUBLIC_CLASS_TOKENS = 64
# Arguments of the public program that are fields of ours as they stand.
MODEL_ARGUMENTS = {
    "attn_dropout": "attention_dropout",
    "proj_dropout": "dropout",
    "alpha": "alpha",
    "mask_ratio_min": "min_mask_ratio",
    "label_drop_prob": "label_dropout",
}
TRAIN_ARGUMENTS = {
    "train_temperature": "tau",
    "accumulation_steps": "accumulate",
    "lr": "lr",
    "score_lrscale": "generator_lr_scale",
    "weight_decay": "weight_decay",
    "grad_clip": "clip",
    "ema_rate": "ema",
    "seed": "seed",
}


@dataclass(frozen=True)
class PublicCheckpoint:
    """What a ``checkpoint-last.pth`` holds; tensors by our names, in the file's order."""

    weights: dict[str, Tensor]
    averages: dict[str, Tensor] | None
    optimizer: dict[str, Any] | None
    epoch: int
    scaler: dict[str, Any] | None
    args: dict[str, Any]


def read_public(path: Path) -> PublicCheckpoint:
    """Read a checkpoint of the public EAR code. Nothing in it is executed.

    Raises:
        ValueError: not there, damaged, a pickle of more than tensors, numbers and a Namespace, or not of EAR.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there; give a checkpoint-last.pth or a run directory")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        unsafe = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), "")
        if unsafe:
            raise ValueError(f"{path} is refused: it asks to run code on loading ({unsafe[:150]})") from error
        raise ValueError(f"{path} is truncated or no torch file") from error
    except Exception as error:
        raise ValueError(f"{path} is truncated or no torch file ({type(error).__name__})") from error
    if not isinstance(content, dict) or not _is_state_dict(content.get("model")):
        raise ValueError(f"{path} has no state dict 'model'; a checkpoint-last.pth of the public EAR code has one")
    model = content["model"]
    if any(key.startswith(("diffloss.", "encoder_blocks.")) for key in model):
        raise ValueError(f"{path} holds a MAR model (encoder, diffusion head); only EAR checkpoints can be converted")
    if not any(key.startswith("scoreloss.net.") for key in model):
        raise ValueError(f"{path} has no generator (no key begins with scoreloss.net.); it is no EAR checkpoint")
    averages = content.get("model_ema")
    if averages is not None and not (_is_state_dict(averages) and averages.keys() == model.keys()):
        raise ValueError(f"{path}: model_ema has other tensors than model")
    args = content.get("args")
    values = vars(args) if isinstance(args, argparse.Namespace) else {}
    return PublicCheckpoint(
        weights=_ours(model),
        averages=None if averages is None else _ours(averages),
        optimizer=content.get("optimizer"),
        epoch=int(content.get("epoch", 0)),
        scaler=content.get("scaler"),
        args=values,
    )


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def _ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {our_key(key): tensor for key, tensor in tensors.items()}


def infer_model(weights: dict[str, Tensor], args: dict[str, Any], num_heads: int | None, where: str) -> ModelConfig:
    """The architecture, from the tensors' shapes; what no shape shows from ``args``, or the paper's value.

    Raises:
        ValueError: tensors missing, or a size whose number of heads is not known.
    """
    try:
        width = weights["backbone.fake_latent"].shape[1]
        token_dim = weights["backbone.z_proj.weight"].shape[1]
        positions = weights["backbone.decoder_pos_embed_learned"].shape[1]
        num_classes = weights["backbone.class_emb.weight"].shape[0]
        hidden = weights["backbone.decoder_blocks.0.mlp.fc1.weight"].shape[0]
        generator_width, noise_dim = weights["score.generator.noise_embed.weight"].shape
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{where} is no EAR checkpoint: {error} is missing or has another shape") from error
    depth = _count(weights, "backbone.decoder_blocks.")
    class_tokens = int(args.get("buffer_size", PUBLIC_CLASS_TOKENS))
    patch_size = int(args.get("patch_size", 1))
    side = math.isqrt(max(0, positions - class_tokens))
    if side < 1 or side * side + class_tokens != positions or token_dim % patch_size**2:
        raise ValueError(
            f"{where}: {positions} positions are not {class_tokens} class tokens and a square of image tokens "
            f"of {token_dim} numbers in patches of {patch_size} x {patch_size}"
        )
    if num_heads is None:
        known = {(model.width, model.depth): model.num_heads for model in MODELS.values()}
        if (width, depth) not in known:
            raise ValueError(
                f"{where}: width {width} and depth {depth} are none of EAR-B, L, H, and no tensor shows the number "
                "of attention heads; give --num-heads"
            )
        num_heads = known[width, depth]
    return ModelConfig(
        image_size=side * patch_size,
        channels=token_dim // patch_size**2,
        patch_size=patch_size,
        num_classes=num_classes,
        width=width,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=hidden / width,
        class_tokens=class_tokens,
        generator_width=generator_width,
        generator_depth=_count(weights, "score.generator.res_blocks."),
        noise_dim=noise_dim,
        num_samples=2 * int(args.get("score_batch_mul", ModelConfig.num_samples // 2)),
        **_given(args, MODEL_ARGUMENTS, ModelConfig()),
    )


def _count(weights: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def infer_training(args: dict[str, Any], step: int, epoch: int) -> TrainConfig:
    """The training that goes on as the public code would: its arguments, in steps instead of epochs."""
    paper = TrainConfig()
    # At any schedule of the public code `step` optimiser steps took epoch + 1 epochs.
    per_epoch = step / (epoch + 1)
    given = _given(args, TRAIN_ARGUMENTS, paper)
    if "batch_size" in args:
        given["batch_size"] = int(args["batch_size"]) * int(args.get("world_size", 1)) * given["accumulate"]
    return replace(
        paper,
        steps=max(step, round(args["epochs"] * per_epoch) if "epochs" in args and step else paper.steps, 1),
        parameter_groups="public",
        schedule="constant" if args.get("lr_schedule", "constant") == "constant" else "cosine",
        warmup_steps=round(args["warmup_epochs"] * per_epoch) if "warmup_epochs" in args and step else 0,
        **given,
    )


def public_arguments(run: RunConfig) -> dict[str, Any]:
    """The public program's arguments that say what this run does."""
    model, train = run.model, run.train
    return {
        **{argument: getattr(model, name) for argument, name in MODEL_ARGUMENTS.items()},
        **{argument: getattr(train, name) for argument, name in TRAIN_ARGUMENTS.items()},
        "model": next((name for name, known in MODELS.items() if known == model), "ear"),
        "patch_size": model.patch_size,
        "vae_embed_dim": model.channels,
        "class_num": model.num_classes,
        "buffer_size": model.class_tokens,
        "scoreloss_d": model.generator_depth,
        "scoreloss_w": model.generator_width,
        "score_batch_mul": max(1, model.num_samples // 2),
        "noise_channels": model.noise_dim,
        "batch_size": train.batch_size // train.accumulate,
        "lr_schedule": train.schedule,
        "cached_path": run.data_path,
        "use_cached": run.data == "npz",
    }


def _given(args: dict[str, Any], names: dict[str, str], defaults: ModelConfig | TrainConfig) -> dict[str, Any]:
    """Our fields from the public program's arguments; the default where there is none, or no rate or limit."""
    fields = {}
    for argument, name in names.items():
        default, value = getattr(defaults, name), args.get(argument)
        is_given = value is not None and not (value == 0 and name in ("lr", "clip"))
        fields[name] = type(default)(value) if is_given else default
    return fields
