"""What the compile gate compiles of the attention with dropout, at the paper's heads of 64."""

from dataclasses import replace

from ear_kernels.launch import ShippedKernel
from ear_kernels.ops.attention import autograd, kernels
from ear_kernels.ops.generator.shipped import EVERYWHERE, describe

TYPES = {
    **dict.fromkeys(("lse", "delta"), "*fp32"),
    "draws": "*i32",
    "heads": "i32",
    "scale_log2": "fp32",
    "keep_scale": "fp32",
}
DIM = 64
# Lengths whose tiles are all full, and one of the others, whose loads and stores have masks.
LENGTHS = (320, 321)


def shipped() -> list[ShippedKernel]:
    """Forward and both backward kernels with dropout, as ``autograd`` launches them."""
    found = []
    for name, kernel, config in (
        ("fwd", kernels.attention_fwd_kernel, autograd.FORWARD),
        ("bwd_query", kernels.attention_bwd_query_kernel, autograd.BACKWARD_QUERY),
        ("bwd_key", kernels.attention_bwd_key_kernel, autograd.BACKWARD_KEY),
    ):
        for length in LENGTHS:
            constants = autograd.constants(config, DIM, length, dropout=True)
            warps = constants.pop("num_warps")
            full = "full tiles" if constants["EVEN"] else "masked"
            described = describe(f"attention_{name}[{DIM}, {full}]", kernel, constants, TYPES, EVERYWHERE, warps)
            # 12 heads at a width of 768; Triton is told whether 16 divides the length.
            undivided = {"heads", "threshold"} if length % 16 == 0 else {"heads", "threshold", "length"}
            found.append(replace(described, undivided=frozenset(undivided)))
    return found
