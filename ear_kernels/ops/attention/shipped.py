"""What the compile gate compiles of the attention: heads of 64 at lengths that tiles divide, and others."""

from ear_kernels.launch import ShippedKernel
from ear_kernels.ops.attention import autograd, kernels
from ear_kernels.ops.generator.shipped import NVIDIA, describe

TYPES = {
    **dict.fromkeys(("lse", "delta"), "*fp32"),
    "draws": "*i32",
    **dict.fromkeys(("length", "heads", "threshold"), "i32"),
    **dict.fromkeys(("scale_log2", "keep_scale"), "fp32"),
}


def shipped() -> list[ShippedKernel]:
    """The three kernels with dropout. Not for MI300, where they were never tried."""
    found = []
    for name, kernel, config in (
        ("fwd", kernels.attention_fwd_kernel, autograd.FORWARD),
        ("bwd_query", kernels.attention_bwd_query_kernel, autograd.BACKWARD_QUERY),
        ("bwd_key", kernels.attention_bwd_key_kernel, autograd.BACKWARD_KEY),
    ):
        for even in (True, False):
            constants = autograd.constants(config, 64, 4 * config.bm * config.bn if even else 300, dropout=True)
            warps = constants.pop("num_warps")
            # On sm_80 the query's kernel leaves 8 bytes on the stack (a register pair used once, after the loop).
            spills = 2 if name == "bwd_query" else 0
            title = f"attention_{name}[{'even' if even else 'any length'}]"
            found.append(describe(title, kernel, constants, TYPES, NVIDIA, warps, spills, num_stages=config.stages))
    return found
