"""What a ``checkpoint-last.pth`` of the public EAR or MAR code says, in our words (docs/model.md, "Public files").

The file is a dict of ``model`` and ``model_ema`` (state dicts with the public keys), ``optimizer`` (the state of an
AdamW), ``epoch`` (the last finished one), ``scaler`` and ``args`` (an argparse.Namespace).
"""

import argparse
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ear_model.config import Config, ModelConfig, RunConfig, SamplingConfig, TrainConfig
from ear_model.errors import shown
from ear_model.model.weights import BLOCKS, ENCODER_BLOCKS, count_blocks, generator_blocks, our_key
from ear_model.presets import MAR_SAMPLING, MODELS
from ear_model.tensor_files import without_wrappers
from ear_model.torch_files import read_torch

PUBLIC_CLASS_TOKENS = 64
# The score by what its parameters' names begin with, the parameter that shows the MLP's width, and the public
# program's argument that is num_samples, with how many samples one of it is.
_SCORES = {"scoreloss.net.": "energy", "diffloss.net.": "diffusion"}
_WIDTH = {"energy": "score.generator.input_proj.weight", "diffusion": "score.net.input_proj.weight"}
_SAMPLES = {"energy": ("score_batch_mul", 2), "diffusion": ("diffusion_batch_mul", 1)}
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

    score: str
    weights: dict[str, Tensor]
    averages: dict[str, Tensor] | None
    optimizer: dict[str, Any] | None
    epoch: int
    scaler: dict[str, Any] | None
    args: dict[str, Any]


def read_public(path: Path) -> PublicCheckpoint:
    """Read a checkpoint of the public EAR or MAR code. Nothing in it is executed.

    Raises:
        ValueError: not there, damaged, a pickle of more than tensors, numbers and a Namespace, or of another model.
    """
    content = read_torch(path)
    if not isinstance(content, dict) or not _is_state_dict(content.get("model")):
        raise ValueError(f"{path} has no state dict 'model'; a checkpoint-last.pth of EAR or MAR has one")
    model = without_wrappers(content["model"], path)
    score = _score_of(model, path)
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
        score=score,
        weights={our_key(key, score): tensor for key, tensor in model.items()},
        averages=None if averages is None else {our_key(key, score): tensor for key, tensor in averages.items()},
        optimizer=content.get("optimizer"),
        epoch=epoch,
        scaler=content.get("scaler"),
        args=_arguments(content.get("args"), path),
    )


def _score_of(keys: Iterable[str], path: Path) -> str:
    """The score of a public model: energy with EAR's backbone, diffusion with MAR's."""
    found = [score for prefix, score in _SCORES.items() if any(key.startswith(prefix) for key in keys)]
    if len(found) != 1:
        kind = "two heads" if found else "no generator"
        raise ValueError(
            f"{path} has {kind} (keys that begin with {' or '.join(_SCORES)}); it is of neither EAR nor MAR"
        )
    has_encoder = any(key.startswith("encoder_blocks.") for key in keys)
    if has_encoder != (found == ["diffusion"]):
        has = "an encoder" if has_encoder else "no encoder"
        raise ValueError(f"{path} has {has} and the {found[0]} score; it is of neither EAR nor MAR")
    return found[0]


def check_public_layout(config: ModelConfig, where: str) -> None:
    """Raise ValueError unless the public EAR code, or MAR's, has such models."""
    kind = config.score, config.backbone, config.order
    if kind not in (("energy", "ear", "masked"), ("diffusion", "mar", "masked")):
        raise ValueError(
            f"{where} is of score {kind[0]!r}, backbone {kind[1]!r} and order {kind[2]!r}; public checkpoints are of "
            "energy, ear and masked (EAR) or diffusion, mar and masked (MAR)"
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
        score = "diffusion" if any(name.startswith("score.net.") for name in weights) else "energy"
        own: dict[str, Any] = {"score": score, "generator_width": weights[_WIDTH[score]].shape[0]}
        if score == "energy":
            own["noise_dim"] = weights["score.generator.noise_embed.weight"].shape[1]
    except (KeyError, IndexError) as error:
        raise ValueError(f"{where} is no EAR or MAR checkpoint: {error} is missing or has another shape") from error
    depth, encoder_depth = count_blocks(weights, BLOCKS), count_blocks(weights, ENCODER_BLOCKS)
    if encoder_depth:
        own |= {"backbone": "mar", "encoder_depth": encoder_depth}
    class_tokens = int(_number(args, "buffer_size", PUBLIC_CLASS_TOKENS, where, least=1))
    patch_size = int(_number(args, "patch_size", 1, where, least=1))
    side = math.isqrt(max(0, positions - class_tokens))
    if side < 1 or side * side + class_tokens != positions or token_dim % patch_size**2:
        raise ValueError(
            f"{where}: {positions} positions are not {class_tokens} class tokens and a square of image tokens "
            f"of {token_dim} numbers in patches of {patch_size} x {patch_size}"
        )
    if num_heads is None:
        known = {(model.width, model.depth, model.backbone): model.num_heads for model in MODELS.values()}
        size = width, depth, own.get("backbone", "ear")
        if size not in known:
            raise ValueError(
                f"{where}: width {width} and depth {depth} are none of {size[2].upper()}-B, L, H, and no tensor "
                "shows the number of attention heads; give --num-heads"
            )
        num_heads = known[size]
    samples, of_one = _SAMPLES[score]
    arguments = {name: field for name, field in MODEL_ARGUMENTS.items() if score == "energy" or field != "alpha"}
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
        generator_depth=count_blocks(weights, generator_blocks(score)),
        num_samples=of_one * int(_number(args, samples, ModelConfig.num_samples // of_one, where, least=1)),
        **own,
        **_given(args, arguments, ModelConfig(), where),
    )


def infer_sampling(model: ModelConfig, args: dict[str, Any], where: str) -> SamplingConfig:
    """How to sample: as the public code's authors do with this size of MAR, by the diffusion steps of ``args``.

    Raises:
        ValueError: ``num_sampling_steps`` that is no count, such as those of DDIM, or more than there are.
    """
    if model.score != "diffusion":
        return SamplingConfig()
    known = [name for name in MAR_SAMPLING if MODELS[name].width == model.width and MODELS[name].depth == model.depth]
    sampling = MAR_SAMPLING[known[0] if known else "mar_base"]
    steps = args.get("num_sampling_steps")
    if steps is None:
        return sampling
    if steps == "":
        return replace(sampling, diffusion_steps=model.diffusion_steps)
    text = str(steps)
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= model.diffusion_steps and len(text) < 9):
        raise ValueError(
            f"{where}: num_sampling_steps in args is {shown(steps)}; it must be a count in 1..{model.diffusion_steps}"
        )
    return replace(sampling, diffusion_steps=int(text))


def infer_training(
    args: dict[str, Any], step: int, epoch: int, where: str = "args", score: str = "energy"
) -> TrainConfig:
    """The training that goes on as the public code would: its arguments, in steps instead of epochs.

    MAR's trains the head at the full rate and knows no tau.

    Raises:
        ValueError: arguments that are no numbers, or out of range, or an unknown schedule.
    """
    paper = TrainConfig() if score == "energy" else TrainConfig(generator_lr_scale=1.0, finetune_tau=1.0)
    names = {argument: name for argument, name in TRAIN_ARGUMENTS.items() if score == "energy" or name != "tau"}
    # At any schedule of the public code `step` optimiser steps took epoch + 1 epochs.
    per_epoch = step / (epoch + 1)
    given = _given(args, names, paper, where)
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
    fields["finetune_tau"] = paper.finetune_tau
    return _named(where, TrainConfig, warmup_steps=warmup, **fields)


def public_arguments(run: RunConfig) -> dict[str, Any]:
    """The public program's arguments that say what this run does."""
    model, train = run.model, run.train
    if model.score == "diffusion":
        head = {
            "diffloss_d": model.generator_depth,
            "diffloss_w": model.generator_width,
            "diffusion_batch_mul": model.num_samples,
            "num_sampling_steps": str(run.sampling.diffusion_steps),
        }
    else:
        head = {
            "scoreloss_d": model.generator_depth,
            "scoreloss_w": model.generator_width,
            "score_batch_mul": max(1, model.num_samples // 2),
            "noise_channels": model.noise_dim,
        }
    return {
        **{argument: getattr(model, name) for argument, name in MODEL_ARGUMENTS.items()},
        **{argument: getattr(train, name) for argument, name in TRAIN_ARGUMENTS.items()},
        "model": next((name for name, known in MODELS.items() if known == model), model.backbone),
        "patch_size": model.patch_size,
        "vae_embed_dim": model.channels,
        "class_num": model.num_classes,
        "buffer_size": model.class_tokens,
        **head,
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
