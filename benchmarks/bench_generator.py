# ruff: noqa: B023 (timed closures are called in the iteration that makes them)
"""Generator: each operation and the whole, forward, forward + backward, few rows, pool; rivals in the same
run.

    pytest benchmarks/bench_generator.py --benchmark-only          # needs a GPU; -k "6x1024" for one size

Times are GPU times: launches between two events (few rows: replays of a CUDA graph). ``extra_info`` of each
row holds TFLOP/s, the cuBLAS rate of the same run, GB/s or peak memory.
"""

import contextlib
import os
import statistics
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from ear_kernels import FusedMLPGenerator, adaln_modulate, gated_silu_ffn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

ROWS, SAMPLES = 65_536, 4
SIZES = {"6x1024": (6, 1024), "8x1280": (8, 1280), "12x1536": (12, 1536)}
RIVALS = ("eager", "compile", "triton")


def gpu_seconds(function: Callable[[], object], launches: int) -> float:
    """Seconds of one call, from events around ``launches`` calls."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for _ in range(launches):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / launches / 1e3


def measure(benchmark, function: Callable[[], object], launches: int = 5, rounds: int = 5) -> float:
    """Median GPU seconds of a call; also hands the function to pytest-benchmark (which times the wall)."""
    for _ in range(3):
        function()
    seconds = statistics.median(gpu_seconds(function, launches) for _ in range(rounds))

    def synchronised() -> None:
        function()
        torch.cuda.synchronize()

    benchmark.pedantic(synchronised, rounds=3, iterations=1, warmup_rounds=1)
    benchmark.extra_info["gpu_ms"] = seconds * 1e3
    benchmark.extra_info["gpu"] = torch.cuda.get_device_name()
    benchmark.extra_info["torch"] = torch.__version__
    return seconds


@pytest.fixture(scope="module")
def cublas_tflops() -> dict[int, float]:
    """Rate of a plain linear at each width, measured in this run."""
    rates = {}
    for _, width in SIZES.values():
        x = torch.randn(ROWS, width, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(width, width, device="cuda", dtype=torch.bfloat16)
        gpu_seconds(lambda: F.linear(x, weight), 3)
        seconds = statistics.median(gpu_seconds(lambda: F.linear(x, weight), 10) for _ in range(5))
        rates[width] = 2 * ROWS * width**2 / seconds / 1e12
    return rates


@contextlib.contextmanager
def backend(rival: str):
    before = os.environ.get("EAR_KERNELS_BACKEND")
    os.environ["EAR_KERNELS_BACKEND"] = "triton" if rival == "triton" else "eager"
    try:
        yield
    finally:
        if before is None:
            del os.environ["EAR_KERNELS_BACKEND"]
        else:
            os.environ["EAR_KERNELS_BACKEND"] = before


def compiled(rival: str, function):
    return torch.compile(function) if rival == "compile" else function


def relative(ours: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square difference over root mean square."""
    return float((ours.float() - other.float()).norm() / other.float().norm())


def check(outputs: Callable[[str], list[torch.Tensor]], rival: str, allowed: float = 0.03) -> None:
    """Fail if the rival's outputs are not the eager ones up to the rounding of bf16 sums."""
    for ours, eager in zip(outputs(rival), outputs("eager"), strict=True):
        assert relative(ours, eager) < allowed, f"{rival} is off by {relative(ours, eager):.3f}"


def make(depth: int, width: int) -> FusedMLPGenerator:
    torch.manual_seed(0)
    generator = FusedMLPGenerator(768, width, 16, depth=depth, noise_dim=64)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.2)
    return generator.cuda()


def training_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = ROWS // SAMPLES
    z = torch.randn(tokens, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    noise = torch.rand(tokens, SAMPLES, 64, device="cuda") - 0.5
    return z, noise, torch.randn(tokens, SAMPLES, 16, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("size", SIZES)
def test_whole(benchmark, cublas_tflops, size: str, mode: str, rival: str) -> None:
    whole(benchmark, cublas_tflops, size, mode, rival)


@pytest.mark.parametrize("pool", [16_384, 4_096])
@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
def test_pool(benchmark, cublas_tflops, mode: str, pool: int) -> None:
    whole(benchmark, cublas_tflops, "6x1024", mode, "triton", noise_pool=pool)


def whole(benchmark, cublas_tflops, size: str, mode: str, rival: str, **options) -> None:
    depth, width = SIZES[size]
    generator = make(depth, width)
    z, noise, grad = training_inputs()

    def outputs(which: str) -> list[torch.Tensor]:
        generator.zero_grad(set_to_none=True)
        z.grad = None
        with backend(which), torch.autocast("cuda", torch.bfloat16):
            out = generator(z, noise, **options)
            out.backward(grad)
        return [out.detach(), z.grad, *(p.grad for p in generator.parameters() if mode == "fwd_bwd")]

    if rival == "triton":
        check(outputs, rival)
    with backend(rival):
        run = compiled(rival, generator)

        def forward() -> None:
            with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
                run(z, noise, **options)

        def both() -> None:
            generator.zero_grad(set_to_none=True)
            z.grad = None
            with torch.autocast("cuda", torch.bfloat16):
                out = run(z, noise, **options)
            out.backward(grad)

        seconds = measure(benchmark, forward if mode == "fwd" else both)
        generator.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        (forward if mode == "fwd" else both)()
        peak = torch.cuda.max_memory_allocated() - base
    modulated = min(ROWS, options.get("noise_pool", ROWS))
    flops = 2 * width**2 * (2 * depth * ROWS + (3 * depth + 2) * modulated) * (1 if mode == "fwd" else 3)
    benchmark.extra_info.update(
        tflops=flops / seconds / 1e12, cublas_tflops=cublas_tflops[width], peak_gib=peak / 2**30, rows=ROWS
    )
    torch._dynamo.reset()


@pytest.mark.parametrize("rival", ["eager", "triton"])
@pytest.mark.parametrize("rows", [4, 64, 1024])
@pytest.mark.parametrize("size", ["6x1024", "12x1536"])
def test_few_rows(benchmark, size: str, rows: int, rival: str) -> None:
    """Forward in a CUDA graph, bf16 weights."""
    generator = make(*SIZES[size]).bfloat16().eval()
    z = torch.randn(rows, 768, device="cuda", dtype=torch.bfloat16)
    noise = torch.rand(rows, 64, device="cuda", dtype=torch.bfloat16) - 0.5
    with torch.no_grad(), backend(rival):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                generator(z, noise)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = generator(z, noise)
        graph.replay()

        def outputs(which: str) -> list[torch.Tensor]:
            with backend(which):
                return [out if which == rival else generator(z, noise)]

        check(outputs, rival)
        seconds = measure(benchmark, graph.replay, launches=100)
    weights = sum(parameter.numel() * 2 for parameter in generator.parameters())
    benchmark.extra_info.update(gbs=weights / seconds / 1e9, rows=rows)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize("operation", ["adaln_modulate", "gated_silu_ffn"])
def test_operation(benchmark, cublas_tflops, operation: str, mode: str, rival: str) -> None:
    """One public operation at 65,536 x 1024, bf16."""
    width = 1024

    def draw(*size: int, grad: bool = True) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16).requires_grad_(grad)

    rows = [draw(ROWS, width) for _ in range(3)]
    if operation == "adaln_modulate":
        inputs, function = [*rows, draw(width), draw(width)], adaln_modulate
    else:
        weights = [draw(width, width), draw(width), draw(width, width), draw(width)]
        inputs, function = [*rows, *weights], gated_silu_ffn
    grad = draw(ROWS, width, grad=False)
    with backend(rival):
        run = compiled(rival, function)

        def forward() -> None:
            with torch.no_grad():
                run(*inputs)

        def both() -> None:
            torch.autograd.grad(run(*inputs), inputs, grad)

        def outputs(which: str) -> list[torch.Tensor]:
            with backend(which):
                out = function(*inputs)
                return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

        check(outputs, rival)

        seconds = measure(benchmark, forward if mode == "fwd" else both)
    if operation == "adaln_modulate":
        passes = 4 if mode == "fwd" else 11
        benchmark.extra_info["gbs"] = passes * ROWS * width * 2 / seconds / 1e9
    else:
        flops = 4 * ROWS * width**2 * (1 if mode == "fwd" else 3)
        benchmark.extra_info.update(tflops=flops / seconds / 1e12, cublas_tflops=cublas_tflops[width])
