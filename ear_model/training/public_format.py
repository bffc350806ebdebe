"""What a ``checkpoint-last.pth`` of the public EAR code says, in our words (docs/model.md, "Public files").

The file is a dict of ``model`` and ``model_ema`` (state dicts with the public keys), ``optimizer`` (the state of an
AdamW), ``epoch`` (the last finished one), ``scaler`` and ``args`` (an argparse.Namespace).
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ear_model.config import Config, ModelConfig, RunConfig, TrainConfig
from ear_model.errors import shown
from ear_model.model.weights import BLOCKS, GENERATOR_BLOCKS, count_blocks, our_key
from ear_model.presets import MODELS
from ear_model.tensor_files import without_wrappers
from ear_model.torch_files import read_torch

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
    "min_lr": "min_lr",
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


def check_public_layout(config: ModelConfig, where: str) -> None:
    """Raise ValueError unless the public EAR code has such models: of the energy score, masked tokens."""
    for name, public in (("score", "energy"), ("order", "masked")):
        if getattr(config, name) != public:
            own = getattr(config, name)
            raise ValueError(f"{where} is of {name} {own!r}; a checkpoint of the public EAR code is of {public!r}")


def read_public(path: Path) -> PublicCheckpoint:
    """Read a checkpoint of the public EAR code. Nothing in it is executed.

    Raises:
        ValueError: not there, damaged, a pickle of more than tensors, numbers and a Namespace, or not of EAR.
    """
    content = read_torch(path)
    if not isinstance(content, dict) or not _is_state_dict(content.get("model")):
        raise ValueError(f"{path} has no state dict 'model'; a checkpoint-last.pth of the public EAR code has one")
    model = without_wrappers(content["model"], path)
    if any(key.startswith(("diffloss.", "encoder_blocks.")) for key in model):
        raise ValueError(f"{path} holds a MAR model (encoder, diffusion head); only EAR checkpoints can be converted")
    if not any(key.startswith("scoreloss.net.") for key in model):
        raise ValueError(f"{path} has no generator (no key begins with scoreloss.net.); it is no EAR checkpoint")
    averages = content.get("model_ema")
    if averages is not None:
        averages = without_wrappers(averages, path) if _is_state_dict(averages) else {}
        if averages.keys() != model.keys():
            raise ValueError(f"{path}: model_ema has other tensors than model")
    epoch = content.get("epoch", 0)
    if type(epoch) is not int or not 0 <= epoch < 2**31:
        raise ValueError(f"{path}: epoch is {shown(epoch)}; it must be a count from 0 on")
    for name in ("optimizer", "scaler"):
        if not isinstance(content.get(name), (dict, type(None))):
            raise ValueError(f"{path}: {name} is {type(content[name]).__name__}; it must be a state dict")
    return PublicCheckpoint(
        weights=_ours(model),
        averages=None if averages is None else _ours(averages),
        optimizer=content.get("optimizer"),
        epoch=epoch,
        scaler=content.get("scaler"),
        args=_arguments(content.get("args"), path),
    )


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
    )


def _arguments(args: Any, path: Path) -> dict[str, Any]:
    """``args`` as a dict of plain values, whether they are a Namespace, a dict or missing."""
    values = vars(args) if isinstance(args, argparse.Namespace) else {} if args is None else args
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path}: args is {type(args).__name__}; it must be an argparse.Namespace or a dict")
    for name, value in values.items():
        if not _is_plain(value):
            raise ValueError(f"{path}: {name} in args is {type(value).__name__}; it must be a number, text or a list")
    return values


def _is_plain(value: Any, levels: int = 2) -> bool:
    if isinstance(value, (list, tuple, dict)):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return levels > 0 and all(_is_plain(each, levels - 1) for each in inner)
    return value is None or isinstance(value, (bool, int, float, str))


def _ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {our_key(key): tensor for key, tensor in tensors.items()}


def infer_model(weights: dict[str, Tensor], args: dict[str, Any], num_heads: int | None, where: str) -> ModelConfig:
    """The architecture, from the tensors' shapes; what no shape shows from ``args``, or the paper's value.

    Raises:
        ValueError: tensors missing, arguments that are no numbers or out of range, or a size whose number of heads is
            not known.
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
    depth = count_blocks(weights, BLOCKS)
    class_tokens = int(_number(args, "buffer_size", PUBLIC_CLASS_TOKENS, where, least=1))
    patch_size = int(_number(args, "patch_size", 1, where, least=1))
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
    return _named(
        where,
        ModelConfig,
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
        generator_depth=count_blocks(weights, GENERATOR_BLOCKS),
        noise_dim=noise_dim,
        num_samples=2 * int(_number(args, "score_batch_mul", ModelConfig.num_samples // 2, where, least=1)),
        **_given(args, MODEL_ARGUMENTS, ModelConfig(), where),
    )


def infer_training(args: dict[str, Any], step: int, epoch: int, where: str = "args") -> TrainConfig:
    """The training that goes on as the public code would: its arguments, in steps instead of epochs.

    Raises:
        ValueError: arguments that are no numbers, or out of range, or an unknown schedule.
    """
    paper = TrainConfig()
    # At any schedule of the public code `step` optimiser steps took epoch + 1 epochs.
    per_epoch = step / (epoch + 1)
    given = _given(args, TRAIN_ARGUMENTS, paper, where)
    if args.get("batch_size") is not None:
        images, processes = (int(_number(args, name, 1, where, least=1)) for name in ("batch_size", "world_size"))
        given["batch_size"] = images * processes * given["accumulate"]
    schedule = args.get("lr_schedule") or "constant"
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"{where}: lr_schedule in args is {shown(schedule)}; it must be 'constant' or 'cosine'")
    steps, warmup = paper.steps, 0
    if args.get("epochs") is not None and step:
        steps = round(_number(args, "epochs", 0, where) * per_epoch)
    if step:
        warmup = round(_number(args, "warmup_epochs", 0, where) * per_epoch)
    fields = {"steps": max(step, steps, 1), "parameter_groups": "public", "schedule": schedule, **given}
    return _named(where, TrainConfig, warmup_steps=warmup, **fields)


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


def _given(
    args: dict[str, Any], names: dict[str, str], defaults: ModelConfig | TrainConfig, where: str
) -> dict[str, Any]:
    """Our fields from the public program's arguments; the default where there is none, or no rate or limit."""
    fields = {}
    for argument, name in names.items():
        default = getattr(defaults, name)
        value = _number(args, argument, default, where, whole=isinstance(default, int))
        fields[name] = default if value == 0 and name in ("lr", "clip") else type(default)(value)
    return fields


def _number(
    args: dict[str, Any], name: str, default: float, where: str, *, least: float = 0, whole: bool | None = None
) -> float:
    """An argument that is a finite number of at least ``least``, the default if it is not given.

    Args:
        whole: whether it must be an integer; if None, where ``least`` is 1.
    """
    value = args.get(name)
    if value is None:
        return default
    whole = least == 1 if whole is None else whole
    is_good = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_good or not (least <= value < 2**63) or (whole and value != int(value)):
        kind = "an integer" if whole else "a number"
        raise ValueError(f"{where}: {name} in args is {shown(value)}; it must be {kind} from {least} on")
    return value


def _named(where: str, kind: type[Config], **fields: Any) -> Config:
    """A configuration; errors name the file."""
    try:
        return kind(**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
