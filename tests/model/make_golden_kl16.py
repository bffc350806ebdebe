"""Makes golden_kl16.npz: KL-16 as `diffusers` computes it, with weights and image drawn by NumPy.

    pip install diffusers && python -m tests.model.make_golden_kl16

diffusers is a second implementation that shares no code with ours, but 60 MB of it is too much for the test
environment: so its answers are kept. :func:`to_diffusers` is also the table of our keys against its keys.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ear_model.tokenizers.config import KL16
from ear_model.tokenizers.kl16 import AutoencoderKL

GOLDEN = Path(__file__).with_name("golden_kl16.npz")
IMAGE_SHAPE = (1, 3, 48, 32)  # not square, to tell rows from columns
LATENT_SHAPE = (1, 16, 3, 2)


def drawn_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights that depend on key and shape alone: NumPy keeps the streams of RandomState as they are for ever."""
    weights = {}
    for name, tensor in model.state_dict().items():
        draw = np.random.RandomState(zlib.crc32(name.encode())).uniform(-1, 1, tuple(tensor.shape))
        if tensor.ndim == 1:
            draw = 0.3 * draw + ("norm" in name and name.endswith("weight"))
        else:
            draw = draw * (3.0 / np.prod(tensor.shape[1:])) ** 0.5
        weights[name] = torch.from_numpy(draw).float()
    return weights


def drawn_input(shape: tuple[int, ...]) -> Tensor:
    """Values in -1..1, likewise."""
    return torch.from_numpy(np.random.RandomState(0).uniform(-1, 1, shape)).float()


def to_diffusers(name: str, levels: int = 5) -> str:
    """diffusers' key of one of our parameters."""
    name = re.sub(r"mid\.block_(\d)", lambda match: f"mid_block.resnets.{int(match[1]) - 1}", name)
    name = name.replace("mid.attn_1", "mid_block.attentions.0")
    name = re.sub(r"down\.(\d)\.block\.", r"down_blocks.\1.resnets.", name)
    name = re.sub(r"down\.(\d)\.attn\.", r"down_blocks.\1.attentions.", name)
    name = re.sub(r"down\.(\d)\.downsample\.", r"down_blocks.\1.downsamplers.0.", name)
    name = re.sub(r"up\.(\d)\.block\.", lambda match: f"up_blocks.{levels - 1 - int(match[1])}.resnets.", name)
    name = re.sub(
        r"up\.(\d)\.upsample\.", lambda match: f"up_blocks.{levels - 1 - int(match[1])}.upsamplers.0.", name
    )
    name = name.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
    if "attentions" in name:
        name = name.replace("proj_out", "to_out.0").replace(".norm.", ".group_norm.")
        name = re.sub(r"\.([qkv])\.", r".to_\1.", name)
    return name


def diffusers_kl16(weights: dict[str, Tensor]) -> torch.nn.Module:
    """KL-16 as diffusers builds it, with our weights; every one of its tensors comes from one of ours."""
    from diffusers import AutoencoderKL as Theirs

    theirs = Theirs(
        down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",) * 5,
        block_out_channels=tuple(KL16.channels * factor for factor in KL16.multipliers),
        layers_per_block=KL16.residual_blocks,
        latent_channels=KL16.latent_channels,
    )
    expected = theirs.state_dict()
    mapped = {to_diffusers(name): weight for name, weight in weights.items()}
    # Its attention has linears where ours has 1x1 convolutions.
    mapped = {
        name: weight.flatten(1) if weight.ndim == 4 and expected[name].ndim == 2 else weight
        for name, weight in mapped.items()
    }
    theirs.load_state_dict(mapped, strict=True)
    return theirs.eval()


def main() -> None:
    weights = drawn_weights(AutoencoderKL())
    theirs = diffusers_kl16(weights)
    with torch.no_grad():
        moments = theirs.encode(drawn_input(IMAGE_SHAPE)).latent_dist.parameters
        image = theirs.decode(drawn_input(LATENT_SHAPE)).sample
    np.savez(GOLDEN, moments=moments.numpy(), image=image.numpy())
    print(f"{GOLDEN}: moments {tuple(moments.shape)} std {moments.std():.4f}, image std {image.std():.4f}")


if __name__ == "__main__":
    main()
