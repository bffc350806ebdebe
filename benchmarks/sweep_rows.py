"""The generator's forward without gradients: candidates for the static tables, checked and timed on a GPU.

    python benchmarks/sweep_rows.py out.json        # about a minute and a half on an H200
    TRITON_INTERPRET=1 python benchmarks/sweep_rows.py --dry out.json      # the same path on a CPU, tiny

Bf16 weights in CUDA graphs at few to 2,048 rows; float32 weights under autocast at 65,536. Every candidate's error
against float64 must be at most twice eager's. Prints the fastest of each case beside what the tables choose, and the
kernels of one replay of theirs at 1,024 rows. Candidates are compiled by several processes first.
"""

import argparse
import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.timing import environment
from ear_kernels import FusedMLPGenerator
from ear_kernels.ops.generator import few_rows, inference
from ear_kernels.ops.generator.few_rows import FewConfig
from ear_kernels.ops.generator.inference import Plan
from ear_kernels.ops.silu_ffn import configs
from ear_kernels.ops.silu_ffn.configs import GemmConfig

DRY = not torch.cuda.is_available()
DEVICE, DTYPE = ("cpu", torch.float16) if DRY else ("cuda", torch.bfloat16)
SIZES = {"2x64": (2, 64)} if DRY else {"6x1024": (6, 1024), "12x1536": (12, 1536)}
WHOLE_SIZES = SIZES if DRY else {**SIZES, "8x1280": (8, 1280)}
FEW, SOME, MANY = ((4, 40), (80,), 96) if DRY else ((4, 64), (256, 1024, 2048), 65_536)
PROCESSES = 12


@dataclass(frozen=True)
class Candidate:
    """What is set for a call; "table" leaves the tables' own choice."""

    few: FewConfig | str = "table"
    plan: Plan | str = "table"
    silu: GemmConfig | str | None = "table"
    gate: GemmConfig | str | None = "table"

    @property
    def name(self) -> str:
        if isinstance(self.few, FewConfig):
            return str(self.few)[9:]
        tiles = [tile.name if isinstance(tile, GemmConfig) else tile or "cuBLAS" for tile in (self.silu, self.gate)]
        plan = str(self.plan)[4:] if isinstance(self.plan, Plan) else self.plan
        return "the tables" if [plan, *tiles] == ["table"] * 3 else f"{plan} silu {tiles[0]} gate {tiles[1]}"


def gemms() -> list[GemmConfig | None]:
    """Tiles that fill the GPU in some wave at 256 to 2,048 rows and do not spill; cuBLAS."""
    sizes = [(64, 64, 4, 4), (64, 64, 6, 4), (64, 128, 4, 4), (128, 64, 4, 4), (128, 64, 5, 8), (128, 128, 4, 8)]
    tiles: list[GemmConfig | None] = [GemmConfig(m, n, 64, s, w, flatten=False) for m, n, s, w in sizes]
    if DRY:
        return [tiles[0], None]
    tiles.append(GemmConfig(64, 64, 128, 3, 4, flatten=False))
    return [*tiles, GemmConfig(128, 64, 64, 3, 4, flatten=False, per_sm=2), None]


PLANS = (
    Plan(),
    Plan(dependent=True),
    Plan("first", dependent=True),
    Plan("beside", streams=1, dependent=True),
    Plan("beside", streams=2, dependent=True),
    Plan("beside", streams=1, urgent=True, dependent=True),
    Plan("beside", streams=2, urgent=True, dependent=True),
    Plan("beside", streams=2, urgent=True),
)


def few_candidates(width: int, rows: int) -> list[Candidate]:
    """The table's entry and what lies round it, one change at a time."""
    base = few_rows.config_for(rows, width)
    if base.bm == 16:
        others = [
            replace(base, parts=1),
            replace(base, ahead=0),
            replace(base, bk=256, stages=4 if base.bk == 128 else 3),
            replace(base, bk=128, stages=6, bn_mod=32, stages_mod=6),
            replace(base, bn=8, bk=256, stages=4),
            replace(base, bn_mod=64 if base.bn_mod == 32 else 32, stages_mod=4),
        ]
    else:
        others = [
            replace(base, ahead=0),
            replace(base, bn_mod=32, bk_mod=128, stages_mod=4),
            replace(base, bn=8, stages=6),
            replace(base, bn=16, stages=5),
            replace(base, bk=64, stages=8),
        ]
    return [Candidate(), *(Candidate(few=config) for config in dict.fromkeys(others) if config != base)]


def dry(plan: Plan | str) -> Plan | str:
    """Without what the interpreter cannot do."""
    return replace(plan, dependent=False) if DRY and isinstance(plan, Plan) else plan


@contextlib.contextmanager
def applied(candidate: Candidate) -> Iterator[None]:
    """Put a candidate into the tables."""
    before = few_rows.TABLE, inference.TABLE
    tiles = {name: getattr(candidate, name) for name in ("silu", "gate") if getattr(candidate, name) != "table"}
    if isinstance(candidate.few, FewConfig):
        few_rows.TABLE = ((few_rows.MOST_ROWS, few_rows.MOST_WIDTH, candidate.few, candidate.few),)
    plan = dry(candidate.plan)
    if isinstance(plan, Plan):
        inference.TABLE = ((0, 0, plan),)
    try:
        with configs.overriding(**tiles):
            yield
    finally:
        few_rows.TABLE, inference.TABLE = before


@contextlib.contextmanager
def eager() -> Iterator[None]:
    os.environ["EAR_KERNELS_BACKEND"] = "eager"
    try:
        yield
    finally:
        os.environ["EAR_KERNELS_BACKEND"] = "triton"


def make(depth: int, width: int) -> FusedMLPGenerator:
    torch.manual_seed(0)
    with torch.device(DEVICE):
        generator = FusedMLPGenerator(768, width, 16, depth=depth, noise_dim=64)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2)
    return generator.eval()


def inputs(rows: int, *samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.rand(rows, *samples, 64, device=DEVICE, dtype=DTYPE) - 0.5
    return torch.randn(rows, 768, device=DEVICE, dtype=DTYPE), noise


def seconds(call: Callable[[], object], launches: int) -> float:
    """Of one call, on the GPU's clock."""
    if DRY:
        begin_s = time.perf_counter()
        call()
        return time.perf_counter() - begin_s
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(launches):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / launches / 1e3


def captured(call: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], Callable[[], torch.Tensor]]:
    """(replay, output after it) of a call in a CUDA graph."""
    if DRY:
        return call, call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def output() -> torch.Tensor:
        graph.replay()
        return out

    return graph.replay, output


class Case:
    """One size and number of rows: candidates are checked as they are added, then timed in turns."""

    def __init__(self, size: str, rows: int, many: bool = False) -> None:
        self.size, self.rows, self.many = size, rows, many
        generator = make(*WHOLE_SIZES[size])
        self.generator = generator if many else generator.to(DTYPE)
        self.arguments = inputs(rows // 4, 4) if many else inputs(rows)
        few = tuple(tensor[:512] for tensor in self.arguments)
        with eager(), torch.no_grad():
            self.exact = copy.deepcopy(self.generator).double()(*(tensor.double() for tensor in few))
            self.eager_error = self._error(self.call()[: len(few[0])])
        self.calls: dict[Candidate | str, Callable[[], object]] = {"eager": self._prepare()}
        self.errors: dict[Candidate | str, float] = {"eager": self.eager_error}

    def _error(self, out: torch.Tensor) -> float:
        return float((out.double() - self.exact).square().mean().sqrt())

    def call(self) -> torch.Tensor:
        with torch.no_grad(), torch.autocast(DEVICE, DTYPE, enabled=self.many):
            return self.generator(*self.arguments)

    def _prepare(self) -> Callable[[], object]:
        def run() -> torch.Tensor:
            with eager():
                return self.call()

        return run if self.many else captured(run)[0]

    def add(self, candidate: Candidate) -> None:
        """Check the candidate; a failure is printed and the candidate left out."""
        if candidate in self.calls:
            return
        try:
            with applied(candidate):
                if self.many:

                    def run() -> torch.Tensor:
                        with applied(candidate):
                            return self.call()

                    replay: Callable[[], object] = run
                    out = run()
                else:
                    replay, output = captured(self.call)
                    out = output()
            error = self._error(out[: len(self.exact)])
            if not error <= 2 * self.eager_error:
                raise AssertionError(f"error {error:.5f}, eager {self.eager_error:.5f}")
            self.calls[candidate], self.errors[candidate] = replay, error
        except Exception as problem:  # one candidate that fails must not end the run
            print(f"FAILED {self.size} {self.rows} {candidate.name}: {problem!r:.300}", flush=True)

    def time(self, rounds: int = 5) -> dict[Candidate | str, float]:
        """Milliseconds: medians of rounds in which each candidate has its turn: the clock changes with the load."""
        times: dict[Candidate | str, list[float]] = {name: [] for name in self.calls}
        launches = 2 if self.many else max(5, min(50, 16_384 // self.rows))
        for call in self.calls.values():
            call()
        for _ in range(1 if DRY else rounds):
            for name, call in self.calls.items():
                times[name].append(1e3 * seconds(call, launches))
        return {name: statistics.median(values) for name, values in times.items()}

    def report(self, times: dict[Candidate | str, float], records: list[dict[str, Any]], most: int = 5) -> None:
        ranked = sorted(times, key=lambda name: times[name])
        print(f"{self.size}, {self.rows} rows", flush=True)
        for place, name in enumerate(ranked):
            label = name if isinstance(name, str) else name.name
            records.append(
                {"size": self.size, "rows": self.rows, "name": label, "ms": times[name], "error": self.errors[name]}
            )
            if place < most or label in ("eager", "the tables"):
                print(f"   {times[name]:8.4f} ms  error {self.errors[name]:.5f}  {label}", flush=True)


def some_rows(case: Case) -> dict[Candidate | str, float]:
    """Tiles of either GEMM first, one at a time in one plan; then the plans with the best of both and with cuBLAS."""
    plan = Plan("first", dependent=True)
    tiles = gemms()
    best: dict[str, GemmConfig | str | None] = {}
    for which in ("silu", "gate"):
        candidates = [replace(Candidate(plan=plan), **{which: tile}) for tile in tiles]
        for candidate in candidates:
            case.add(candidate)
        times = case.time(3)
        known = [candidate for candidate in candidates if candidate in times]
        if known:
            best[which] = getattr(min(known, key=lambda candidate: times[candidate]), which)
    case.add(Candidate())
    for arrangement in PLANS:
        case.add(Candidate(plan=arrangement, **best))  # type: ignore[arg-type]
    for arrangement in (Plan(), Plan("beside", streams=2, urgent=True, dependent=True)):
        case.add(Candidate(plan=arrangement, silu=None, gate=None))
    return case.time()


def many_rows(case: Case) -> dict[Candidate | str, float]:
    wide, square = configs.CANDIDATES["silu"], configs.CANDIDATES["gate"]
    for candidate in (
        Candidate(),
        Candidate(silu=None, gate=None),
        Candidate(silu=wide, gate=square),
    ):
        case.add(candidate)
    return case.time(3)


def profile(case: Case) -> dict[str, Any]:
    """Kernels of one replay of what the tables choose."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    replay = case.calls[Candidate()]
    with profiler(activities=[ProfilerActivity.CUDA]) as run:
        for _ in range(3):
            replay()
        torch.cuda.synchronize()
    found = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in run.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    last = sorted(found, key=lambda event: event[1])[-(len(found) // 3) :]
    kernels: dict[str, list[float]] = {}
    for name, begin, end in last:
        kernels.setdefault(name, []).append(end - begin)
    span = max(end for _, _, end in last) - min(begin for _, begin, _ in last) if last else 0.0
    print(f"{case.size}, {case.rows} rows, one replay: {span:.1f} us, {len(last)} kernels")
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1])):
        print(f"   {sum(times):7.1f} us  {len(times):3d} x {statistics.mean(times):6.2f}  {name[:100]}")
    return {"span_us": span, "kernels": kernels, "timeline": last}


def warm(part: int, parts: int) -> None:
    """Compile every ``parts``-th candidate by calling it once."""
    work: list[tuple[str, int, Candidate]] = []
    for size, (_, width) in SIZES.items():
        work += [(size, rows, candidate) for rows in FEW for candidate in few_candidates(width, rows)]
    for tile in gemms():
        for dependent in (True, False):
            plan = Plan("first", dependent=dependent)
            for size in SIZES:
                work.append((size, SOME[-1], Candidate(plan=plan, silu=tile, gate=tile)))
    made: dict[str, FusedMLPGenerator] = {}
    for size, rows, candidate in work[part::parts]:
        if size not in made:
            made[size] = make(2, SIZES[size][1]).to(DTYPE)
        with contextlib.suppress(Exception), torch.no_grad(), applied(candidate):
            made[size](*inputs(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry", action="store_true", help="allow a run without a GPU")
    parser.add_argument("--warm", default="", help="i/n: compile the i-th part of n only")
    arguments = parser.parse_args()
    if DRY and not arguments.dry:
        raise SystemExit("no GPU; --dry runs the script's paths on the CPU")
    os.environ["EAR_KERNELS_BACKEND"] = "triton"
    begin = time.perf_counter()
    if arguments.warm:
        warm(*(int(value) for value in arguments.warm.split("/")))
        return
    if DRY:
        warm(0, 9)
    else:
        command = [sys.executable, "-W", "ignore", __file__, str(arguments.out), "--warm"]
        for process in [subprocess.Popen([*command, f"{part}/{PROCESSES}"]) for part in range(PROCESSES)]:
            process.wait()
    print(f"[{time.perf_counter() - begin:.0f} s] compiled", flush=True)
    records: list[dict[str, Any]] = []
    result: dict[str, Any] = {"environment": environment(), "times": records, "profiles": {}}
    for size in SIZES:
        for rows in (*FEW, *SOME):
            case = Case(size, rows)
            if rows in FEW:
                for candidate in few_candidates(case.generator.width, rows):
                    case.add(candidate)
                case.report(case.time(), records)
            else:
                case.report(some_rows(case), records)
                if rows == 1024:
                    with contextlib.suppress(Exception):  # the times are what matters
                        result["profiles"][size] = profile(case)
            arguments.out.write_text(json.dumps(result, indent=1))
        print(f"[{time.perf_counter() - begin:.0f} s]", flush=True)
    for size in WHOLE_SIZES:
        case = Case(size, MANY, many=True)
        case.report(many_rows(case), records, most=12)
        arguments.out.write_text(json.dumps(result, indent=1))
        print(f"[{time.perf_counter() - begin:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
