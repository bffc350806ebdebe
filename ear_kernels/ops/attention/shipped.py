"""What the compile gate compiles of the attention with dropout, at heads of 64 and 80 features."""

from dataclasses import replace

from ear_kernels.launch import ShippedKernel
from ear_kernels.ops.attention import autograd, kernels
from ear_kernels.ops.generator.shipped import EVERYWHERE, NVIDIA, describe

TYPES = {
    **dict.fromkeys(("lse", "delta"), "*fp32"),
    "draws": "*i32",
    "heads": "i32",
    "scale_log2": "fp32",
    "keep_scale": "fp32",
}
# Heads of EAR-B and EAR-L, and of EAR-H (in two blocks of features).
DIMS = (64, 80)
# Lengths whose tiles are all full, and one of the others, whose loads and stores have masks.
LENGTHS = (320, 321)
# Two warps with tiles of 64 x 32 are the fastest of 18 launches at heads of 80 (benchmarks/results/
# attention_80_*h200_2026-11-24.json), though the key's kernel spills 8 B on sm_90. Elsewhere it is up to 64 (sm_100,
# masked, 16 registers); an AMD GPU's wide waves would spill kilobytes, and nobody has run these kernels there.
SPLIT_SPILLS = 16


def shipped() -> list[ShippedKernel]:
    """Forward and both backward kernels with dropout, as ``autograd`` launches them."""
    found = []
    names = {
        "fwd": kernels.attention_fwd_kernel,
        "bwd_query": kernels.attention_bwd_query_kernel,
        "bwd_key": kernels.attention_bwd_key_kernel,
    }
    for dim in DIMS:
        for (part, kernel), config in zip(names.items(), autograd.configs(dim), strict=True):
            for length in LENGTHS:
                constants = autograd.constants(config, dim, length, dropout=True)
                warps = constants.pop("num_warps")
                name = f"attention_{part}[{dim}, {'full tiles' if constants['EVEN'] else 'masked'}]"
                split = constants["BLOCK_E"] > 0
                described = describe(
                    name, kernel, constants, TYPES, NVIDIA if split else EVERYWHERE, warps,
                    max_spills=SPLIT_SPILLS if split else 0,
                )  # fmt: skip
                # Of 12 or 16 heads; Triton is told whether 16 divides the length.
                undivided = {"heads", "threshold"} if length % 16 == 0 else {"heads", "threshold", "length"}
                found.append(replace(described, undivided=frozenset(undivided)))
    return found
