"""What the compile gate compiles of the generator: AdaLN, the SiLU network and the persistent few-rows kernel."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import triton.language as tl

from ear_kernels.launch import ShippedKernel, dependent_launch
from ear_kernels.ops.adaln import autograd as adaln
from ear_kernels.ops.adaln import kernels as adaln_kernels
from ear_kernels.ops.generator import few_rows
from ear_kernels.ops.generator import kernels as generator_kernels
from ear_kernels.ops.silu_ffn import autograd as ffn
from ear_kernels.ops.silu_ffn import configs
from ear_kernels.ops.silu_ffn import kernels as ffn_kernels

# Counts of rows and what follows from them; sizes of the model are multiples of 16.
COUNTS = frozenset(
    {
        "rows", "group", "chunks", "unit_rows", "units", "units_per_program", "rows_per_program", "size", "M", "D",
        "samples", "layers", "first_phase", "last_phase", "threshold", "length",
    }
)  # fmt: skip
TYPES = {
    "index": "*i32",
    "table": "*i64",
    "counter": "*i32",
    "mean": "*fp32",
    "rstd": "*fp32",
    "partials": "*fp32",
    "eps": "fp32",
    "temperature": "fp32",
}
INTEGERS = COUNTS | {"N", "K", "W", "noise_dim", "input_dim"}
HOPPER = ("sm_90",)
NVIDIA = ("sm_80", "sm_90", "sm_100")
EVERYWHERE = (*NVIDIA, "gfx942")
# Bytes that triton 3.6, the H200 machine's, spills beyond ``max_spills``; 3.8 and 3.9 do not.
KNOWN_SPILLS = {
    # The launch is the H200's fastest. Loads right before their use bring sm_80 to 64, but change the code that was
    # measured on sm_90.
    "adaln_bwd[1536, group 1]": {"sm_80": 112},
}


def describe(
    name: str,
    kernel: Any,
    constexprs: dict[str, Any],
    types: dict[str, str] | None = None,
    targets: tuple[str, ...] = EVERYWHERE,
    num_warps: int = 4,
    max_spills: int = 0,
    **options: Any,
) -> ShippedKernel:
    """A kernel whose pointers are bf16 and whose scalars are integers, but for ``types`` and ``TYPES``."""
    signature = {}
    for argument in kernel.arg_names:
        if argument in constexprs:
            continue
        kind = "i32" if argument in INTEGERS or argument.startswith("stride_") else "*bf16"
        signature[argument] = (types or {}).get(argument) or TYPES.get(argument, kind)
    return ShippedKernel(
        name, kernel, signature, constexprs, num_warps, 3, max_spills, targets, options, COUNTS & set(signature)
    )


def _rowwise() -> Iterator[ShippedKernel]:
    norm = {"weight": "*fp32", "bias": "*fp32"}
    forward = dict.fromkeys(("HAS_RESIDUAL", "HAS_SHIFT", "HAS_WEIGHT", "HAS_BIAS", "SAVE_STATS"), True) | {
        "HAS_INDEX": False
    }
    backward = {
        **dict.fromkeys(("HAS_WEIGHT", "HAS_BIAS", "HAS_RESIDUAL", "HAS_PREVIOUS", "REBUILD"), True),
        **dict.fromkeys(("SINGLE", "SUM_AFFINE", "SUM_FFN", "SUM_MODULATION"), True),
        "HAS_INDEX": False,
        "STORE_SHIFT": False,
        "SUMS": 6,
    }
    shared = {"SINGLE": False, "STORE_SHIFT": True, "SUM_MODULATION": False, "SUMS": 3}
    for width in (96, 384, 1024, 1280, 1536):
        targets = EVERYWHERE if width in (1024, 1536) else HOPPER
        size = {"WIDTH": width, "BLOCK": adaln.block_of(width)}
        warps = adaln.warps_of(width)
        for dependent in (False, True):
            yield describe(
                f"adaln_fwd[{width}{', dependent' if dependent else ''}]", adaln_kernels.adaln_fwd_kernel,
                forward | size | dict.fromkeys(("DEPENDENT", "FOLLOWED"), dependent), norm,
                HOPPER if dependent else targets, warps, **dependent_launch(dependent),
            )  # fmt: skip
        for group, flags in ((1, {}), (4, shared)):
            config = adaln.backward_config(width, group)
            options = {"maxnreg": config.registers} if config.registers else {}
            yield describe(
                f"adaln_bwd[{width}, group {group}]", adaln_kernels.adaln_bwd_kernel,
                backward | flags | size | {"STAGES": config.stages}, norm, targets, config.warps,
                # At 2,048 lanes 24 to 64 bytes: the fastest launch measured, 0.64 ms at W = 1280 against 0.75 for the
                # best that does not spill (16 warps, 64 registers).
                max_spills=16 if width > 1024 else 0, **options,
            )  # fmt: skip
        yield describe(
            f"silu_bwd[{width}]", ffn_kernels.silu_bwd_kernel,
            size | {"STORE_ACTIVE": True, "STAGES": ffn.POINTWISE_STAGES}, None, targets, warps,
        )  # fmt: skip
    size = {"WIDTH": 1024, "BLOCK": 1024}
    yield describe("silu_fwd", ffn_kernels.silu_fwd_kernel, {"WIDTH": 1024, "BLOCK": 4096}, num_warps=8)
    yield describe("gate_fwd", ffn_kernels.gate_fwd_kernel, size)
    yield describe("gate_bwd", ffn_kernels.gate_bwd_kernel, size)


def _linears() -> Iterator[ShippedKernel]:
    for epilogue, entries in configs.HOPPER.items():
        shipped = {config for entry in entries for config in (entry.config, entry.saving) if config}
        for config in sorted(shipped | {configs.CANDIDATES[epilogue]}, key=lambda config: config.name):
            for extra, dependent in ((True, False),) if epilogue == "dsilu" else ((True, False), (False, True)):
                transposed = epilogue != "dsilu"
                half = config.bn // config.split
                tiles = {
                    "a_desc": (config.bm, config.bk),
                    "b_desc": (config.bn, config.bk) if transposed else (config.bk, config.bn),
                    **{f"{key}_desc": (config.bm, half) for key in ("extra", "residual", "gate", "out")},
                }
                types = {name: f"tensordesc<bf16[{rows}, {cols}]>" for name, (rows, cols) in tiles.items()}
                constants = {
                    "EPILOGUE": ffn._EPILOGUE_NUMBERS[epilogue],
                    "HAS_BIAS": transposed,
                    "STORE_EXTRA": extra,
                    "B_TRANSPOSED": transposed,
                    "BM": config.bm,
                    "BN": config.bn,
                    "BK": config.bk,
                    "GROUP_M": config.group_m,
                    "SPLIT": config.split,
                    "FLATTEN": config.flatten,
                    "DEPENDENT": dependent,
                }
                absent: tuple[str, ...] = ()
                if epilogue != "gate":
                    absent += ("gate_desc",) + (("residual_desc",) if epilogue == "silu" else ("bias",))
                absent += () if extra else ("extra_desc",)
                absent += () if epilogue == "dsilu" else ("partials",)
                yield describe(
                    f"linear_{epilogue}[{config.name}{', saving' if extra else ''}]", ffn_kernels.linear_kernel,
                    constants | dict.fromkeys(absent), types, HOPPER, config.warps, num_stages=config.stages,
                    **dependent_launch(dependent),
                )  # fmt: skip


def _few_rows() -> Iterator[ShippedKernel]:
    for most, widest, half, single in few_rows.TABLE:
        for config, kind, dtype in ((half, tl.bfloat16, torch.bfloat16), (single, tl.float32, torch.float32)):
            width, line = min(widest, 1536), 128 // dtype.itemsize
            constants = {
                "BARRIERS": True,
                **dict.fromkeys(("WEIGHT", "NORM"), kind),
                "W": width,
                "COMPUTE": tl.bfloat16,
                "PRECISION": "tf32",
                "BM": config.bm,
                "BN": config.bn,
                "BK": config.bk,
                "PARTS": config.parts,
                "STAGES": config.stages,
                "BN_MOD": config.bn_mod,
                "BK_MOD": config.bk_mod,
                "STAGES_MOD": config.stages_mod,
                "AHEAD": config.ahead,
                "BLOCK": adaln.block_of(width),
                "LINES": adaln.block_of(width) // line,
                "LINE": line,
            }
            yield describe(
                f"generator[{most} rows, width {width}, {dtype} weights]",
                generator_kernels.generator_kernel,
                constants, None, NVIDIA if most == 16 and kind is tl.bfloat16 else HOPPER, config.warps,
                # triton 3.6 puts 8 to 24 bytes on the stack, 3.8 none: the fastest launches measured, with 3.6.
                max_spills=6 if kind is tl.bfloat16 else 0, launch_cooperative_grid=True,
            )  # fmt: skip


def shipped() -> list[ShippedKernel]:
    """Every configuration that the launchers' tables hold, at the paper's widths and two small ones."""
    return [
        replace(kernel, known_spills={("3.6", target): spilled for target, spilled in known.items()})
        for kernel in (*_rowwise(), *_linears(), *_few_rows())
        for known in (KNOWN_SPILLS.get(kernel.name, {}),)
    ]
