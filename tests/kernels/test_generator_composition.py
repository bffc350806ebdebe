"""The generator inside what training and sampling programs put around it: CUDA graphs, DDP, inductor."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ear_kernels import FusedEnergyLoss
from tests.kernels.generator_fixtures import DEVICE
from tests.kernels.test_generator_whole import make


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")


def inputs(rows: int = 12, samples: int = 4) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(rows, 24, device=DEVICE),
        torch.rand(rows, samples, 16, device=DEVICE) - 0.5,
        torch.randn(rows, 8, device=DEVICE),
    )


def step(generator: torch.nn.Module, z: torch.Tensor, noise: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = FusedEnergyLoss()(generator(z, noise), targets)
    loss.backward()
    return loss


def test_ddp_gives_the_same_gradients(tmp_path: Path) -> None:
    generator, (z, noise, targets) = make(32, 2, 0), inputs()
    alone = copy.deepcopy(generator)
    step(alone, z, noise, targets)
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(generator)
        for _ in range(2):  # the second time through the rebuilt buckets
            generator.zero_grad()
            step(wrapped, z, noise, targets)
    finally:
        dist.destroy_process_group()
    for own, other in zip(alone.parameters(), generator.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("pool", [None, 16])
def test_training_step_in_a_cuda_graph(pool: int | None) -> None:
    """Forward, loss, backward and optimiser, captured once and replayed on new data."""
    generator, (z, noise, targets) = make(64, 3, 0), inputs()
    plain = copy.deepcopy(generator)

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = FusedEnergyLoss()(model(z, noise, noise_pool=pool), targets)
        loss.backward()
        optimizer.step()
        return loss

    optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-3, capturable=True)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            train(generator, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    generator.load_state_dict(plain.state_dict())
    optimizer.state.clear()
    with torch.cuda.stream(stream):  # fresh moments, outside the capture
        train(generator, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    generator.load_state_dict(plain.state_dict())
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = train(generator, optimizer)
    other = torch.optim.AdamW(plain.parameters(), lr=1e-3, capturable=True)
    for _ in range(4):
        for tensor, fresh in zip((z, noise, targets), inputs(), strict=True):
            tensor.copy_(fresh)
        graph.replay()
        expected = train(plain, other)
        torch.testing.assert_close(loss, expected)
    for own, wanted in zip(generator.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65])
def test_sampling_in_a_cuda_graph(rows: int) -> None:
    generator = make(64, 3, 0).eval().bfloat16()
    z = torch.randn(rows, 24, device="cuda", dtype=torch.bfloat16)
    noise = torch.rand(rows, 16, device="cuda", dtype=torch.bfloat16) - 0.5
    with torch.no_grad():
        generator(z, noise, 0.7)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = generator(z, noise, 0.7)
        for _ in range(50):  # the persistent kernel's barriers, again and again
            z.normal_()
            graph.replay()
            assert torch.equal(out, generator(z, noise, 0.7))


@pytest.mark.gpu
def test_compiled_by_inductor() -> None:
    generator, (z, noise, targets) = make(64, 2, 0), inputs()
    plain = copy.deepcopy(generator)
    compiled = torch.compile(generator, fullgraph=True)
    torch.testing.assert_close(step(compiled, z, noise, targets), step(plain, z, noise, targets))
    for own, other in zip(generator.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


@pytest.mark.gpu
def test_two_streams_at_once() -> None:
    """Two persistent kernels that want all multiprocessors: both must end, with the right rows."""
    generator = make(64, 3, 0).eval().bfloat16()
    z = [torch.randn(5, 24, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    noise = torch.rand(5, 16, device="cuda", dtype=torch.bfloat16) - 0.5
    streams = [torch.cuda.Stream() for _ in range(2)]
    with torch.no_grad():
        wanted = [generator(each, noise) for each in z]
        torch.cuda.synchronize()
        outs: list[list[torch.Tensor]] = [[], []]
        for _ in range(200):
            for number, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    outs[number].append(generator(z[number], noise))
        torch.cuda.synchronize()
    for number in range(2):
        assert all(torch.equal(out, wanted[number]) for out in outs[number])
