"""What is no tensor where a tensor belongs: every public operation and module says what it expects."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ear_kernels
from ear_kernels import FusedAdaLNBlock, FusedAdamW, FusedEnergyLoss, FusedMLPGenerator, GaussianTarget, LowCopies
from ear_kernels import functional as F
from ear_model.ear import EAR

WIDTH = 8
GENERATOR = FusedMLPGenerator(6, WIDTH, 4, depth=1, noise_dim=3).requires_grad_(False)


def r(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def block() -> F.Block:
    return F.Block(
        r(WIDTH), r(WIDTH), r(3 * WIDTH, WIDTH), r(3 * WIDTH), r(WIDTH, WIDTH), r(WIDTH), r(WIDTH), r(WIDTH),
        r(5, WIDTH), r(5), r(WIDTH, 5), r(WIDTH),
    )  # fmt: skip


def whole(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def arguments() -> dict[str, tuple[Any, dict[str, Any]]]:
    """(function, usable arguments) by name, of everything that is public and takes tensors."""
    loss = {"samples": r(5, 3, 4), "target": r(5, 4), "mask": r(5) > 0, "weights": torch.rand(5)}
    members = {"member_mask": torch.ones(5, 3, dtype=torch.bool)}
    linears = {"inputs": GENERATOR.input_parameters(), "parameters": GENERATOR.block_parameters()}
    norm = {"norm_weight": r(WIDTH), "norm_bias": r(WIDTH), "branch_bias": r(WIDTH)}
    mlp = {"weight_in": r(5, WIDTH), "bias_in": r(5), "weight_out": r(WIDTH, 5), "bias_out": r(WIDTH)}
    streams = {"branch": r(2, 3, WIDTH), "residual": r(2, 3, WIDTH)}
    affine = {"weight": r(WIDTH), "bias": r(WIDTH)}
    qkv = {"weight": r(3 * WIDTH, WIDTH), "bias": r(3 * WIDTH), "heads": 2}
    parameter = nn.Parameter(r(3))
    parameter.grad = r(3)
    return {
        "energy_loss": (F.energy_loss, loss | members | {"feature_weights": torch.ones(4)}),
        "kernel_score_loss": (F.kernel_score_loss, loss | {"feature_weights": torch.ones(4)}),
        "energy_score": (ear_kernels.energy_score, loss | members | {"feature_weights": torch.ones(4)}),
        "energy_distance": (ear_kernels.energy_distance, {"x": r(5, 3), "y": r(4, 3)}),
        "FusedEnergyLoss": (FusedEnergyLoss(), loss | members),
        "FusedEnergyLoss.__init__": (FusedEnergyLoss, {"feature_weights": torch.ones(4)}),
        "GaussianTarget": (GaussianTarget, {"mean": r(5, 4), "log_std": r(5, 4), "num_targets": 2}),
        "FusedAdaLNBlock": (FusedAdaLNBlock(WIDTH), {"hidden": r(5, WIDTH), "conditioning": r(5, WIDTH)}),
        "FusedMLPGenerator": (GENERATOR, {"z": r(5, 6), "noise": r(5, 3)}),
        "FusedMLPGenerator.modulations": (GENERATOR.modulations, {"noise": r(5, 3), "out": r(5, 5 * WIDTH)}),
        "FusedMLPGenerator.chain": (GENERATOR.chain, {"z": r(5, 6), "modulations": r(5, 5 * WIDTH)}),
        "FusedAdamW.update": (FusedAdamW([parameter]).update, {"divisor": torch.ones(())}),
        "adaln_modulate": (
            F.adaln_modulate, {"hidden": r(5, WIDTH), "shift": r(5, WIDTH), "scale": r(5, WIDTH)} | affine,
        ),
        "gated_silu_ffn": (
            F.gated_silu_ffn, {"hidden": r(5, WIDTH), "modulated": r(5, WIDTH), "gate": r(5, WIDTH)} | mlp,
        ),
        "generator_blocks": (F.generator_blocks, {
            "hidden": r(5, WIDTH), "conditioning": r(5, WIDTH), "parameters": GENERATOR.block_parameters(),
            "index": torch.arange(5, dtype=torch.int32), "inverse": torch.arange(5),
        }),
        "generator_few_rows": (F.generator_few_rows, {"z": r(5, 6), "noise": r(5, 3)} | linears),
        "generator_modulations": (F.generator_modulations, {"noise": r(5, 3)} | linears),
        "generator_chain": (F.generator_chain, {"z": r(5, 6), "modulations": r(5, 5 * WIDTH)} | linears),
        "dropout_add_layer_norm": (F.dropout_add_layer_norm, streams | affine | {"branch_bias": r(WIDTH)}),
        "gelu_mlp": (F.gelu_mlp, {"x": r(2, WIDTH)} | mlp),
        "norm_gelu_mlp": (F.norm_gelu_mlp, streams | norm | mlp),
        "norm_self_attention": (F.norm_self_attention, streams | norm | qkv),
        "self_attention": (F.self_attention, {"x": r(2, 3, WIDTH)} | qkv),
        "qkv_heads": (F.qkv_heads, {"x": r(2, 3, WIDTH)} | qkv),
        "project": (F.project, {"x": r(2, WIDTH), "weight": r(5, WIDTH)}),
        "transformer_block": (
            F.transformer_block, {"x": r(2, 3, WIDTH), "block": block(), "options": F.BlockOptions(2)},
        ),
        "attention": (F.attention, {"qkv": r(2, 3, 3 * WIDTH), "heads": 2, "out": r(2, 3, WIDTH)}),
        "attention_rows": (F.attention_rows, {"query": r(2, 1, WIDTH), "kv": r(2, 3, 2 * WIDTH), "heads": 2}),
        "attention_cached": (F.attention_cached, {
            "qkv": r(2, 3 * WIDTH), "cache": r(2, 2, 3, WIDTH), "place": torch.full((1,), 1), "heads": 2,
            "out": r(2, WIDTH),
        }),
        "quantise_e4m3": (F.quantise_e4m3, {"weight": r(5, 5)}),
        "residual_norm": (
            F.residual_norm, {"stream": r(5, WIDTH), "branches": [(r(5, WIDTH), r(WIDTH))]} | affine,
        ),
        "linear_gelu": (F.linear_gelu, {"x": r(2, 5), "weight": r(3, 5), "bias": r(3)}),
        "linear_inference": (F.linear_inference, {"x": r(2, 5), "weight": r(3, 5), "bias": r(3), "out": r(2, 3)}),
        "predicted_rows": (F.predicted_rows, {
            "stream": r(2, 4, WIDTH), "orders": whole(2, 3), "left": torch.full((1,), 3), "count": 1,
        } | affine),
        "guided_norm": (F.guided_norm, {
            "branch": r(4, WIDTH), "branch_bias": r(WIDTH), "rows": r(4, WIDTH), "scales": torch.ones(4),
            "left": torch.full((1,), 3), "count": 1,
        } | affine),
        "write_tokens": (F.write_tokens, {
            "sampled": r(2, 4), "tokens": r(2, 3, 4), "start": r(2, 3, WIDTH), "rows": whole(2),
            "embed": (r(WIDTH, 4), r(WIDTH)), "position": r(3, WIDTH), "norm": (r(WIDTH), r(WIDTH), 1e-6),
        }),
        "write_rows": (F.write_rows, {
            "values": r(2, 4), "target": r(2, 3, 4), "rows": whole(2), "left": torch.full((1,), 3), "count": 1,
        }),
        "denoise_step": (F.denoise_step, {
            "output": r(4, 6), "state": r(2, 3), "states": r(4, 3), "noise": r(2, 5, 3), "table": r(5, 5),
            "time": torch.full((1,), 3), "offset": 1, "guidance": r(1),
        }),
        "EAR.forward": (EAR.from_preset("digits"), {"images": r(2, 1, 8, 8), "labels": whole(2)}),
        "EAR.sample": (EAR.from_preset("digits").sample, {"labels": whole(2)}),
    }  # fmt: skip


MAY_BE_NONE = {
    "mask", "weights", "feature_weights", "member_mask", "bias", "bias_in", "bias_out", "branch_bias", "out", "index",
    "inverse", "scales", "divisor",
}  # fmt: skip
TABLE = arguments()
PLACES = [
    (name, argument)
    for name, (_, given) in TABLE.items()
    for argument, value in given.items()
    if isinstance(value, (torch.Tensor, list))
]


def test_all_public_operations_are_here() -> None:
    public = {*F.__all__, *ear_kernels.__all__} - {"Block", "BlockOptions", "accelerate"}
    public -= {"check_energy_loss_options", "check_kernel_score_options"}
    assert public - {name.split(".")[0] for name in TABLE} == {"LowCopies"}


@pytest.mark.parametrize("name", TABLE)
def test_usable_arguments_are_used(name) -> None:
    function, given = TABLE[name]
    function(**given)


@pytest.mark.parametrize(("name", "argument"), PLACES, ids=[".".join(place) for place in PLACES])
def test_no_tensor_is_named(name, argument) -> None:
    function, given = TABLE[name]
    for bad in ([[1.0, 2.0]], np.ones((2, 2), np.float32), 1, "x"):
        with pytest.raises(TypeError) as caught:
            function(**given | {argument: bad})
        message = str(caught.value)
        assert argument in message
        assert "tensor" in message.lower()
        assert "\n" not in message


@pytest.mark.parametrize(("name", "argument"), PLACES, ids=[".".join(place) for place in PLACES])
def test_none_is_taken_or_named(name, argument) -> None:
    function, given = TABLE[name]
    message = None
    try:
        function(**given | {argument: None})
    except (TypeError, ValueError) as error:
        message = str(error)
    if message is None:
        alone = {("adaln_modulate", "weight")}
        assert argument in MAY_BE_NONE or (name, argument) in alone
    else:
        assert argument in message
        assert "\n" not in message


@pytest.mark.parametrize("bad", [[1.0], np.ones(3), None])
def test_parts_of_arguments(bad) -> None:
    """Averages of the optimiser, weights of a block, parameters that have copies, a whole block."""
    parameter = nn.Parameter(r(3))
    parameter.grad = r(3)
    with pytest.raises(TypeError, match=r"an average is a .*; it must be a torch\.Tensor"):
        FusedAdamW([parameter]).update(averages={parameter: bad})
    with pytest.raises(TypeError, match=r"fc1_weight is a .*; it must be a torch\.Tensor"):
        F.transformer_block(r(2, 3, WIDTH), block()._replace(fc1_weight=bad), F.BlockOptions(2))
    with pytest.raises(TypeError, match=r"a parameter is a .*; it must be a torch\.Tensor"):
        LowCopies([bad])
    with pytest.raises(TypeError, match=r"block is a .*; it must be a Block"):
        F.transformer_block(r(2, 3, WIDTH), bad, F.BlockOptions(2))


@pytest.mark.parametrize("name", ["mask", "weights", "member_mask"])
def test_complex_numbers_weigh_nothing(name) -> None:
    shape = (5, 3) if name == "member_mask" else (5,)
    with pytest.raises(TypeError, match=f"{name} has dtype torch.complex64; it must be bool or hold real numbers"):
        F.energy_loss(r(5, 3, 4), r(5, 4), **{name: torch.ones(shape, dtype=torch.complex64)})
