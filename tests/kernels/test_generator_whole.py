"""The whole generator as one autograd function: outputs and every gradient against float64 and eager."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ear_kernels import FusedMLPGenerator
from ear_kernels.ops.generator import launch, launch_few_rows, launch_ffn, launch_inference
from ear_kernels.runtime import launching
from ear_kernels.testing import assert_close_to_eager
from tests.kernels.generator_fixtures import DEVICE, DTYPES

SMALL = launch_ffn.GemmConfig(32, 32, 16, 2, 4)
if DEVICE == "cuda":
    SMALL = launch_ffn.GemmConfig(64, 64, 64, 2, 4)
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
PLANS = {
    "cublas": {"silu": None, "gate": None},
    "triton": {"silu": SMALL, "gate": SMALL},
}


def make(width: int, depth: int, seed: int, input_dim: int = 24, output_dim: int = 8) -> FusedMLPGenerator:
    """A generator whose zero-initialised layers are not zero, else no gradient would reach the blocks."""
    torch.manual_seed(seed)
    generator = FusedMLPGenerator(input_dim, width, output_dim, depth=depth, noise_dim=16)
    for parameter in generator.parameters():
        torch.nn.init.normal_(parameter, std=0.5 / max(1, parameter.shape[-1]) ** 0.5 if parameter.ndim > 1 else 0.2)
    return generator.to(DEVICE)


def run(generator, z, noise, grad, monkeypatch, backend, **options):
    monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
    generator.zero_grad(set_to_none=True)
    z, noise = (t.detach().clone().requires_grad_() for t in (z, noise))
    out = generator(z, noise, **options)
    out.backward(grad.to(out.dtype))
    gradients = {name: parameter.grad for name, parameter in generator.named_parameters()}
    return {"out": out.detach(), "z": z.grad, "noise": noise.grad, **gradients}


def compare(monkeypatch, rows, samples, width, depth, dtype, plan, seed=0, **options) -> None:
    reference = make(width, depth, seed)
    z = torch.randn(*rows, 24, device=DEVICE)
    noise = torch.rand(*rows, *([samples] if samples else []), 16, device=DEVICE) - 0.5
    generator = copy.deepcopy(reference).to(dtype)
    z, noise = z.to(dtype), noise.to(dtype)
    grad = torch.randn(*noise.shape[:-1], 8, device=DEVICE).to(dtype)
    exact = run(copy.deepcopy(generator).double(), z.double(), noise.double(), grad, monkeypatch, "eager", **options)
    eager = run(generator, z, noise, grad, monkeypatch, "eager", **options)
    eager = {name: value.clone() for name, value in eager.items()}
    with launch_ffn.using_gemms(**PLANS[plan]):
        ours = run(generator, z, noise, grad, monkeypatch, "triton", **options)
    count = max(2, noise.numel() // 16)
    for name in exact:
        assert_close_to_eager(
            name,
            ours[name],
            eager[name],
            exact[name],
            scale=count**0.5 if "weight" in name or "bias" in name else 0.0,
            ulps=4,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("rows", "samples", "width", "depth"),
    [((11,), None, 32, 2), ((3, 4), 2, 96, 3), ((1,), 1, 40, 1), ((0,), 2, 32, 1), ((9,), 3, 32, 1)],
    ids=str,
)
def test_matches_eager(monkeypatch, rows, samples, width, depth, dtype, plan) -> None:
    compare(monkeypatch, rows, samples, width, depth, dtype, plan)


@given(
    st.integers(0, 13),
    st.sampled_from([None, 1, 2, 4]),
    # Of two or three features a norm's gradient is all cancellation: its own conditioning decides, not the kernel.
    st.integers(8, 40),
    st.integers(1, 3),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
@settings(max_examples=100 if DEVICE == "cuda" else 5)
def test_any_shape(rows, samples, width, depth, dtype, seed) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        compare(monkeypatch, (rows,), samples, width, depth, dtype, "triton", seed)


@pytest.mark.parametrize("pool", [2, 5, 8, 24, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_pool_matches_eager(monkeypatch, pool, dtype) -> None:
    compare(monkeypatch, (13,), 2, 32, 2, dtype, "triton", noise_pool=pool)


def test_temperature_and_eval(monkeypatch) -> None:
    generator = make(32, 2, 0).eval()
    z, noise = torch.randn(5, 24, device=DEVICE), torch.rand(5, 16, device=DEVICE)
    outputs = []
    for backend in ("eager", "triton"):
        monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
        with torch.no_grad():
            outputs.append(generator(z, noise, 0.7))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(outputs[0], generator(z, noise, 1.0))


@pytest.mark.parametrize("combine_rows", [1, 10**9])
def test_without_gradients_nothing_is_saved(monkeypatch, combine_rows) -> None:
    """Both forms of the final layer, with a temperature, above the few rows of the persistent kernel."""
    monkeypatch.setattr(launch_inference, "COMBINE_ROWS", combine_rows)
    monkeypatch.setattr(launch_few_rows, "MOST_ROWS", 0)
    generator = make(32, 2, 0).eval()
    z, noise = torch.randn(5, 24, device=DEVICE), torch.rand(5, 2, 16, device=DEVICE)
    with torch.no_grad():
        monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
        ours = generator(z, noise, 0.7)
        monkeypatch.setenv("EAR_KERNELS_BACKEND", "eager")
        torch.testing.assert_close(ours, generator(z, noise, 0.7), atol=1e-5, rtol=1e-5)
    hidden = torch.randn(5, 32, device=DEVICE)
    parameters = [parameter.detach() for parameter in generator.block_parameters()]
    assert len(launch.forward(hidden, hidden, parameters, None, 1, 1.0, 1e-6, False)) == 1


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("combine_rows", [1, 10**9])
@pytest.mark.parametrize("gemms", PLANS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dependent": HOPPER},
        {"streams": 2},
        {"streams": 1, "dependent": HOPPER},
    ],
    ids=str,
)
def test_every_plan_without_gradients(monkeypatch, options, gemms, combine_rows, samples) -> None:
    """However the launches are arranged, the result is eager's, and a second call's (memory used again) as well."""
    monkeypatch.setattr(launch_inference, "COMBINE_ROWS", combine_rows)
    monkeypatch.setattr(launch_few_rows, "MOST_ROWS", 0)
    monkeypatch.setattr(launch_inference, "TABLE", ((0, launch_inference.Plan(**options)),))
    generator = make(64, 3, 0).half().eval()
    z = torch.randn(5, 24, device=DEVICE, dtype=torch.float16)
    noise = torch.rand(5, samples, 16, device=DEVICE, dtype=torch.float16) - 0.5
    with torch.no_grad(), launch_ffn.using_gemms(**PLANS[gemms]):
        monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
        ours = [generator(z, noise, 0.7) for _ in range(2)]
        monkeypatch.setenv("EAR_KERNELS_BACKEND", "eager")
        eager = generator(z, noise, 0.7)
        exact = copy.deepcopy(generator).double()(z.double(), noise.double(), 0.7)
    for out in ours:
        assert_close_to_eager("out", out, eager, exact, ulps=4)


def test_mixed_precision_gives_float32_gradients(monkeypatch) -> None:
    """Autocast over float32 weights: gradients in the parameters' dtype, near eager's."""
    generator = make(32, 2, 0)
    z, noise = torch.randn(7, 24, device=DEVICE), torch.rand(7, 2, 16, device=DEVICE)
    grad = torch.randn(7, 2, 8, device=DEVICE)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    results = []
    for backend in ("eager", "triton"):
        with torch.autocast(DEVICE, dtype=dtype):
            results.append(dict(run(generator, z, noise, grad, monkeypatch, backend)))
    for name, value in results[0].items():
        assert results[1][name].dtype == value.dtype, name
        torch.testing.assert_close(results[1][name], value, atol=0.05 * value.abs().max().item() + 1e-3, rtol=0.1)


def test_frozen_parameters_and_checkpointing(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    generator = make(32, 2, 0)
    z, noise = torch.randn(5, 24, device=DEVICE, requires_grad=True), torch.rand(5, 16, device=DEVICE)
    generator(z, noise).sum().backward()
    expected = z.grad.clone()
    z.grad = None
    generator.requires_grad_(False)
    out = torch.utils.checkpoint.checkpoint(generator, z, noise, use_reentrant=False)
    out.sum().backward()
    torch.testing.assert_close(z.grad, expected)


def test_second_order_gradients_are_refused(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    generator = make(32, 1, 0)
    z = torch.randn(3, 24, device=DEVICE, requires_grad=True)
    out = generator(z, torch.rand(3, 16, device=DEVICE))
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(out.sum(), z, create_graph=True)


def test_fullgraph_compile(monkeypatch) -> None:
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    generator = make(32, 2, 0)
    z, noise = torch.randn(5, 24, device=DEVICE), torch.rand(5, 2, 16, device=DEVICE)
    grad = torch.randn(5, 2, 8, device=DEVICE)
    plain = run(generator, z, noise, grad, monkeypatch, "triton")
    compiled = torch.compile(generator, fullgraph=True, backend="aot_eager")
    other = run(compiled, z, noise, grad, monkeypatch, "triton")
    torch.testing.assert_close(other["out"], plain["out"])
    torch.testing.assert_close(other["z"], plain["z"])


def test_opcheck() -> None:
    from ear_kernels.ops.generator import autograd  # noqa: F401

    generator = make(32, 2, 0)
    parameters = [p.detach() for p in generator.block_parameters()]
    hidden, conditioning = torch.randn(6, 32, device=DEVICE), torch.randn(6, 32, device=DEVICE)
    args = (hidden, conditioning, parameters, None, 1, 1.0, 1e-6, True)
    # opcheck's schema test cannot hold lists of tensors; the other three can.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.ear_kernels.generator_blocks_fwd, args, test_utils=checks)
    out, *saved = torch.ops.ear_kernels.generator_blocks_fwd(*args)
    dtypes = [torch.float32] * len(parameters)
    args = (out, hidden, conditioning, parameters, saved, None, None, 1, dtypes)
    torch.library.opcheck(torch.ops.ear_kernels.generator_blocks_bwd, args, test_utils=checks)


@pytest.mark.parametrize("pool", [None, 8])
def test_backward_runs_again_if_asked_to(monkeypatch, pool) -> None:
    """With retain_graph backward leaves what was saved alone; without, it overwrites it and says so."""
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "triton")
    generator = make(32, 3, 0)
    z = torch.randn(13, 24, device=DEVICE, requires_grad=True)
    noise = torch.rand(13, 2, 16, device=DEVICE)
    out = generator(z, noise, noise_pool=pool)
    grad = torch.randn_like(out)
    wanted = [z, *generator.parameters()]
    first = torch.autograd.grad(out, wanted, grad, retain_graph=True)
    second = torch.autograd.grad(out, wanted, grad)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match=r"retain_graph|second time"):
        torch.autograd.grad(out, wanted, grad)


@pytest.mark.parametrize("pool", [None, 8])
def test_launches_are_recorded_without_a_gpu_and_without_data(pool) -> None:
    """Nothing on the host reads what lies on the device; forward has fused GEMMs on Hopper at this size."""
    launched: dict[str, set[str]] = {}
    with torch.device("meta"):
        generator = FusedMLPGenerator(24, 64, 8, depth=2, noise_dim=16).to(torch.bfloat16)
        z, noise = torch.empty(300, 24, dtype=torch.bfloat16), torch.empty(300, 2, 16, dtype=torch.bfloat16)

    def record(kernel, arguments, options) -> None:
        absent = {name for name, value in zip(kernel.arg_names, arguments, strict=False) if value is None}
        launched.setdefault(kernel.__name__, absent).intersection_update(absent)

    with launching.recording(record, launching.Processor(9, 132)):
        generator(z, noise, noise_pool=pool).sum().backward()
        assert {"adaln_fwd_kernel", "adaln_bwd_kernel", "silu_bwd_kernel", "column_sums_kernel"} <= set(launched)
        assert launched["linear_kernel"] <= {"residual_desc", "gate_desc"}
    for name, parameter in generator.named_parameters():
        assert parameter.grad.shape == parameter.shape, name
