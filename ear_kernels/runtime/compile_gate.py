"""Cross-compile what calls launch, without a GPU: the machinery of :mod:`ear_kernels.compile_gate`.

The launches are recorded for each target as if on such a GPU, specialised by Triton itself, and compiled once each.
Fails on a failed compiler pass, on a spill that ``KNOWN_SPILLS`` does not state, on shared memory over the limit, and
on a WGMMA that takes its A operand from registers (ptxas 12.8 may use them again too early). AMD's registers and
spills are those of the code object's notes.

Needs a process in which triton was imported without TRITON_INTERPRET=1. A fixed selection is compiled
(:func:`covering`), or with ``--all`` everything.
"""

import argparse
import importlib
import multiprocessing
import re
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ear_kernels.runtime.launching import Processor, recording

Calls = Iterable[tuple[str, Callable[[], object]]]


@dataclass(frozen=True)
class Target:
    """A GPU to compile for: Triton's names of it, bytes of shared memory of a program, the kind that launches see."""

    backend: str
    architecture: int | str
    warp: int
    shared: int
    processor: Processor


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, Processor(8, 108)),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, Processor(9, 132)),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, Processor(10, 148)),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, Processor(0, 304, is_amd=True)),
}


@dataclass(frozen=True)
class Record:
    """One kernel in one specialisation, as Triton compiles it for a launch.

    Args:
        module, name: where the kernel is.
        call: the first example call that launches it.
        signature: type of every argument, "constexpr" for those that are compiled in.
        constexprs: their values, by path of the argument.
        attributes: what Triton knows of the others, divisibility by 16 for instance, by path.
        options: of the launch, such as ``num_warps``.
        parameters: values of the kernel's declared constexprs, by name.
    """

    module: str
    name: str
    call: str
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    parameters: dict[str, Any]

    def pointer_types(self) -> tuple[str, ...]:
        """Types of what its pointers and descriptors point to, each once."""
        return tuple(sorted(set(re.findall(r"(?:\*k?|tensordesc<)(\w+)", str(self.signature)))))


@dataclass(frozen=True)
class KnownSpill:
    """Bytes of a thread that a launch may spill, and why; more is a failure.

    Args:
        kernels: names.
        constexprs: what the launch has, among others, as text; a tuple lists alternatives.
        most: bytes.
        reason: why that launch is kept.
        targets: where; empty for everywhere.
        triton: the release that spills, "3.6" for instance; empty for any.
    """

    kernels: tuple[str, ...]
    constexprs: dict[str, str | tuple[str, ...]]
    most: int
    reason: str
    targets: tuple[str, ...] = ()
    triton: str = ""

    def covers(self, record: Record, target: str, release: str) -> bool:
        """Whether it is about this record, compiled for a target by a release of Triton."""
        return (
            record.name in self.kernels
            and (not self.targets or target in self.targets)
            and self.triton in ("", release)
            and all(
                str(record.parameters.get(name)) in ((values,) if isinstance(values, str) else values)
                for name, values in self.constexprs.items()
            )
        )


ATTENTION = ("attention_fwd_kernel", "attention_bwd_query_kernel", "attention_bwd_key_kernel")
ONE_WARP = "one warp a row needs no exchange and draws each target once; two would not spill and are not measured"
OUTSIDE = ("energy_rows_kernel", "energy_gaussian_kernel", "generator_kernel", "chain_kernel")
NOT_HOPPER = "sm_90 does not spill, and the configuration is chosen there"
DIVISION = "the frame of a 64-bit division, no spill"
KNOWN_SPILLS = (
    KnownSpill(ATTENTION, {"DIM": "80"}, 64, "two warps are the fastest of 18 launches on an H200"),
    KnownSpill(ATTENTION, {"BLOCK_D": "32"}, 24, "heads of 17 to 32 features, which no model here has"),
    KnownSpill(
        ("adaln_bwd_kernel",), {"BLOCK": "2048"}, 112, "0.64 ms at W = 1280 on an H200; the best that does not: 0.75"
    ),
    KnownSpill(("adaln_bwd_kernel",), {"BLOCK": "8192"}, 264, "a row and its sums fill the registers of 16 warps"),
    KnownSpill(
        ("generator_kernel",), {"COMPUTE": "fp32"}, 32, "exact float32 products, which no mixed precision has"
    ),
    KnownSpill(("generator_kernel",), {"WEIGHT": ("bf16", "fp16")}, 24, "the fastest on an H200", triton="3.6"),
    KnownSpill(("chain_kernel",), {"COMPUTE": "fp16"}, 8, "tiles that were chosen in bfloat16, which does not spill"),
    KnownSpill(("energy_gaussian_kernel",), {"N": "1"}, 96, "one sample, which the V-statistic alone has"),
    KnownSpill(OUTSIDE, {}, 120, NOT_HOPPER, ("sm_80", "sm_100")),
    KnownSpill(("pairwise_product_kernel",), {}, 32, NOT_HOPPER, ("sm_80",)),
    KnownSpill(("attention_kernel",), {}, 32, NOT_HOPPER, ("sm_80", "sm_100")),
    KnownSpill(ATTENTION, {"CAUSAL": "True"}, 32, NOT_HOPPER, ("sm_80", "sm_100")),
    KnownSpill(("field_gradients_kernel",), {"BLOCK_N": "16"}, 16, NOT_HOPPER, ("sm_80", "sm_100")),
    KnownSpill(("energy_gaussian_kernel",), {"BLOCK_N": "8", "BLOCK_D": "128"}, 8, "float64 with all that there is"),
    KnownSpill(("energy_rows_kernel",), {"BLOCK_N": "8", "BLOCK_D": "128"}, 56, ONE_WARP, triton="3.6"),
    KnownSpill(("energy_rows_kernel",), {"BLOCK_N": "16", "BLOCK_D": "64"}, 96, ONE_WARP, triton="3.6"),
    KnownSpill(("field_combine_kernel",), {}, 8, DIVISION, ("sm_80", "sm_100")),
    KnownSpill(("field_combine_kernel",), {"MODE": "3"}, 16, "float64: three words kept over calls of divisions"),
    KnownSpill(("energy_gaussian_kernel",), {"BLOCK_N": "4", "BLOCK_D": "256"}, 160, ONE_WARP),
    KnownSpill(("energy_gaussian_kernel",), {"BLOCK_R": "16"}, 64, ONE_WARP),
    KnownSpill(("energy_gaussian_kernel",), {"BLOCK_N": "32", "BLOCK_D": "64"}, 24, "many samples' sums"),
    KnownSpill(("energy_rows_kernel",), {"BLOCK_N": "4", "BLOCK_D": "256"}, 16, ONE_WARP),
)


class _Driver:
    """What Triton asks of a driver before it compiles, for a GPU that is not there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return gpu_target(self.name)


def gpu_target(name: str) -> Any:
    """Triton's description of one of ``TARGETS``."""
    from triton.backends.compiler import GPUTarget

    target = TARGETS[name]
    return GPUTarget(target.backend, target.architecture, target.warp)


def recorded(name: str, calls: Calls) -> list[Record]:
    """What ``calls`` launch on the target ``name``, every specialisation once, in the order of the calls.

    Triton binds and specialises the arguments itself, up to where it would compile.
    """
    import triton

    found: dict[tuple[str, str, str], Record] = {}

    def record(call: str, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not isinstance(kernel, triton.runtime.JITFunction):
            raise RuntimeError("kernels run in Triton's interpreter; unset TRITON_INTERPRET to compile them")

        def keep(*, key: str, compile: dict[str, Any], **_: Any) -> bool:
            """Called by Triton before it compiles; True is not to."""
            constants = compile["constants"]
            parameters = {each.name: constants[each.num,] for each in kernel.params if each.is_constexpr}
            launch_options = {name: value for name, value in options.items() if name not in parameters}
            specialised = compile["signature"], constants, compile["configs"][0]
            identity = kernel.__module__, kernel.__name__, key
            found.setdefault(identity, Record(*identity[:2], call, *specialised, launch_options, parameters))
            return True

        triton.knobs.runtime.jit_cache_hook = keep
        kernel.warmup(*arguments, grid=(1,), **options)

    triton.runtime.driver.set_active(_Driver(name))
    try:
        for call, run in calls:
            with recording(partial(record, call), TARGETS[name].processor):
                run()
    finally:
        triton.knobs.runtime.jit_cache_hook = None
        triton.runtime.driver.set_active(None)
    return list(found.values())


def covering(records: list[Record]) -> list[Record]:
    """Fewer records: of each kernel every value of every constexpr, all launch options and every choice of dtypes.

    Of several that would do, the one with the most arguments, and of those the first.
    """
    seen: set[tuple[str, ...]] = set()
    kept = []
    for record in sorted(records, key=lambda record: len(record.constexprs)):
        covered = {(record.name, name, str(value)) for name, value in record.parameters.items()}
        covered |= {
            (record.name, "options", str(record.options)),
            (record.name, "types", str(record.pointer_types())),
        }
        if not covered <= seen:
            seen |= covered
            kept.append(record)
    return kept


def labels(records: list[Record]) -> list[str]:
    """A name for each: its kernel, and whatever of dtypes, constexprs, options and arguments tells it from others."""

    def described(record: Record) -> dict[str, str]:
        parts = {"types": "/".join(record.pointer_types())}
        for name, value in record.parameters.items():
            parts[name] = (name if value else "") if isinstance(value, bool) else f"{name}={value}"
        for position, name in enumerate(record.signature):
            if name not in record.parameters:
                value = record.constexprs.get((position,), name)
                points = str(record.signature[name]).startswith(("*", "tensordesc"))
                parts[name] = f"{name}={value}" if value == 1 else name if points else ""
        return parts | {name: f"{name}={value}" for name, value in record.options.items()}

    descriptions = [described(record) for record in records]
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record, parts in zip(records, descriptions, strict=True):
        for name, text in parts.items():
            values[record.name, name].add(text)
    names = []
    for record, parts in zip(records, descriptions, strict=True):
        told = [text for name, text in parts.items() if text and len(values[record.name, name]) > 1]
        names.append(f"{record.name}[{' '.join(told)}]")
    return names


@dataclass(frozen=True)
class Compiled:
    """Of a compiled kernel: registers and bytes of spills of a thread, bytes of shared memory, WGMMAs with A in
    registers."""

    registers: int
    spilled: int
    shared: int
    unsafe: int


def resource_usage(asm: dict[str, Any]) -> tuple[int, int]:
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


def compile_record(record: Record, target: str) -> Compiled:
    """Compile for one of ``TARGETS``; raises whatever a compiler pass raises."""
    import triton
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(record.module), record.name)
    source = ASTSource(kernel, record.signature, record.constexprs, record.attributes)
    compiled = triton.compile(source, target=gpu_target(target), options=dict(record.options))
    registers, spilled = resource_usage(compiled.asm)
    unsafe = len(re.findall(r"wgmma\.mma_async[^;]*\},\s*\{", compiled.asm.get("ptx", "")))
    return Compiled(registers, spilled, compiled.metadata.shared, unsafe)


def _compile_and_send(sender: Connection, record: Record, target: str) -> None:
    try:
        sender.send(compile_record(record, target))
    except Exception as error:  # whatever a compiler pass raises is a failure of this record
        sender.send(f"{type(error).__name__}: {error}".splitlines()[0][:200])


def compile_alone(record: Record, target: str) -> tuple[Compiled | str, float]:
    """(result or the failure, seconds), in a process of its own: some failures of the compiler end theirs."""
    start = time.perf_counter()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_compile_and_send, args=(sender, record, target))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        result = f"the compiler ended its process with status {process.exitcode}"
    process.join()
    return result, time.perf_counter() - start


def allowed_spill(record: Record, target: str) -> int:
    """Bytes that the record may spill."""
    import triton

    release = ".".join(triton.__version__.split(".")[:2])
    return max((known.most for known in KNOWN_SPILLS if known.covers(record, target, release)), default=0)


def problems_of(record: Record, target: str, compiled: Compiled) -> list[str]:
    """What is wrong with a compiled record, if anything is."""
    found = []
    if compiled.spilled > allowed_spill(record, target):
        found.append("spills")
    if compiled.unsafe:
        found.append(f"{compiled.unsafe} WGMMAs with A in registers")
    if compiled.shared > TARGETS[target].shared:
        found.append(f"shared memory over {TARGETS[target].shared} B")
    return found


def lines(records: list[Record], names: list[str], target: str, jobs: int) -> Iterator[tuple[bool, str]]:
    """(whether it failed, a line of the table) for each record."""
    with ThreadPoolExecutor(jobs) as pool:
        results = pool.map(lambda record: compile_alone(record, target), records)
        for record, name, (result, seconds) in zip(records, names, results, strict=True):
            numbers, problems = "", [result] if isinstance(result, str) else problems_of(record, target, result)
            if isinstance(result, Compiled):
                numbers = f"{result.registers:4d} registers {result.spilled:5d} B spilled {result.shared:7d} B shared"
            yield (
                bool(problems),
                f"{'FAIL' if problems else 'ok':4s} {target:7s} {numbers} {seconds:5.1f} s  {name} "
                f"({record.call}) {'; '.join(problems)}",
            )


def run(
    calls: Callable[[], Calls],
    targets: list[str],
    pattern: str = "",
    everything: bool = False,
    part: tuple[int, int] = (0, 1),
    jobs: int = 2,
) -> int:
    """Record and compile, every n-th of ``part`` (i, n), from i; print a line each, return the number of failures."""
    failures = 0
    for target in targets:
        records = recorded(target, calls())
        total = len(records)
        if not everything:
            records = covering(records)
        chosen = [(record, name) for record, name in zip(records, labels(records), strict=True) if pattern in name]
        chosen = chosen[part[0] :: part[1]]
        print(f"{target}: {len(chosen)} of {total} specialisations", flush=True)
        for failed, line in lines([each[0] for each in chosen], [each[1] for each in chosen], target, jobs):
            failures += failed
            print(line, flush=True)
    return failures


def main(calls: Callable[[], Calls]) -> int:
    """The command: compile what ``calls`` launch; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    parser.add_argument("--only", default="", help="part of a line's name")
    parser.add_argument("--all", action="store_true", help="every specialisation for every target")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="every N-th from I on")
    parser.add_argument("--jobs", type=int, default=2, help="compiler processes at a time")
    arguments = parser.parse_args()
    targets = arguments.target or list(TARGETS)
    failures = run(calls, targets, arguments.only, arguments.all, tuple(arguments.part), arguments.jobs)
    print(f"{failures} failures")
    return 1 if failures else 0
