"""Launches behind the static tables: every candidate of one kernel, checked and timed on a GPU.

    python -m benchmarks.sweep norm gelu --out FILE.json       # all sweeps without a name; a minute or two each

A candidate takes the place of what the package would choose, and the public operation runs with it. Its results are
held against eager's, without dropout; its time is that of the kernels which the sweep names, by the profiler. The
tables have the fastest first.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.bench_generator import SIZES, FewRows, eager_backend
from benchmarks.clocks import DEVICE, HAS_GPU, Call, graphed, profiled, wall_milliseconds
from benchmarks.harness import EAGER, OURS
from ear_kernels import functional
from ear_kernels.ops.generator import launch_adaln, launch_chain, launch_few_rows
from ear_kernels.ops.generator.launch_ffn import GemmConfig, using_gemms
from ear_kernels.ops.transformer import launch, launch_attention
from ear_kernels.runtime.launching import RowConfig, next_power_of_two

# Without a GPU tiny sizes in Triton's interpreter, which gets bf16 wrong, show that the sweeps run.
LOW = torch.bfloat16 if HAS_GPU else torch.float16
ROWS, MANY, WIDTHS = (20_480, 65_536, (768, 1024, 1280)) if HAS_GPU else (6, 6, (24,))
FEW_SIZES = {name: SIZES[name] for name in ("6x1024", "12x1536")} if HAS_GPU else {"2x64": (2, 64)}
Choice = Callable[[], AbstractContextManager]
Run = Callable[[str, float], dict[str, Tensor]]


@dataclass(frozen=True)
class Sweep:
    """One kernel at one shape.

    Args:
        name: of kernel and shape.
        kernels: regular expression of the kernels whose time counts.
        run: from "exact", "eager" or "ours" and a dropout: results and gradients by name.
        choices: by name, a context in which the candidate is chosen.
        dropout: of what is timed.
        in_graph: whether that is a CUDA graph.
    """

    name: str
    kernels: str
    run: Run
    choices: dict[str, Choice]
    dropout: float = 0.0
    in_graph: bool = False

    def milliseconds(self) -> float:
        call: Call = lambda: self.run(OURS, self.dropout)  # noqa: E731
        if not HAS_GPU:
            return wall_milliseconds([call], budget_s=0.01, rounds=1)["median"]
        table = profiled([graphed(call) if self.in_graph else call], least=10).table
        return sum(kernel["ms"] for kernel in table if re.search(self.kernels, kernel["name"]))

    def records(self) -> Iterator[dict[str, Any]]:
        """Error over eager's and ms of every candidate, or why it failed."""
        with eager_backend():
            wanted = {which: self.run(which, 0.0) for which in ("exact", EAGER)}

        def scale(name: str, exact: Tensor) -> float:
            """Of what a vector's gradient sums up over the rows, most cancels."""
            return (MANY**0.5 if exact.ndim == 1 else 1.0) * float(exact.abs().max())

        for name, choice in {"the table's": nullcontext, **self.choices}.items():
            record: dict[str, Any] = {"sweep": self.name, "choice": name}
            try:
                with choice():
                    found = wanted | {OURS: self.run(OURS, 0.0)}
                    record["error_over_eager"] = harness.check_results(found.__getitem__, OURS, scale)
                    record["ms"] = self.milliseconds()
            except Exception as error:  # a launch that does not fit is a row of the table
                record["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            yield record


def operation(function: Callable[..., Any], shapes: dict[str, tuple[int, ...]]) -> Run:
    """Forward and backward of ``function(*inputs, dropout)`` on normal inputs; residual and vectors are float32."""

    @functools.cache
    def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
        g, made = torch.Generator(DEVICE).manual_seed(0), {}
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=g, device=DEVICE) * (shape[-1] ** -0.5 if "weight_" in name else 1)
            value = value if len(shape) == 1 or name == "residual" else value.to(LOW)
            made[name] = (value.double() if dtype == torch.float64 else value).requires_grad_()
        return made

    def run(which: str, dropout: float) -> dict[str, Tensor]:
        given = inputs(torch.float64 if which == "exact" else LOW)
        out = function(*given.values(), dropout)
        outputs = out if isinstance(out, tuple) else (out,)
        gradients = torch.autograd.grad(outputs, list(given.values()), [torch.ones_like(each) for each in outputs])
        return {f"out {n}": each.detach() for n, each in enumerate(outputs)} | dict(
            zip(given, gradients, strict=True)
        )

    return run


def choosing(owner: Any, name: str, values: Iterable[Any]) -> dict[str, Choice]:
    """Candidates in the place of ``owner.name``: a constant, or the function that chooses."""

    def choice(value: Any) -> AbstractContextManager:
        is_function = callable(getattr(owner, name))
        return patch.object(owner, name, (lambda *given: value) if is_function else value)

    return {f"{name} {value}": functools.partial(choice, value) for value in values}


def row_configs(programs: Iterable[int]) -> list[RowConfig]:
    return [RowConfig(*sizes) for sizes in (product((2, 4, 8), (1, 2, 3, 4), programs) if HAS_GPU else [(4, 2, 3)])]


def add_norm(branch: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    x, out = functional.dropout_add_layer_norm(branch, residual, weight, bias, dropout=dropout)
    return x, out.to(branch.dtype)


def norm() -> Iterator[Sweep]:
    for width in WIDTHS:
        shapes = {"branch": (ROWS, width), "residual": (ROWS, width), "weight": (width,), "bias": (width,)}
        forward, backward = (2, 4, 8), row_configs((264, 396, 528, 792))
        for way, name, values in (("fwd", "norm_forward_warps", forward), ("bwd", "norm_backward_config", backward)):
            choices, run = choosing(launch, name, values), operation(add_norm, shapes)
            yield Sweep(f"norm {way} {ROWS} x {width}", f"dropout_add_layer_norm_{way}", run, choices, 0.1)


def gelu() -> Iterator[Sweep]:
    width = WIDTHS[0]
    shapes = {"x": (ROWS, width), "weight_in": (4 * width, width), "weight_out": (width, 4 * width)}
    run = operation(lambda x, one, two, p: functional.gelu_mlp(x, one, None, two, None, dropout=p), shapes)
    for direction, constant in (("fwd", "GELU_PROGRAMS"), ("bwd", "PROGRAMS")):
        choices = choosing(launch, constant, (264, 528, 1056, 2112, 4224))
        yield Sweep(f"GELU {direction} {ROWS} x {4 * width}", f"gelu_dropout_{direction}", run, choices, 0.1)


def attention() -> Iterator[Sweep]:
    batch, length = (64, 320) if HAS_GPU else (2, 20)
    for heads, dim in ((12, 64), (16, 80)) if HAS_GPU else ((2, 16),):
        shapes = {"x": (batch, length, heads * dim), "weight_qkv": (3 * heads * dim, heads * dim)}
        run = operation(lambda x, w, p, heads=heads: functional.self_attention(x, w, None, heads, dropout=p), shapes)
        choices = choosing(launch_attention, "keys_and_warps", product((32, 64, 128), (2, 4, 8)))
        yield Sweep(f"attention, {heads} heads of {dim}", "attention", run, choices, 0.1)


def adaln() -> Iterator[Sweep]:
    for width in (1024, 1280, 1536) if HAS_GPU else WIDTHS:
        shapes = {name: (MANY, width) for name in ("hidden", "shift", "scale")} | {
            "weight": (width,),
            "bias": (width,),
        }
        run = operation(lambda *given: functional.adaln_modulate(*given[:5]), shapes)
        table, block = launch_adaln.BACKWARD_ROWS, max(512, next_power_of_two(width))
        configs = row_configs((132, 264, 396, 528))
        choices: dict[str, Choice] = {
            str(config): functools.partial(patch.dict, table, {block: (config, config)}) for config in configs
        }
        yield Sweep(f"AdaLN bwd {MANY} x {width}", "adaln.*bwd", run, choices)


def generator_run(size: tuple[int, int], rows: int) -> Run:
    """The whole forward of a few rows."""
    made = functools.cache(functools.partial(FewRows, size, rows))
    return lambda which, dropout: {"out": made(which)()}


def few() -> Iterator[Sweep]:
    changes: list[dict[str, int]] = [{"ahead": 0}, {"ahead": 32}, {"bn": 8}, {"bn": 16}, {"bk": 128}, {"bk": 256}]
    changes += [{"stages": 4}, {"stages": 6}, {"bn_mod": 32}, {"bn_mod": 64}, {"stages_mod": 4}, {"parts": 1}]
    tiles: list[dict[str, int]] = [{"bn": 32}, {"bn": 64}, {"bn": 128}, {"bk": 64}, {"stages": 3}, {"stages": 6}]
    for name, size in FEW_SIZES.items():
        base = launch_few_rows.config_for(64, size[1])
        whole = dict.fromkeys(replace(base, **change) for change in changes)
        choices = choosing(launch_few_rows, "config_for", whole)
        yield Sweep(f"{name}, 64 rows", ".", generator_run(size, 64), choices, in_graph=True)
        chains = [launch_chain.ChainConfig(8, bn, parts) for bn, parts in product((8, 16, 32), (4, 8))]
        made = launch_chain.modulation_config(4, LOW)
        choices = choosing(launch_chain, "chain_config", chains) | choosing(
            launch_chain, "modulation_config", dict.fromkeys(replace(made, **change) for change in tiles)
        )
        yield Sweep(f"{name}, 4 rows", ".", generator_run(size, 4), choices, in_graph=True)


def gemm() -> Iterator[Sweep]:
    tiles = [(64, 64, 4, 4), (64, 64, 6, 4), (64, 128, 4, 4), (128, 64, 4, 4), (128, 64, 5, 8), (128, 128, 4, 8)]
    configs = [None, *(GemmConfig(m, n, 64, stages, warps) for m, n, stages, warps in tiles if HAS_GPU)]
    configs += [GemmConfig(128, 256, 64, 3, 8, split=2, flatten=True)] if HAS_GPU else []
    choices: dict[str, Choice] = {
        f"{epilogue} {config or 'cuBLAS'}": functools.partial(using_gemms, **{epilogue: config})
        for epilogue, config in product(("silu", "gate"), configs)
    }
    for (name, size), rows in product(FEW_SIZES.items(), (256, 1024, 2048, MANY) if HAS_GPU else (80,)):
        yield Sweep(f"{name}, {rows} rows", ".", generator_run(size, rows), choices, in_graph=True)


SWEEPS = {sweep.__name__: sweep for sweep in (few, gemm, adaln, norm, gelu, attention)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SWEEPS), help=f"of {', '.join(SWEEPS)}")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    records: list[dict[str, Any]] = []
    for sweep in (sweep for name in options.names for sweep in SWEEPS[name]()):
        found = sorted(sweep.records(), key=lambda record: record.get("ms", float("inf")))
        records += found
        print(sweep.name)
        for record in found:
            print(
                f"  {record.get('ms', float('nan')):9.4f} ms  {record['choice']} {record.get('failed', '')}"[:150],
                flush=True,
            )
        if options.out:
            harness.write_json(options.out, {"environment": harness.environment(), "rows": records})
    return int(all("failed" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
