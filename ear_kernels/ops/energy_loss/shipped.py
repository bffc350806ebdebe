"""Every configuration of the energy-loss kernels that the launchers use, for the compile gate.

The tables cover each branch of the configurations in ``launch.py`` and each switch of the kernels, with the shapes of
EAR, CALM, ensembles and fields first. Sizes that share a configuration are compiled once.
"""

from dataclasses import replace
from typing import Any

from ear_kernels import launch
from ear_kernels.launch import ShippedKernel
from ear_kernels.ops.energy_loss import kernels, kernels_distance, kernels_field, kernels_gaussian

_SWITCHES = {
    "MODE": 1,
    "SINGLE": False,
    "HAS_EPS": False,
    "HAS_ROOT": False,
    "HAS_MASK": False,
    "HAS_WEIGHT": False,
    "HAS_DENOMINATOR": False,
    "REDUCE": True,
    "REFINE": True,
    "SAMPLE_GRADIENT": True,
    "TARGET_GRADIENT": False,
    "PARAMETER_GRADIENT": False,
    "MANY": False,
    "ROW_DIMS": 1,
    "DOUBLE": False,
    "ROUNDS": 7,
}
_EVERYTHING: dict[str, Any] = {
    "MODE": 0, "HAS_EPS": True, "HAS_ROOT": True, "HAS_MASK": True, "HAS_WEIGHT": True, "HAS_DENOMINATOR": True,
    "TARGET_GRADIENT": True, "PARAMETER_GRADIENT": True, "ROW_DIMS": 3,
}  # fmt: skip

_STRIDES = (
    "stride_x0",
    "stride_xn",
    "stride_y0",
    "stride_ym",
    "stride_gx0",
    "stride_gxn",
    "stride_gy0",
    "stride_gym",
)


def describe(
    name: str, kernel: Any, num_warps: int, dtype: str = "fp32", ones: tuple[str, ...] = (), num_stages: int = 3,
    **constexprs: Any,
) -> ShippedKernel:  # fmt: skip
    """A ShippedKernel from the kernel's own parameters: pointers by their names, switches from ``_SWITCHES``.

    ``dtype`` is that of samples, targets and gradients; ``ones`` are integer arguments specialised to 1.
    """
    working = "fp64" if dtype == "fp64" else "fp32"
    pointers = {"mask_ptr": "*i1", "seed_ptr": "*i64", "norm_ptr": f"*{working}"}
    working_pointers = (
        "weight_ptr",
        "denominator_ptr",
        "loss_ptr",
        "inverse_ptr",
        "slope_ptr",
        "normal_ptr",
        "total_ptr",
    )
    signature: dict[str, str] = {}
    values: dict[str, Any] = {}
    for parameter in kernel.params:
        argument = parameter.name
        if parameter.is_constexpr:
            values[argument] = constexprs.get(argument, _SWITCHES.get(argument))
        elif argument.endswith("_ptr"):
            gradient = "fp32" if argument.startswith("g") and dtype == "fp16" else dtype
            default = f"*{working}" if argument in working_pointers else f"*{gradient}"
            signature[argument] = pointers.get(argument, default)
        elif argument.endswith("_"):
            signature[argument] = "fp64"
        elif argument in ones or (
            argument.endswith("d") and argument.startswith("stride_") and "std" not in argument
        ):
            values[argument] = 1
        else:
            signature[argument] = "i32"
    return ShippedKernel(name, kernel, signature, values, num_warps, num_stages)


def _rows(name: str, n: int, features: int, dtype: str = "fp32", ones: tuple[str, ...] = (), **switches: Any):
    config = launch.energy_rows_config(n, features, dtype == "fp64")
    assert config is not None
    return describe(
        f"energy_rows[{name}]", kernels.energy_rows_kernel, config.num_warps, dtype, ones, N=n,
        BLOCK_R=config.block_r, BLOCK_N=config.block_n, BLOCK_D=config.block_d, SINGLE=features == 1, **switches,
    )  # fmt: skip


def _gaussian(name: str, n: int, features: int, dtype: str = "fp32", ones: tuple[str, ...] = (), **switches: Any):
    general = switches.get("MODE") == 0 or switches.get("PARAMETER_GRADIENT", False)
    config = launch.energy_gaussian_config(n, features, dtype == "fp64", general)
    assert config is not None
    shipped = describe(
        f"energy_gaussian[{name}]", kernels_gaussian.energy_gaussian_kernel, config.num_warps, dtype, ones, N=n,
        UNROLL=config.unroll, REFINE=switches.get("PARAMETER_GRADIENT", False),
        BLOCK_R=config.block_r, BLOCK_N=config.block_n, BLOCK_D=config.block_d, SINGLE=features == 1, **switches,
    )  # fmt: skip
    return replace(shipped, options={"maxnreg": config.registers}) if config.registers else shipped


def _field(
    name: str, n: int, features: int, dtype: str = "fp32", ones: tuple[str, ...] = (), **switches: Any
) -> list[ShippedKernel]:
    config = launch.energy_field_config(n, features, dtype == "fp64")
    sizes = {"N": n, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d, "DOUBLE": dtype == "fp64", **switches}
    block_c = max(1, min(launch.next_power_of_two(n + 1), 1024 // config.block_n))
    return [
        describe(f"field_norms[{name}]", kernels_field.field_norms_kernel, config.num_warps, dtype, ones, **sizes),
        describe(
            f"field_combine[{name}]", kernels_field.field_combine_kernel, 4, dtype, ones, BLOCK_C=block_c, **sizes
        ),
        describe(
            f"field_gradients[{name}]", kernels_field.field_gradients_kernel, config.num_warps, dtype, ones, **sizes
        ),
    ]


def shipped() -> list[ShippedKernel]:
    """The list for ``launch.shipped_kernels``."""
    masked: dict[str, Any] = {"HAS_MASK": True, "HAS_DENOMINATOR": True}
    distance = [
        describe(
            f"{kernel.__name__}[{name}]", kernel, config.num_warps, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_D=config.block_d, MODE=mode, SAME=same, num_stages=config.num_stages,
        )
        for name, kernel, config, mode, same in (
            ("xy", kernels_distance.pairwise_exact_kernel, launch.PAIRWISE_EXACT, 1, False),
            ("xx general alpha", kernels_distance.pairwise_exact_kernel, launch.PAIRWISE_EXACT, 0, True),
            ("xy", kernels_distance.pairwise_product_kernel, launch.PAIRWISE_PRODUCT, 1, False),
            ("xx general alpha", kernels_distance.pairwise_product_kernel, launch.PAIRWISE_PRODUCT_GENERAL, 0, True),
        )
    ]  # fmt: skip
    # The product of "xy" fills the registers of sm_80; triton 3.6 leaves 8 B over.
    distance[2] = replace(distance[2], known_spills={("3.6", "sm_80"): 8})
    return [
        _rows("EAR", 2, 16, ones=("m",)),
        # Every integer that a call may have as 1, which Triton turns into a constant.
        _rows("one of everything", 2, 1, ones=("rows", "m", "features", *_STRIDES), **masked),
        _gaussian("one of everything", 2, 1, ones=("rows", "m", "features", *_STRIDES)),
        *_field("one of everything", 2, 10**4, ones=("m", "blocks", "partner_blocks", *_STRIDES)),
        _rows("EAR masked bf16", 2, 16, "bf16", ones=("m",), **masked),
        _rows("EAR masked fp16", 2, 16, "fp16", ones=("m",), **masked),
        _rows("EAR 4 samples, general alpha", 4, 16, ones=("m",), MODE=0),
        _rows("EAR fp64, everything", 2, 16, "fp64", **{**_EVERYTHING, "DOUBLE": True, "REFINE": False}),
        _rows("ensemble", 16, 1, ones=("m",)),
        _rows("ensemble of 64, general alpha", 64, 1, MODE=0, HAS_WEIGHT=True),
        _rows("CALM with given targets", 8, 128, MANY=True),
        # 56 B with one warp; two would spill 16 B on sm_90 with triton 3.9.
        replace(_rows("everything", 8, 128, MANY=True, **_EVERYTHING), known_spills={("3.6", "sm_100"): 56}),
        _rows("largest tile", 64, 64, MANY=True, MODE=0, TARGET_GRADIENT=True),
        _gaussian("CALM", 8, 128),
        _gaussian("CALM bf16", 8, 128, "bf16"),
        _gaussian("CALM, gradients of the targets", 8, 128, PARAMETER_GRADIENT=True, **masked),
        _gaussian("CALM, everything", 8, 128, **_EVERYTHING),
        _gaussian("largest tile", 16, 256),
        _gaussian("small", 2, 16),
        *_field("8 samples", 8, 10**6),
        *_field("everything", 16, 3000, **_EVERYTHING),
        describe(
            "gaussian_normals", kernels_gaussian.gaussian_normals_kernel, 4, BLOCK_D=1024
        ),
        describe("sum_partials", kernels.sum_partials_kernel, 16, BLOCK=16384),
        describe("scale_gradient", kernels.scale_gradient_kernel, 4, BLOCK=1024),
        *distance,
    ]  # fmt: skip
