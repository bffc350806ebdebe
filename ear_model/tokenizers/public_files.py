"""Weights of public autoencoders, in the layouts of latent-diffusion and of diffusers, under our names.

Our names are latent-diffusion's. The shape of the autoencoder is told from the tensors' names and shapes; the number
of groups of the norms, which nothing shows, is 32 in both programs.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ear_model.errors import shown
from ear_model.json_files import read_json
from ear_model.tensor_files import check_numbers
from ear_model.tokenizers.config import KL16, KL16_LATENT_SCALE, AutoencoderConfig

NORM_GROUPS = 32
# Of the code that trained them: discriminators, perceptual losses, averages' bookkeeping. No image passes through.
IGNORED_PREFIXES = ("loss.", "model_ema.")
FIRST_STAGE = "first_stage_model."  # of an autoencoder in a file of a whole diffusion model
SCALE_KEY, SCALE_FIELD, SETTINGS_FILE = "scale_factor", "scaling_factor", "config.json"
# diffusers' AutoencoderKL has this one if its config.json does not say another.
DIFFUSERS_SCALE = 0.18215

# diffusers' names, below encoder. and decoder., as ours; {up} counts the decoder's levels from the other end.
_LAYERS = {"group_norm": "norm", "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out", "to_q": "q",
           "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "conv_shortcut": "nin_shortcut"}  # fmt: skip


def read_public(path: Path, tensors: dict[str, Any]) -> tuple[AutoencoderConfig, float, dict[str, Tensor]]:
    """Shape, latent scale and tensors (our names) of a public autoencoder.

    Args:
        path: the file, for messages; a config.json beside it may say the latent scale.
        tensors: its state dict.

    Raises:
        ValueError: names or shapes of no autoencoder that we know, or a latent scale that is not known.
    """
    scale = tensors.get(SCALE_KEY)
    if any(name.startswith(FIRST_STAGE) for name in tensors):
        tensors = {
            name.removeprefix(FIRST_STAGE): value for name, value in tensors.items() if name.startswith(FIRST_STAGE)
        }
    tensors = {
        name: value
        for name, value in tensors.items()
        if not name.startswith(IGNORED_PREFIXES) and name not in (SCALE_KEY, "global_step")
    }
    check_numbers(path, tensors)
    is_diffusers = any(".down_blocks." in name or ".mid_block." in name for name in tensors)
    if is_diffusers:
        tensors = _from_diffusers(path, tensors)
    config = autoencoder_shape(path, tensors)
    return config, _scale(path, scale, config, is_diffusers), tensors


def _from_diffusers(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    levels = 1 + max((int(found[1]) for name in tensors if (found := re.search(r"\.up_blocks\.(\d{1,4})\.", name))),
                     default=0)  # fmt: skip
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = _renamed(name, levels)
        if ".attn" in ours and ours.endswith(".weight") and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]  # a linear layer there, a 1x1 convolution here
        if ours in renamed:
            raise ValueError(f"{path}: {name} is there twice")
        renamed[ours] = tensor
    return renamed


def _renamed(name: str, levels: int) -> str:
    for theirs, ours in _LAYERS.items():
        name = re.sub(rf"\.{re.escape(theirs)}(?=\.(weight|bias)$)", f".{ours}", name)
    name = re.sub(r"\.down_blocks\.(\d+)\.", r".down.\1.", name)
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda found: f".up.{levels - 1 - int(found[1])}.", name)
    name = re.sub(r"\.mid_block\.resnets\.(\d+)\.", lambda found: f".mid.block_{int(found[1]) + 1}.", name)
    name = re.sub(r"\.mid_block\.attentions\.(\d+)\.", lambda found: f".mid.attn_{int(found[1]) + 1}.", name)
    name = re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", name)
    name = re.sub(r"\.attentions\.(\d+)\.", r".attn.\1.", name)
    name = name.replace(".downsamplers.0.", ".downsample.").replace(".upsamplers.0.", ".upsample.")
    return name.replace(".conv_norm_out.", ".norm_out.")


def autoencoder_shape(path: Path, tensors: dict[str, Tensor]) -> AutoencoderConfig:
    """The configuration, from what the tensors' names and shapes show; all of them are compared with it later."""
    try:
        channels, image_channels = tensors["encoder.conv_in.weight"].shape[:2]
        levels = _count(tensors, "encoder.down.")
        widths = [tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
        if not channels or any(width % channels for width in widths):
            raise ValueError(f"levels of {widths} channels, the first convolution of {channels}")
        return AutoencoderConfig(
            channels=channels,
            multipliers=tuple(width // channels for width in widths),
            residual_blocks=_count(tensors, "encoder.down.0.block."),
            latent_channels=tensors["post_quant_conv.weight"].shape[0],
            image_channels=image_channels,
            attention=f"encoder.down.{levels - 1}.attn.0.q.weight" in tensors,
            decoder_attention=f"decoder.up.{levels - 1}.attn.0.q.weight" in tensors,
            norm_groups=NORM_GROUPS,
        )
    except KeyError as error:
        missing = error.args[0]
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is no autoencoder that we know ({error})") from error
    raise ValueError(
        f"{path} is no autoencoder of ours, of latent-diffusion or of diffusers: 1 tensors missing ['{missing}'], "
        f"it holds {[name[:80] for name in sorted(tensors)[:3]]}"
    )


def _count(tensors: dict[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def _scale(path: Path, stored: Any, config: AutoencoderConfig, is_diffusers: bool) -> float:
    if isinstance(stored, Tensor) and stored.numel() == 1:
        return float(stored)
    settings = path.with_name(SETTINGS_FILE)
    if settings.is_file():
        value = read_json(settings).get(SCALE_FIELD)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if value is not None:
            raise ValueError(f"{settings}: {SCALE_FIELD} is {shown(value)}; it must be a number")
    if replace(config, decoder_attention=False) == KL16:
        return KL16_LATENT_SCALE
    if is_diffusers:
        return DIFFUSERS_SCALE
    raise ValueError(
        f"{path} does not say its latent scale, and has not the shape of KL-16; write it as "
        f'{{"{SCALE_FIELD}": NUMBER}} into {settings}'
    )
