"""What the compile gate compiles of the column sums: float32 partials and bf16 rows."""

from ear_kernels.launch import ShippedKernel
from ear_kernels.ops.column_sums import kernels, launchers
from ear_kernels.ops.generator.shipped import describe


def shipped() -> list[ShippedKernel]:
    """One stage over the partials of a norm at W = 768, and the first of two over bf16 rows."""
    found = []
    for name, kind, itemsize, width in (("partials", "*fp32", 4, 2304), ("rows", "*bf16", 2, 768)):
        tile_rows, tile_columns = launchers.tile_of(width, itemsize)
        constants = {"N": width, "ROWS": tile_rows, "COLS": tile_columns}
        types = {"x": kind, "out": "*fp32"}
        found.append(
            describe(f"column_sums[{name}]", kernels.column_sums_kernel, constants, types, num_warps=launchers.WARPS)
        )
    return found
