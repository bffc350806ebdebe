"""Every shipped config of the generator's and the transformer block's kernels compiles within shared memory, and on
sm_90 without spills.

Runs in a process of its own, because compiling needs Triton without its interpreter. As a script it prints the table:
``python tests/kernels/test_generator_compile_gate.py``.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448, "gfx942": 65_536}
ROOT = Path(__file__).parents[2]


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return numbers["REG"], numbers["STACK"] + numbers["LOCAL"]


def compile_for(fn: Any, target: int | str, types: dict[str, str], constants: dict[str, Any], **options: Any) -> dict:
    """Compile one kernel; ``types`` gives the non-pointer arguments, every other one is ``types['*']``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    amd = isinstance(target, str)
    signature, attributes = {}, {}
    for position, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types.get(name) or ("i32" if name.startswith("stride_") else types["*"])
        # As a launch would specialise the generator's sizes: aligned pointers, multiples of 16.
        if (
            signature[name].startswith("*")
            or name.startswith("stride_")
            or name in ("N", "K", "W", "noise_dim", "input_dim")
        ):
            attributes[(position,)] = [["tt.divisibility", 16]]
    if amd:
        options.pop("maxnreg", None)
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)
    gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", target, 32)
    kernel = triton.compile(source, target=gpu, options=options)
    result = {"shared": kernel.metadata.shared, "limit": SHARED_LIMIT[target], "registers": 0, "spills": 0}
    if amd:
        counts = re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", kernel.asm["amdgcn"])
        result["spills"] = sum(map(int, counts))
    else:
        result["registers"], result["spills"] = _resources(kernel.asm["cubin"])
        # A WGMMA whose A operand is a register list: ptxas 12.8 may reuse those registers too early.
        result["register_a"] = len(re.findall(r"wgmma\.mma_async[^;]*\},\s*\{", kernel.asm["ptx"]))
    return result


INTEGERS = {
    name: "i32"
    for name in [
        "rows",
        "group",
        "chunks",
        "unit_rows",
        "units",
        "units_per_program",
        "rows_per_program",
        "size",
        "M",
        "N",
        "K",
        "W",
        "layers",
        "D",
        "first_phase",
        "last_phase",
        "samples",
        "noise_dim",
        "input_dim",
    ]
}
FLOATS = {"eps": "fp32", "temperature": "fp32", "mean": "*fp32", "rstd": "*fp32", "partials": "*fp32"}
COMMON = {"*": "*bf16", "index": "*i32", "table": "*i64", "counter": "*i32", **INTEGERS, **FLOATS}


def cases():
    """(name, target, arguments of compile_for)."""
    import triton.language as tl

    from ear_kernels.ops.adaln import autograd as adaln
    from ear_kernels.ops.adaln import kernels as adaln_kernels
    from ear_kernels.ops.generator import few_rows
    from ear_kernels.ops.generator import kernels as few_kernels
    from ear_kernels.ops.silu_ffn import autograd as ffn
    from ear_kernels.ops.silu_ffn import configs
    from ear_kernels.ops.silu_ffn import kernels as ffn_kernels

    master = {**COMMON, "weight": "*fp32", "bias": "*fp32"}
    forward = {
        "HAS_INDEX": False,
        "HAS_RESIDUAL": True,
        "HAS_SHIFT": True,
        "HAS_WEIGHT": True,
        "HAS_BIAS": True,
        "SAVE_STATS": True,
    }
    backward = {
        "HAS_INDEX": False,
        "HAS_WEIGHT": True,
        "HAS_BIAS": True,
        "HAS_RESIDUAL": True,
        "HAS_PREVIOUS": True,
        "REBUILD": True,
        "STORE_SHIFT": False,
        "SINGLE": True,
        "SUM_AFFINE": True,
        "SUM_FFN": True,
        "SUM_MODULATION": True,
        "SUMS": 6,
    }
    everywhere: tuple[int | str, ...] = (80, 90, 100, "gfx942")
    for width, targets in ((96, (90,)), (384, (90,)), (1024, everywhere), (1280, (90,)), (1536, everywhere)):
        size = {"WIDTH": width, "BLOCK": adaln.block_of(width)}
        for target in targets:
            yield (
                f"adaln_fwd {width}", target, adaln_kernels.adaln_fwd_kernel, master, {**forward, **size},
                {"num_warps": adaln.warps_of(width)},
            )  # fmt: skip
            for group, flags in (
                (1, {}),
                (4, {"SINGLE": False, "STORE_SHIFT": True, "SUM_MODULATION": False, "SUMS": 3}),
            ):
                config = adaln.backward_config(width, group)
                options = {"num_warps": config.warps}
                if config.registers:
                    options["maxnreg"] = config.registers
                yield (
                    f"adaln_bwd {width} group {group}", target, adaln_kernels.adaln_bwd_kernel, master,
                    {**backward, **flags, **size, "STAGES": config.stages}, options,
                )  # fmt: skip
            yield (
                f"silu_bwd {width}", target, ffn_kernels.silu_bwd_kernel, COMMON,
                {**size, "STORE_ACTIVE": True, "STAGES": ffn.POINTWISE_STAGES}, {"num_warps": adaln.warps_of(width)},
            )  # fmt: skip
    for target in everywhere:
        size = {"WIDTH": 1024, "BLOCK": 1024}
        yield (
            "silu_fwd",
            target,
            ffn_kernels.silu_fwd_kernel,
            COMMON,
            {"WIDTH": 1024, "BLOCK": 4096},
            {"num_warps": 8},
        )
        yield "gate_fwd", target, ffn_kernels.gate_fwd_kernel, COMMON, size, {"num_warps": 4}
        yield "gate_bwd", target, ffn_kernels.gate_bwd_kernel, COMMON, size, {"num_warps": 4}
    yield from transformer_cases(everywhere)
    for epilogue, entries in configs.HOPPER.items():
        shipped = {config for _, config in entries if config} | {configs.CANDIDATES[epilogue]}
        for config in sorted(shipped, key=lambda config: config.name):
            for extra in (True,) if epilogue == "dsilu" else (True, False):
                transposed = epilogue != "dsilu"
                b = (config.bn, config.bk) if transposed else (config.bk, config.bn)
                half = config.bn // config.split
                types = {**COMMON, "bias": "*bf16"}
                for name, (first, second) in {
                    "a_desc": (config.bm, config.bk),
                    "b_desc": b,
                    **{f"{key}_desc": (config.bm, half) for key in ("extra", "residual", "gate", "out")},
                }.items():
                    types[name] = f"tensordesc<bf16[{first}, {second}]>"
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
                }
                absent = {"silu": ("residual_desc", "gate_desc"), "gate": (), "dsilu": ("gate_desc", "bias")}[
                    epilogue
                ]
                absent += () if extra else ("extra_desc",)
                absent += () if epilogue == "dsilu" else ("partials",)
                constants |= dict.fromkeys(absent)
                yield (
                    f"linear {epilogue} {config.name}{' saving' if extra else ''}", 90, ffn_kernels.linear_kernel,
                    types, constants, {"num_warps": config.warps, "num_stages": config.stages},
                )  # fmt: skip
    for most, widest, half, single in few_rows.TABLE:
        for config, kind, line in ((half, tl.bfloat16, 64), (single, tl.float32, 32)):
            for target in (80, 90, 100) if most == 16 and kind is tl.bfloat16 else (90,):
                constants = {
                    "W": min(widest, 1536),
                    "WEIGHT": kind,
                    "NORM": kind,
                    "COMPUTE": tl.bfloat16,
                    "PRECISION": "tf32",
                    "BARRIERS": True,
                    "PREFETCH": True,
                    "BM": config.bm,
                    "BN": config.bn,
                    "BK": config.bk,
                    "STAGES": config.stages,
                    "BN_MOD": config.bn_mod,
                    "BK_MOD": config.bk_mod,
                    "STAGES_MOD": config.stages_mod,
                    "PIECE": adaln.block_of(min(widest, 1536)),
                    "LINES": adaln.block_of(min(widest, 1536)) // line,
                    "LINE": line,
                }
                yield (
                    f"generator, rows <= {most}, width <= {widest}, {kind} weights",
                    target,
                    few_kernels.generator_kernel,
                    COMMON,
                    constants, {"num_warps": config.warps, "launch_cooperative_grid": True},
                )  # fmt: skip


def transformer_cases(everywhere: tuple[int | str, ...]):
    """The backbone's widths: 768, 1024 and 1280 (heads of 64, 64 and 80)."""
    from ear_kernels.ops.adaln.autograd import block_of
    from ear_kernels.ops.transformer import autograd as transformer
    from ear_kernels.ops.transformer import kernels

    stream = dict.fromkeys(("residual", "x", "grad_x", "grad_residual", "weight", "bias", "branch_bias"), "*fp32")
    types = {**COMMON, **stream, "seed": "*i64", "threshold": "i32", "scale": "fp32", "length": "i32"}
    for width, targets in ((768, everywhere), (1024, (90,)), (1280, everywhere)):
        size = {"WIDTH": width, "BLOCK": block_of(width)}
        options = {"num_warps": transformer.warps_of(width)}
        for target in targets:
            yield (
                f"dropout_add_layer_norm_fwd {width}", target, kernels.dropout_add_layer_norm_fwd_kernel, types,
                {**size, "DROPOUT": True, "HAS_BRANCH_BIAS": True}, options,
            )  # fmt: skip
            yield (
                f"dropout_add_layer_norm_bwd {width}", target, kernels.dropout_add_layer_norm_bwd_kernel, types,
                {**size, "DROPOUT": True, "HAS_GRAD_X": True, "STAGES": 3}, options,
            )  # fmt: skip
            heads = {"DIM": 80 if width == 1280 else 64, "STAGES": 2}
            yield f"pack_heads {width}", target, kernels.pack_heads_kernel, types, {**size, **heads}, options
    flat = {"WIDTH": 3072, "BLOCK": transformer.COLUMNS, "DROPOUT": True, "STAGES": 2}
    options = {"num_warps": transformer.warps_of(transformer.COLUMNS)}
    for target in everywhere:
        yield "gelu_dropout_fwd", target, kernels.gelu_dropout_fwd_kernel, types, flat, options
        yield "gelu_dropout_bwd", target, kernels.gelu_dropout_bwd_kernel, types, flat, options


def main(part: int = 0, parts: int = 1) -> None:
    for name, target, fn, types, constants, options in itertools.islice(cases(), part, None, parts):
        try:
            result = compile_for(fn, target, types, constants, **options)
        except Exception as error:  # the table is the point: one failure must not hide the others
            result = {"error": repr(error)[:300]}
        print(json.dumps({"name": name, "target": target, **result}), flush=True)


@pytest.mark.slow
def test_every_shipped_config_compiles_cleanly() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{ROOT}:{environment.get('PYTHONPATH', '')}"
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, part, "2"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for part in ("0", "1")
    ]
    results = []
    for run in runs:
        output, errors = run.communicate()
        assert run.returncode == 0, errors[-2000:]
        results += [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(results) > 40
    broken = []
    for result in results:
        if (
            "error" in result
            or result["shared"] > result["limit"]
            or result.get("register_a")
            or (result["spills"] and result["target"] == 90)
        ):
            broken.append(result)
    assert not broken, "\n".join(map(str, broken))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
