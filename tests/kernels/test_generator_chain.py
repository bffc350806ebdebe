"""The generator without gradients: few rows, and modulations that are computed before the rest."""

import copy

import pytest
import torch

from ear_kernels import functional
from ear_kernels.modules import FusedMLPGenerator
from ear_kernels.ops.generator import launch_chain, launch_few_rows
from ear_kernels.runtime.copies import LowCopies
from ear_kernels.testing import assert_close_to_eager
from tests.kernels.generator_fixtures import DEVICE, DTYPES
from tests.kernels.test_generator_whole import make


def apart(rows: int, noise: torch.Tensor, z: torch.Tensor, generator: FusedMLPGenerator, temperature: float):
    """The generator in its two halves, the modulations read from every second row of memory."""
    mod = generator.modulations(noise, temperature)
    assert mod.dtype == noise.dtype
    wide = mod.new_full((2 * rows, mod.shape[1]), float("nan"))
    wide[::2] = mod
    return generator.chain(z, wide[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "depth"), [(1, 32, 1), (5, 96, 3), (17, 40, 2), (64, 80, 1), (70, 32, 2), (0, 32, 1)]
)
def test_halves_match_eager(monkeypatch, rows, width, depth, dtype) -> None:
    generator = make(width, depth, rows + width).eval().to(dtype)
    z = torch.randn(rows, 24, device=DEVICE, dtype=dtype)
    noise = torch.rand(rows, 16, device=DEVICE, dtype=dtype) - 0.5
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    ours = apart(rows, noise, z, generator, 0.7)
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "eager")
    halves = apart(rows, noise, z, generator, 0.7)
    with torch.no_grad():
        eager = generator(z, noise, 0.7)
        exact = copy.deepcopy(generator).double()(z.double(), noise.double(), 0.7)
    assert_close_to_eager("out", ours, eager, exact, ulps=2)
    assert_close_to_eager("eager halves", halves, eager, exact, ulps=2)


def test_modulations_match_the_linears(monkeypatch) -> None:
    """Column for column; the temperature is of the blocks' shifts alone, and other memory than ``out`` is left."""
    width, depth = 40, 2
    generator = make(width, depth, 3).eval()
    for rows in (5, 70):
        noise = torch.randn(rows, 16, device=DEVICE)
        active = torch.nn.functional.silu(generator.noise_embed(noise))
        linears = [block.adaLN_modulation[1] for block in (*generator.res_blocks, generator.final_layer)]
        wanted = [linear(active).clone() for linear in linears]
        for each in wanted[:-1]:
            each[:, :width] *= 0.3
        for backend in ("triton", "eager"):
            monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
            memory = torch.full((rows, width * (3 * depth + 2) + 8), 7.0, device=DEVICE)
            out = generator.modulations(noise, 0.3, memory[:, 8:])
            torch.testing.assert_close(out, torch.cat(wanted, 1), atol=1e-5, rtol=1e-5)
            assert out.data_ptr() == memory[:, 8:].data_ptr()
            assert (memory[:, :8] == 7).all()


def test_rows_of_modulations_may_be_expanded(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    generator = make(32, 1, 0).eval()
    z, noise = torch.randn(3, 24, device=DEVICE), torch.rand(1, 16, device=DEVICE)
    mod = generator.modulations(noise)
    assert torch.equal(generator.chain(z, mod.expand(3, -1)), generator.chain(z, mod.repeat(3, 1)))


@pytest.mark.parametrize("rows", [6, 70])
def test_mixed_precision(monkeypatch, rows) -> None:
    """float32 weights under autocast, read as they are or from the copies that a scope holds."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    generator = make(48, 2, 0).eval()
    z, noise = torch.randn(rows, 24, device=DEVICE), torch.rand(rows, 16, device=DEVICE)
    copies = LowCopies(generator.parameters(), dtype)

    def run(backend: str) -> torch.Tensor:
        monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
        with torch.autocast(DEVICE, dtype=dtype):
            out = generator.chain(z, generator.modulations(noise, 0.8))
        assert out.dtype == dtype
        return out

    monkeypatch.setenv("EAR_KERNELS_BACKEND", "eager")
    with torch.no_grad():
        exact = copy.deepcopy(generator).double()(z.double(), noise.double(), 0.8)
    eager = run("eager")
    assert_close_to_eager("out", run("triton"), eager, exact, ulps=2)
    with copies:
        assert_close_to_eager("out of copies", run("triton"), eager, exact, ulps=2)
        for copied in copies._copies.values():
            copied.tensor.zero_()
        assert not run("triton").any()


def test_arguments_are_checked() -> None:
    generator = make(32, 1, 0).eval()
    inputs = [each.detach() for each in generator.input_parameters()]
    parameters = [each.detach() for each in generator.block_parameters()]
    z, noise = torch.randn(3, 24, device=DEVICE), torch.rand(3, 16, device=DEVICE)
    mod = functional.generator_modulations(noise, inputs, parameters)
    for match, call in (
        (r"noise has shape \(3, 15\).*\[R, 16\]", lambda: generator.modulations(noise[:, 1:])),
        (r"z has shape \(3, 23\).*\[R, 24\]", lambda: generator.chain(z[:, 1:], mod)),
        (r"modulations has shape \(2, 160\).*\[3, 160\]", lambda: generator.chain(z, mod[1:])),
        (r"torch.float16.*in torch.float32", lambda: generator.chain(z, mod.half())),
        (r"strides \(1, 3\)", lambda: generator.chain(z, mod.t().contiguous().t())),
        (r"out has shape \(3, 159\)", lambda: generator.modulations(noise, 1.0, mod[:, 1:])),
        ("4 inputs and 11 parameters", lambda: functional.generator_chain(z, mod, inputs, parameters[1:])),
        ("1 inputs", lambda: functional.generator_modulations(noise, inputs[:1], parameters)),
        (r"noise has shape \(3, 16\).*\[R, 32\]", lambda: functional.generator_modulations(noise, [], parameters)),
        (
            "under torch.no_grad",
            lambda: functional.generator_chain(z, mod, generator.input_parameters(), parameters),
        ),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match=r"z has dtype torch\.int64"):
        generator.chain(z.long(), mod)


def test_fullgraph_compile(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    generator = make(32, 2, 0).eval()
    z, noise = torch.randn(5, 24, device=DEVICE), torch.rand(5, 16, device=DEVICE)

    def both(z, noise):
        return generator.chain(z, generator.modulations(noise, 0.5))

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, noise), both(z, noise))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("rows", [4, 64, 300])
def test_a_graph_reads_weights_and_modulations_at_replay(rows) -> None:
    generator = make(64, 2, 0).eval().bfloat16()
    z = torch.randn(rows, 24, device=DEVICE, dtype=torch.bfloat16)
    mod = generator.modulations(torch.rand(rows, 16, device=DEVICE, dtype=torch.bfloat16))
    generator.chain(z, mod)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = generator.chain(z, mod)
    for _ in range(3):
        with torch.no_grad():
            generator.res_blocks[0].mlp[0].weight.mul_(1.5)
        mod.copy_(mod.roll(1, 0))
        graph.replay()
        torch.testing.assert_close(out, generator.chain(z, mod))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "samples", "width"), [(1, 1, 32), (5, 3, 96), (40, 1, 80), (129, 1, 32), (0, 1, 32)]
)
def test_few_rows_match_eager(monkeypatch, rows, samples, width, dtype) -> None:
    """Sampling: no gradients, temperature, weights read in place; above the limit the general path."""
    generator = make(width, 2, 1).eval().to(dtype)
    z = torch.randn(rows, 24, device=DEVICE, dtype=dtype)
    noise = torch.rand(rows, samples, 16, device=DEVICE, dtype=dtype) - 0.5
    with torch.no_grad():
        monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
        ours = generator(z, noise, 0.7)
        monkeypatch.setenv("EAR_KERNELS_BACKEND", "eager")
        eager = generator(z, noise, 0.7)
        exact = copy.deepcopy(generator).double()(z.double(), noise.double(), 0.7)
    assert_close_to_eager("out", ours, eager, exact, ulps=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "parts"), [(3, 4), (16, 2), (40, 1)])
def test_few_rows_in_parts_and_other_tiles(monkeypatch, rows, parts, dtype) -> None:
    """One kernel for all: K steps cut into parts; modulations computed ahead of their layers."""
    config = launch_few_rows.FewConfig(16 if rows <= 16 else 64, 16, 64, 2, 32, 64, 2, parts=parts)
    monkeypatch.setattr(launch_few_rows, "TABLE", ((64, launch_few_rows.MOST_WIDTH, config, config),))
    monkeypatch.setattr(launch_chain, "WHOLE_ROWS", 0)
    compare(monkeypatch, rows, dtype)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "bm", "parts"), [(3, 8, 4), (20, 8, 2), (16, 16, 1)])
def test_chain_of_other_tiles(monkeypatch, rows, bm, parts, dtype) -> None:
    """Several tiles a program, several groups of rows, steps over K of the modulations that are not full."""
    tiles = launch_chain.ChainConfig(bm, 16, parts)
    mod = launch_chain.ModulationConfig(16 if rows <= 16 else 64, 32, 64, 2)
    monkeypatch.setattr(launch_chain, "CHAIN", ((64, launch_few_rows.MOST_WIDTH, tiles, tiles),))
    monkeypatch.setattr(launch_chain, "MODULATIONS", ((64, mod, mod),))
    monkeypatch.setattr(launch_chain, "WHOLE_ROWS", 64)
    calls = []
    chain = launch_chain.chain
    monkeypatch.setattr(launch_chain, "chain", lambda *given: calls.append(given) or chain(*given))
    compare(monkeypatch, rows, dtype)
    assert len(calls) == 1


def compare(monkeypatch, rows: int, dtype: torch.dtype) -> None:
    generator = make(96, 4, 2).eval().to(dtype)
    z = torch.randn(rows, 24, device=DEVICE, dtype=dtype)
    noise = torch.rand(rows, 16, device=DEVICE, dtype=dtype) - 0.5
    with torch.no_grad():
        monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
        ours = generator(z, noise)
        monkeypatch.setenv("EAR_KERNELS_BACKEND", "eager")
        eager = generator(z, noise)
        exact = copy.deepcopy(generator).double()(z.double(), noise.double())
    assert_close_to_eager("out", ours, eager, exact, ulps=4)


def test_few_rows_read_the_weights_at_every_call(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    generator = make(32, 1, 0).eval()
    z, noise = torch.randn(3, 24, device=DEVICE), torch.rand(3, 16, device=DEVICE)
    with torch.no_grad():
        before = generator(z, noise)
        generator.res_blocks[0].adaLN_modulation[1].weight.mul_(2)
        after = generator(z, noise)
        assert not torch.allclose(before, after)
        monkeypatch.setenv("EAR_KERNELS_BACKEND", "eager")
        torch.testing.assert_close(after, generator(z, noise), atol=1e-5, rtol=1e-5)
