"""What the compile gate compiles of the transformer block, at the paper's widths (heads of 64, 64 and 80)."""

from ear_kernels.launch import ShippedKernel
from ear_kernels.ops.adaln.autograd import block_of, warps_of
from ear_kernels.ops.generator.shipped import EVERYWHERE, HOPPER, describe
from ear_kernels.ops.transformer import autograd, kernels

TYPES = {
    **dict.fromkeys(("residual", "x", "grad_x", "grad_residual", "weight", "bias", "branch_bias"), "*fp32"),
    "seed": "*i64",
    "scale": "fp32",
}


def shipped() -> list[ShippedKernel]:
    """Every kernel with dropout, float32 residual stream and bf16 branches."""
    found = []
    forward = {"DROPOUT": True, "HAS_BRANCH_BIAS": True}
    for width, targets in ((768, EVERYWHERE), (1024, HOPPER), (1280, EVERYWHERE)):
        size = {"WIDTH": width, "BLOCK": block_of(width)}
        row = autograd.norm_backward_config(width)
        backward = {"DROPOUT": True, "HAS_GRAD_X": True, "STAGES": row.stages}
        for name, kernel, constants in (
            ("fwd", kernels.dropout_add_layer_norm_fwd_kernel, forward | {"SAVE_NORMED": False}),
            ("fwd_normed", kernels.dropout_add_layer_norm_fwd_kernel, forward | {"SAVE_NORMED": True}),
            ("bwd", kernels.dropout_add_layer_norm_bwd_kernel, backward | {"NORMED": False}),
            ("bwd_normed", kernels.dropout_add_layer_norm_bwd_kernel, backward | {"NORMED": True}),
        ):
            warps = row.warps if "bwd" in name else autograd.norm_forward_warps(width)
            types = TYPES | ({"x": "*bf16"} if name == "bwd_normed" else {})
            found.append(
                describe(f"dropout_add_layer_norm_{name}[{width}]", kernel, size | constants, types, targets, warps)
            )
        heads = {"DIM": 80 if width == 1280 else 64, "STAGES": 2}
        found.append(
            describe(f"pack_heads[{width}]", kernels.pack_heads_kernel, size | heads, TYPES, targets, warps_of(width))
        )
    flat = {"WIDTH": 3072, "BLOCK": autograd.COLUMNS, "DROPOUT": True}
    for name, kernel, constants in (
        ("fwd", kernels.gelu_dropout_fwd_kernel, flat),
        ("bwd", kernels.gelu_dropout_bwd_kernel, flat | {"STAGES": 3}),
    ):
        found.append(describe(f"gelu_dropout_{name}", kernel, constants, TYPES, num_warps=warps_of(autograd.COLUMNS)))
    return found
