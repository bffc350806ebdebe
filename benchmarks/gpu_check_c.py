# ruff: noqa: B023, E501, E731 (timed closures are called in the iteration that makes them; tables are long)
"""One call on a GPU: correctness of the generator's kernels, then the times that decide the static table.

    python benchmarks/gpu_check_c.py            # about 5 minutes on an H200; JSON to $OUT/gpu_check_c.json
    python benchmarks/gpu_check_c.py --only few_rows,pool

Sections run in order of importance, each on its own: one failure loses one section. ``--seconds`` (330) is a budget:
sections that have not started by then are skipped.
"""

import argparse
import contextlib
import copy
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F

from ear_kernels import FusedMLPGenerator, adaln_modulate, gated_silu_ffn

RESULTS: list[dict] = []
LINES: list[str] = []
START = time.time()
PEAK_COPY = 4.28  # TB/s, docs/performance.md


def say(line: str) -> None:
    LINES.append(line)
    print(line, flush=True)


def record(section: str, **values) -> None:
    RESULTS.append({"section": section, **values})
    say(
        f"[{section}] " + "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
    )


def backend(name: str) -> None:
    os.environ["EAR_KERNELS_BACKEND"] = name


def time_ms(fn: Callable[[], object], launches: int = 10, rounds: int = 5) -> float:
    """Median over rounds of the time of one call; ``launches`` calls between two events."""
    for _ in range(3):
        fn()
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(launches):
            fn()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / launches)
    return statistics.median(times)


def graph_ms(fn: Callable[[], object], launches: int = 50) -> float:
    """Time of one replay of a CUDA graph of ``fn``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return time_ms(graph.replay, launches)


def make(width: int, depth: int, input_dim: int = 768, seed: int = 0) -> FusedMLPGenerator:
    torch.manual_seed(seed)
    generator = FusedMLPGenerator(input_dim, width, 16, depth=depth, noise_dim=64)
    for parameter in generator.parameters():
        std = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2
        torch.nn.init.normal_(parameter, std=std)
    return generator.cuda()


def worst(ours: dict, eager: dict, exact: dict) -> tuple[str, float, float]:
    """(name, our error relative to the exact size, our error over eager's) of the tensor with the largest ratio."""
    rows = []
    for name, truth in exact.items():
        if truth.numel() == 0:
            continue
        size = truth.double().square().mean().sqrt().item() + 1e-30
        a = (ours[name].double() - truth.double()).square().mean().sqrt().item()
        b = (eager[name].double() - truth.double()).square().mean().sqrt().item()
        rows.append((a / (b + 1e-7 * size) if a == a else float("inf"), name, a / size))
    ratio, name, error = max(rows)
    return name, error, ratio


# ---------------------------------------------------------------------------------------------- correctness


def leaves_run(function, tensors, grad, dtype) -> dict:
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return {"out": out.detach(), **{str(i): g for i, g in enumerate(grads)}}


def check_ops() -> None:
    from ear_kernels.ops.silu_ffn import configs

    def eager_adaln(h, shift, scale, w, b):
        return F.layer_norm(h, h.shape[-1:], w, b, 1e-6) * (1 + scale) + shift

    def eager_ffn(h, u, g, w1, b1, w2, b2):
        return h + g * F.linear(F.silu(F.linear(u, w1, b1)), w2, b2)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for width, rows in ((1024, 4099), (1280, 517), (1536, 517), (1152, 33), (384, 1), (96, 4101)):
            torch.manual_seed(width)
            draw = lambda *s: torch.randn(*s, device="cuda", dtype=dtype)
            grad = draw(rows, width)
            tensors = [draw(rows, width), draw(rows, width), draw(rows, width), draw(width), draw(width)]
            backend("triton")
            ours = leaves_run(adaln_modulate, tensors, grad, dtype)
            again = leaves_run(adaln_modulate, tensors, grad, dtype)
            same = all(torch.equal(ours[k], again[k]) for k in ours)
            eager, exact = (leaves_run(eager_adaln, tensors, grad, d) for d in (dtype, torch.float64))
            name, error, ratio = worst(ours, eager, exact)
            record(
                "check",
                op="adaln",
                dtype=str(dtype)[6:],
                width=width,
                worst=name,
                error=error,
                ratio=ratio,
                same=same,
            )
            weights = [
                draw(width, width) / width**0.5,
                draw(width),
                draw(width, width) / width**0.5,
                draw(width),
            ]
            tensors = [*tensors[:3], *weights]
            eager, exact = (leaves_run(eager_ffn, tensors, grad, d) for d in (dtype, torch.float64))
            table = dict(configs.CANDIDATES)
            for plan, options in (("cublas", dict.fromkeys(configs.EPILOGUES)), ("triton", table)):
                if dtype == torch.float32 and plan == "triton":
                    continue
                with configs.overriding(**options):
                    ours = leaves_run(gated_silu_ffn, tensors, grad, dtype)
                name, error, ratio = worst(ours, eager, exact)
                record(
                    "check",
                    op=f"ffn {plan}",
                    dtype=str(dtype)[6:],
                    width=width,
                    worst=name,
                    error=error,
                    ratio=ratio,
                )


def generator_run(generator, z, noise, grad, name, autocast=None, **options) -> dict:
    backend(name)
    generator.zero_grad(set_to_none=True)
    z = z.detach().clone().requires_grad_()
    context = torch.autocast("cuda", autocast) if autocast else contextlib.nullcontext()
    with context:
        out = generator(z, noise, **options)
    out.backward(grad.to(out.dtype))
    result = {"out": out.detach(), "z": z.grad}
    return result | {name: p.grad.clone() for name, p in generator.named_parameters()}


def check_generator() -> None:
    for width, depth, tokens, samples, options in (
        (1024, 3, 1031, 4, {}),
        (1280, 2, 515, 2, {}),
        (96, 2, 7, 1, {}),
        (1024, 3, 1031, 4, {"noise_pool": 1000}),
        (1536, 2, 300, 2, {"noise_pool": 32}),
    ):
        z = torch.randn(tokens, 768, device="cuda")
        noise = torch.rand(tokens, samples, 64, device="cuda") - 0.5
        grad = torch.randn(tokens, samples, 16, device="cuda")
        generator = make(width, depth)
        double = copy.deepcopy(generator).double()
        exact = generator_run(double, z.double(), noise.double(), grad.double(), "eager", **options)
        for autocast in (torch.bfloat16, torch.float16, None):
            eager = generator_run(generator, z, noise, grad, "eager", autocast, **options)
            ours = generator_run(generator, z, noise, grad, "triton", autocast, **options)
            name, error, ratio = worst(ours, eager, exact)
            record(
                "check", op="generator", width=width, autocast=str(autocast)[6:], pool=options.get("noise_pool", 0),
                worst=name, error=error, ratio=ratio,
            )  # fmt: skip
        half = copy.deepcopy(generator).bfloat16()
        with torch.no_grad():
            for rows in (1, 5, 64, 128, 1000):
                zs, ns = z[:rows].bfloat16(), noise[:rows, 0].bfloat16()
                outs = []
                for name in ("triton", "eager"):
                    backend(name)
                    outs.append(half(zs, ns))
                backend("eager")
                truth = copy.deepcopy(half).double()(zs.double(), ns.double())
                _, error, ratio = worst({"o": outs[0]}, {"o": outs[1]}, {"o": truth})
                record("check", op="few rows", width=width, rows=min(rows, tokens), error=error, ratio=ratio)


# ---------------------------------------------------------------------------------------------- times


def gemms() -> None:
    """cuBLAS rate, and every Triton variant with its epilogue against cuBLAS + the pointwise kernel."""
    from ear_kernels.ops.silu_ffn import autograd as ffn
    from ear_kernels.ops.silu_ffn.configs import GemmConfig as G

    variants = [
        G(128, 256, 64, 3, 8, split=2),
        G(128, 256, 64, 3, 8, split=2, flatten=False),
        G(128, 256, 64, 3, 8, flatten=False),
        G(128, 256, 64, 3, 8),
        G(128, 128, 64, 4, 8),
        G(128, 128, 64, 4, 8, flatten=False),
        G(128, 128, 64, 3, 4, flatten=False),
        G(256, 128, 64, 3, 8, split=2),
        G(128, 128, 128, 2, 8),
        G(128, 128, 64, 2, 4, flatten=False, per_sm=2),
    ]
    for width in (1024, 1536):
        rows = 65536
        draw = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)
        mod, x, w, b = draw(rows, 3 * width), draw(rows, width), draw(width, width) / width**0.5, draw(width)
        u, gate, h = mod[:, :width], mod[:, 2 * width :], draw(rows, width)
        out, extra = torch.empty_like(h), torch.empty_like(h)
        flops = 2 * rows * width * width / 1e9

        def rate(name: str, ms: float, flops: float = flops, width: int = width) -> None:
            record("gemm", width=width, what=name, ms=ms, tflops=flops / ms)

        rate("cublas linear", time_ms(lambda: ffn.linear(x, w, b, out)))
        rate("cublas linear, strided input", time_ms(lambda: ffn.linear(u, w, b, out)))
        rate("cublas linear into a third of [R, 3W]", time_ms(lambda: torch.mm(x, w, out=gate)))
        rate("cublas weight gradient fp32 out", time_ms(lambda: torch.mm(x.t(), h, out_dtype=torch.float32)))
        rate("cublas weight gradient bf16 out", time_ms(lambda: torch.mm(x.t(), h)))
        w3 = draw(3 * width, width) / width**0.5
        rate("cublas modulation 3W", time_ms(lambda: ffn.linear(x, w3, None, mod)), 3 * flops)
        ds = draw(rows, width)
        rate("cublas ds += dmod W, beta=1", time_ms(lambda: ds.addmm_(mod, w3)), 3 * flops)
        record("gemm", width=width, what="silu pointwise", ms=time_ms(lambda: ffn.silu(x)))
        record(
            "gemm",
            width=width,
            what="silu_bwd pointwise",
            ms=time_ms(lambda: ffn.silu_backward(x, h, extra, out)),
        )
        record("gemm", width=width, what="gate pointwise", ms=time_ms(lambda: ffn.gate_residual(h, x, gate, 1)))
        for config in variants:
            for epilogue, options in (
                ("silu", {"bias": b}),
                ("silu", {"bias": b, "extra": extra}),
                ("gate", {"bias": b, "residual": h, "gate": gate}),
                ("gate", {"bias": b, "extra": extra, "residual": h, "gate": gate}),
                ("dsilu", {"extra": extra, "residual": h}),
            ):
                what = f"{epilogue}{' saving' if 'extra' in options else ''} {config.name}"
                try:
                    ms = time_ms(lambda: ffn.launch_linear(config, epilogue, x, w, out, **options))
                    rate(what, ms)
                except Exception as error:
                    record("gemm", width=width, what=what, failed=repr(error)[:80])


def rowwise() -> None:
    """LN + modulation: GB/s of forward, and of the fused backward for several launches."""
    from ear_kernels.ops.adaln import autograd as adaln

    for width in (1024, 1536):
        rows = 65536
        draw = lambda *s: torch.randn(*s, device="cuda", dtype=torch.bfloat16)
        mod, before, dmod, dbefore = (draw(rows, 3 * width) for _ in range(4))
        h, f, g, nxt, df, rebuilt = (draw(rows, width) for _ in range(6))
        w, b = torch.randn(2, width, device="cuda")
        stats = (torch.randn(rows, device="cuda"), torch.rand(rows, device="cuda"))
        unit = rows * width * 2 / 1e6
        shift, scale, gate = mod[:, :width], mod[:, width : 2 * width], before[:, 2 * width :]
        for residual, passes in ((None, 4), ((f, gate, nxt), 7)):
            ms = time_ms(
                lambda: adaln.launch_forward(h, shift, scale, w, b, g, stats, group=1, eps=1e-6, residual=residual)
            )
            record("rowwise", width=width, what=f"fwd, {passes} passes", ms=ms, gbs=passes * unit / ms)
        block = adaln.block_of(width)
        shipped = adaln.BACKWARD_ROWS[block]
        trial = [shipped[0]]
        if width == 1024:
            options = ((4, 2, 396), (4, 2, 528, 128), (8, 2, 264), (8, 2, 528, 64), (8, 2, 792), (8, 1, 396))
        else:
            options = ((8, 2, 132), (8, 2, 264, 128), (16, 2, 264, 64), (16, 2, 264), (8, 1, 132))
        trial += [adaln.RowConfig(*option) for option in options]
        for config in trial:
            adaln.BACKWARD_ROWS[block] = (config, shipped[1])
            ms = time_ms(
                lambda: adaln.launch_backward(
                    dmod[:, :width], h, scale, w, b, stats, g, None, dmod[:, width : 2 * width], group=1,
                    grad_residual=g, previous=(f, gate, df, dbefore[:, 2 * width :]),
                    sum_affine=True, sum_modulation=True,
                    previous_hidden=rebuilt,
                )
            )  # fmt: skip
            record("rowwise", width=width, what=f"bwd 11 passes {config}", ms=ms, gbs=11 * unit / ms)
        adaln.BACKWARD_ROWS[block] = shipped


def step(generator, z, noise, grad, **options) -> None:
    for parameter in generator.parameters():
        parameter.grad = None
    z.grad = None
    with torch.autocast("cuda", torch.bfloat16):
        out = generator(z, noise, **options)
    out.backward(grad)


def forward_only(generator, z, noise, **options) -> None:
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        generator(z, noise, **options)


def measure(
    name: str, run, section: str, size: str, z, noise, grad, gflop: float, launches: int = 3, **options
) -> None:
    """Forward, forward + backward and peak memory of one variant."""
    fwd = time_ms(lambda: forward_only(run, z, noise, **options), launches, 3)
    both = time_ms(lambda: step(run, z, noise, grad, **options), launches, 3)
    for parameter in run.parameters():
        parameter.grad = None
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(run, z, noise, grad, **options)
    peak = (torch.cuda.max_memory_allocated() - base) / 2**30
    record(
        section,
        size=size,
        what=name,
        fwd=fwd,
        fwd_bwd=both,
        fwd_tflops=gflop / fwd,
        tflops=3 * gflop / both,
        peak_gib=peak,
    )


def whole(width: int, depth: int, compiled: bool = True, plans: bool = True) -> None:
    from ear_kernels.ops.silu_ffn import configs

    tokens, samples = 16384, 4
    z = torch.randn(tokens, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    noise = torch.rand(tokens, samples, 64, device="cuda") - 0.5
    grad = torch.randn(tokens, samples, 16, device="cuda", dtype=torch.bfloat16)
    gflop = 2 * tokens * samples * (5 * depth + 2) * width**2 / 1e9
    size = f"{depth}x{width}"
    generator = make(width, depth)
    args = (z, noise, grad, gflop)
    backend("triton")
    table = dict(configs.CANDIDATES)
    none = dict.fromkeys(configs.EPILOGUES)
    options = {"shipped": {}, "triton everywhere": table}
    if plans:
        for epilogue in configs.EPILOGUES:
            options[f"triton {epilogue} only"] = {**none, epilogue: table[epilogue]}
    for name, plan in options.items():
        with contextlib.suppress(torch.OutOfMemoryError), configs.overriding(**plan):
            measure(name, generator, "whole", size, *args)
    shipped = configs.backward_rows, configs.rebuild_hidden
    for rows, rebuild in ((None, False), (None, True), (32768, True), (8192, True)) if plans else ((None, False),):
        configs.backward_rows, configs.rebuild_hidden = rows, rebuild
        measure(f"chunk {rows} rebuild {rebuild}", generator, "whole", size, *args)
    configs.backward_rows, configs.rebuild_hidden = shipped
    backend("eager")
    measure("eager", generator, "whole", size, *args)
    if compiled:
        rival = torch.compile(generator)
        measure("torch.compile", rival, "whole", size, *args)
        torch._dynamo.reset()


def pool() -> None:
    tokens, samples, width, depth = 16384, 4, 1024, 6
    z = torch.randn(tokens, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    noise = torch.rand(tokens, samples, 64, device="cuda") - 0.5
    grad = torch.randn(tokens, samples, 16, device="cuda", dtype=torch.bfloat16)
    generator = make(width, depth)
    backend("triton")
    for size in (16384, 4096, 1024):
        gflop = 2 * width**2 * ((2 * depth) * tokens * samples + (3 * depth + 2) * size) / 1e9
        measure(f"pool {size}", generator, "pool", "6x1024", z, noise, grad, gflop, noise_pool=size)


def few_rows() -> None:
    from ear_kernels.ops.generator import few_rows as few

    shipped = few.TABLE, few.MOST_ROWS_WIDE
    C = few.FewConfig
    trial = {
        4: [C(16, 16, 256, 4, 3, 32, 256), C(16, 16, 128, 4, 4, 32, 128), C(16, 16, 256, 2, 3, 32, 256), C(16, 32, 128, 4, 4, 64, 128), C(16, 8, 256, 4, 3, 16, 256), C(16, 16, 512, 4, 2, 64, 256)],
        64: [C(32, 16, 128, 4, 4, 64, 128), C(16, 16, 128, 4, 4, 64, 128), C(16, 32, 128, 4, 4, 64, 128), C(32, 32, 128, 4, 3, 64, 128), C(32, 16, 256, 4, 2, 64, 64), C(16, 64, 128, 4, 3, 128, 64)],
    }  # fmt: skip
    for width, depth in ((1024, 6), (1536, 12)):
        generator = make(width, depth).bfloat16().eval()
        for rows in (4, 64, 256, 1024):
            z = torch.randn(rows, 768, device="cuda", dtype=torch.bfloat16)
            noise = torch.rand(rows, 64, device="cuda", dtype=torch.bfloat16) - 0.5
            with torch.no_grad():
                backend("eager")
                record(
                    "few",
                    size=f"{depth}x{width}",
                    rows=rows,
                    what="eager graph",
                    ms=graph_ms(lambda: generator(z, noise)),
                )
                backend("triton")
                for config in trial.get(rows, [None]):
                    try:
                        if config is not None:
                            few.TABLE, few.MOST_ROWS_WIDE = ((few.MOST_ROWS, config),), few.MOST_ROWS
                        ms = graph_ms(lambda: generator(z, noise))
                        record("few", size=f"{depth}x{width}", rows=rows, what=str(config or "table"), ms=ms)
                    except Exception as error:
                        record("few", rows=rows, what=str(config), failed=repr(error)[:100])
                    finally:
                        few.TABLE, few.MOST_ROWS_WIDE = shipped


def launch_overhead() -> None:
    """CPU time of a step without waiting: does Python keep up with the GPU?"""
    generator = make(1024, 6)
    z = torch.randn(16, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    noise = torch.rand(16, 4, 64, device="cuda") - 0.5
    grad = torch.randn(16, 4, 16, device="cuda", dtype=torch.bfloat16)
    for name in ("triton", "eager"):
        backend(name)
        for _ in range(3):
            step(generator, z, noise, grad)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(10):
            step(generator, z, noise, grad)
        torch.cuda.synchronize()
        record("overhead", what=f"{name} step of 64 rows, wall", ms=(time.perf_counter() - begin) * 100)


SECTIONS: dict[str, Callable[[], None]] = {
    "check_ops": check_ops,
    "check_generator": check_generator,
    "gemms": gemms,
    "rowwise": rowwise,
    "whole_6x1024": lambda: whole(1024, 6),
    "few_rows": few_rows,
    "pool": pool,
    "overhead": launch_overhead,
    "whole_8x1280": lambda: whole(1280, 8, compiled=False, plans=False),
    "whole_12x1536": lambda: whole(1536, 12, compiled=False, plans=False),
    "compiled_8x1280": lambda: whole(1280, 8, plans=False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"comma-separated; of {', '.join(SECTIONS)}")
    parser.add_argument("--seconds", type=float, default=330.0)
    arguments = parser.parse_args()
    import triton

    say(f"{torch.cuda.get_device_name()} torch {torch.__version__} triton {triton.__version__}")
    torch.set_float32_matmul_precision("highest")
    for name in arguments.only.split(",") if arguments.only else SECTIONS:
        if time.time() - START > arguments.seconds:
            record("skipped", name=name)
            continue
        begin = time.time()
        try:
            SECTIONS[name]()
        except Exception:
            say(f"[{name}] FAILED\n" + traceback.format_exc(limit=-4))
        torch.cuda.empty_cache()
        record("section", name=name, seconds=time.time() - begin)
    out = os.environ.get("OUT")
    if out:
        Path(out, "gpu_check_c.json").write_text(json.dumps(RESULTS, indent=1))
        Path(out, "gpu_check_c.txt").write_text("\n".join(LINES))
    summarise()


def summarise() -> None:
    """The short table, printed last: a call's reply carries the end of the output."""
    print("\n=== summary ===")
    checks = [r for r in RESULTS if r["section"] == "check"]
    bad = [r for r in checks if not r["ratio"] <= 2 or r.get("same") is False]
    print(f"checks {len(checks)}, beyond 2x eager or not deterministic: {len(bad)}")
    for r in bad[:12]:
        print("  BAD", {k: v for k, v in r.items() if k != "section"})
    for width in (1024, 1536):
        rows = [r for r in RESULTS if r["section"] == "gemm" and r["width"] == width and "ms" in r]
        for r in rows:
            if "cublas" in r["what"] or "pointwise" in r["what"]:
                print(f"gemm {width} {r['what']:<42} {r['ms']:.3f} ms {r.get('tflops', 0):.0f}")
        for kind in ("silu 1", "silu 2", "silu saving", "gate 1", "gate 2", "gate saving", "dsilu"):
            for r in sorted((r for r in rows if r["what"].startswith(kind)), key=lambda r: r["ms"])[:2]:
                print(f"gemm {width} {r['what']:<42} {r['ms']:.3f} ms {r['tflops']:.0f}")
    for r in RESULTS:
        if r["section"] == "rowwise":
            print(f"rowwise {r['width']} {r['what']:<70} {r['ms']:.3f} ms {r['gbs']:.0f} GB/s")
        if r["section"] in ("whole", "pool"):
            print(
                f"{r['section']} {r['size']} {r['what']:<20} fwd {r['fwd']:.2f} fwd+bwd {r['fwd_bwd']:.2f} ms "
                f"{r['tflops']:.0f} TFLOP/s peak {r['peak_gib']:.2f} GiB"
            )
        if r["section"] == "overhead":
            print(r["what"], f"{r['ms']:.2f} ms")
    few = [r for r in RESULTS if r["section"] == "few" and "ms" in r]
    for key in dict.fromkeys((r["size"], r["rows"]) for r in few):
        mine = [r for r in few if (r["size"], r["rows"]) == key]
        rival = next(r["ms"] for r in mine if r["what"] == "eager graph")
        best = sorted((r for r in mine if r["what"] != "eager graph"), key=lambda r: r["ms"])[:3]
        print("few", *key, f"eager graph {rival:.4f}", *(f"| {r['ms']:.4f} {r['what']}" for r in best))


if __name__ == "__main__":
    main()
