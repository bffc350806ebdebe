"""What the compile gate compiles of the AdamW pass."""

import triton.language as tl

from ear_kernels.launch import ShippedKernel
from ear_kernels.ops.adamw import kernels, launchers
from ear_kernels.ops.generator.shipped import describe

SCALARS = (
    "lr", "lr_decay", "beta1_rest", "beta2", "beta2_rest", "log2_beta1", "log2_beta2", "eps", "average_rest",
)  # fmt: skip


def shipped() -> list[ShippedKernel]:
    """With bf16 copies, as ``ear train`` launches it."""
    constants = {"LOW": tl.bfloat16, "CHUNK": launchers.CHUNK}
    types = {"table": "*i64", "chunks": "*i32", "divisor": "*fp32", **dict.fromkeys(SCALARS, "fp32")}
    return [describe("adamw", kernels.adamw_kernel, constants, types, num_warps=launchers.WARPS)]
