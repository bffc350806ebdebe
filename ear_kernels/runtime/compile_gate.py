"""Cross-compile every shipped kernel without a GPU; ``python -m ear_kernels.runtime.compile_gate`` prints the table.

Fails on a spill, on shared memory over the limit, on a failed compiler pass, and on a WGMMA that takes its A operand
from registers (ptxas 12.8 may use them again too early). Needs a process in which triton was
imported without TRITON_INTERPRET=1. For AMD only the passes and the shared memory are checked: the wheel has no tool
that reads its spills except the code object's own notes, which are read where they say something.
"""

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ShippedKernel:
    """One kernel in one configuration that the package launches: what the compile gate compiles.

    Args:
        name: shown by the gate.
        kernel: the ``@triton.jit`` function.
        signature: Triton type of every argument that is no constexpr, for instance ``"*fp32"`` or ``"i32"``. Pointers
            and integers named here are taken to be divisible by 16.
        constexprs: value of every constexpr, and of every integer argument that is specialised to 1.
        num_warps, num_stages: launch options.
        options: further launch options, such as ``maxnreg`` (NVIDIA only).
        undivided: integers of the signature that need not be divisible by 16.
        max_spills: registers that may spill; anything but 0 needs a reason beside it.
        known_spills: bytes that may spill with one compiler on one target, ``("3.6", "sm_80")`` for instance, and no
            more; each needs a reason beside it. Other compilers and targets stay at ``max_spills``.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    max_spills: int = 0
    targets: tuple[str, ...] = field(default=("sm_80", "sm_90", "sm_100", "gfx942"))
    options: dict[str, Any] = field(default_factory=dict)
    undivided: frozenset[str] = frozenset()
    known_spills: dict[tuple[str, str], int] = field(default_factory=dict)


# Modules with a function ``shipped() -> list[ShippedKernel]``; a new kernel joins the compile gate here.
SHIPPED_MODULES = (
    "ear_kernels.ops.adamw.shipped",
    "ear_kernels.ops.attention.shipped",
    "ear_kernels.ops.energy_loss.shipped",
    "ear_kernels.ops.generator.shipped",
    "ear_kernels.ops.transformer.shipped",
)


def shipped_kernels() -> list[ShippedKernel]:
    """Every configuration of every kernel that the package launches (imports Triton)."""
    return [kernel for name in SHIPPED_MODULES for kernel in importlib.import_module(name).shipped()]


# Bytes of shared memory that one program may have.
TARGETS: dict[str, tuple[str, Any, int, int]] = {
    "sm_80": ("cuda", 80, 32, 163 * 1024),
    "sm_90": ("cuda", 90, 32, 227 * 1024),
    "sm_100": ("cuda", 100, 32, 227 * 1024),
    "gfx942": ("hip", "gfx942", 64, 64 * 1024),
}


def resource_usage(asm: dict[str, Any], metadata: Any) -> tuple[int, int]:
    """(registers a thread, bytes of spills a thread) of a compiled kernel.

    NVIDIA: ``cuobjdump --dump-resource-usage`` of the cubin: what does not fit into registers is on the stack (our
    kernels have no arrays of their own there). AMD: the assembler's notes.
    """
    if "cubin" in asm:
        import triton

        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            text = subprocess.run(
                [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        registers = [int(value) for value in re.findall(r"REG:(\d+)", text)]
        stack = [int(value) for value in re.findall(r"STACK:(\d+)", text)]
        return max(registers), max(stack)
    text = asm.get("amdgcn", "")
    registers = [int(value) for value in re.findall(r"\.vgpr_count:\s*(\d+)", text)]
    spills = [int(value) for value in re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)]
    return max(registers, default=0), 4 * max(spills, default=0)


def compile_for(shipped: ShippedKernel, target: str) -> tuple[int, int, int, int]:
    """(registers, spilled bytes, shared memory, WGMMAs with A in registers) of ``shipped`` for one of ``TARGETS``.

    Raises whatever a compiler pass raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    backend, architecture, warp, _ = TARGETS[target]
    position = {name: index for index, name in enumerate(shipped.kernel.arg_names)}
    signature = {name: shipped.signature.get(name, "constexpr") for name in shipped.kernel.arg_names}
    constexprs = {(position[name],): value for name, value in shipped.constexprs.items()}
    attributes = {
        (position[name],): [["tt.divisibility", 16]]
        for name, kind in shipped.signature.items()
        if kind.startswith("*") or (kind.startswith("i") and name not in shipped.undivided)
    }
    options = {"num_warps": shipped.num_warps, "num_stages": shipped.num_stages}
    options |= shipped.options if backend == "cuda" else {}
    compiled = triton.compile(
        ASTSource(shipped.kernel, signature, constexprs, attributes),
        target=GPUTarget(backend, architecture, warp),
        options=options,
    )
    registers, spilled = resource_usage(compiled.asm, compiled.metadata)
    unsafe = len(re.findall(r"wgmma\.mma_async[^;]*\},\s*\{", compiled.asm.get("ptx", "")))
    return registers, spilled, compiled.metadata.shared, unsafe


def run(targets: list[str], pattern: str = "") -> int:
    """Compile all, print a line each, and return the number of failures."""
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    failures = 0
    for shipped in shipped_kernels():
        for target in targets:
            if target not in shipped.targets or pattern not in shipped.name:
                continue
            start, problems, numbers = time.perf_counter(), [], ""
            try:
                registers, spilled, shared, unsafe = compile_for(shipped, target)
            except Exception as error:  # whatever a compiler pass raises is a failure of this configuration
                problems.append(f"{type(error).__name__}: {error}".splitlines()[0][:200])
            else:
                numbers = f"{registers:4d} registers {spilled:5d} B spilled {shared:7d} B shared"
                if spilled > shipped.known_spills.get((version, target), 4 * shipped.max_spills):
                    problems.append("spills")
                if unsafe:
                    problems.append(f"{unsafe} WGMMAs with A in registers")
                if shared > TARGETS[target][3]:
                    problems.append(f"shared memory over {TARGETS[target][3]} B")
            failures += bool(problems)
            print(
                f"{'FAIL' if problems else 'ok':4s} {target:7s} {numbers} {time.perf_counter() - start:5.1f} s  "
                f"{shipped.num_warps} warps  {shipped.name} {'; '.join(problems)}",
                flush=True,
            )
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--only", default="", help="part of a kernel's name")
    arguments = parser.parse_args()
    failures = run(arguments.target or list(TARGETS), arguments.only)
    print(f"{failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
