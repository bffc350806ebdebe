"""The benchmark of sampling with a tiny model on a CPU: what it records, and that it refuses wrong images."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import bench_sampling, harness
from benchmarks.bench_sampling import KINDS, RIVALS, ROWS
from benchmarks.clocks import HAS_GPU, grouped, summed_up
from benchmarks.harness import FP8, OURS, PUBLIC, PUBLIC_ACCELERATED, Unavailable
from ear_model.ear import EAR
from ear_model.presets import MODELS
from ear_model.sampling import public
from tests.model.conftest import TINY

pytestmark = pytest.mark.skipif(HAS_GPU, reason="on a GPU the benchmark checks its own sizes")


@pytest.fixture(autouse=True)
def _tiny(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(bench_sampling, "SMALL", TINY)
    monkeypatch.setattr(bench_sampling, "BUDGET_S", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several would mostly wait for one another
    yield
    torch.set_num_threads(threads)


def change_samples(monkeypatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    right = EAR.sample
    monkeypatch.setattr(EAR, "sample", lambda self, *given, **named: change(right(self, *given, **named)))


@pytest.mark.parametrize("rival", [PUBLIC, PUBLIC_ACCELERATED, OURS])
@pytest.mark.parametrize("images", [1, 3])
def test_a_row_has_times_of_a_call_and_of_an_image(rival, images):
    begun = time.perf_counter()
    record = bench_sampling.run("", images, rival)
    took = 1e3 * (time.perf_counter() - begun)
    assert record["first_ms"] + bench_sampling.LEAST * record["wall_ms"]["p20"] < took
    assert record["image_ms"]["median"] == pytest.approx(record["wall_ms"]["median"] / images)
    assert record["images_per_s"] == pytest.approx(1e3 / record["image_ms"]["median"])
    assert ("error_over_eager" in record) == (rival == OURS)


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_wrong_images_have_no_time(monkeypatch, factor):
    row = harness.Row("sampling", OURS, measure=lambda: bench_sampling.run("", 2, OURS))
    assert harness.measure(row)["error_over_eager"] < 2
    change_samples(monkeypatch, lambda images: images * factor)
    record = harness.measure(row)
    assert set(record) == {"case", "rival", "failed"}
    assert ("NaN" if factor != factor else "times as far off as the plain loop's in bf16") in record["failed"]


def test_noise_of_a_few_bits_is_allowed_in_fp8_alone(monkeypatch):
    change_samples(monkeypatch, lambda images: images * (1 + 0.05 * torch.randn_like(images)))
    # A CPU has no FP8: the same images are held against both limits.
    with monkeypatch.context() as context:
        context.setattr(bench_sampling, "ALLOWED", {OURS: bench_sampling.ALLOWED[FP8]})
        assert 2 < bench_sampling.check(TINY, 2, OURS) < 32
    with pytest.raises(AssertionError, match="times as far off"):
        bench_sampling.check(TINY, 2, OURS)


def test_an_accelerated_model_samples_by_the_engine():
    replaced = {rival: vars(bench_sampling.sampler(TINY, 1, rival).args[0]) for rival in (PUBLIC, PUBLIC_ACCELERATED)}
    assert "sample_tokens" not in replaced[PUBLIC]
    assert replaced[PUBLIC_ACCELERATED]["sample_tokens"].func is public.sample_tokens


def test_each_rival_has_its_precision(monkeypatch):
    class Model:
        def sample(self, labels, *, precision, **options):
            return precision

    def sample(rival):
        return bench_sampling.sample_ours(Model(), torch.tensor([1]), rival, 3)

    assert sample(OURS) == "fp32"
    with pytest.raises(Unavailable, match="needs a GPU"):
        sample(FP8)
    monkeypatch.setattr(bench_sampling, "HAS_GPU", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert (sample(OURS), sample(FP8)) == ("bf16", "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(Unavailable, match="compute capability 9"):
        sample(FP8)


def test_a_second_process_finds_what_the_first_one_compiled(monkeypatch):
    seen = []

    def in_new_process(run, *given, start):
        assert start == "spawn"  # or the environment is not the new one
        folder = Path(os.environ["TRITON_CACHE_DIR"])
        seen.append((folder, folder.exists(), os.environ["TORCHINDUCTOR_CACHE_DIR"]))
        folder.mkdir(exist_ok=True)
        return run(*given)

    monkeypatch.setattr(harness, "in_new_process", in_new_process)
    rows = [row for row in ROWS if row.case.startswith("first image") and row.rival == OURS]
    records = [row.measure() for row in rows]
    assert all(record["wall_ms"]["median"] > 0 for record in records)
    assert [(folder == seen[0][0], filled) for folder, filled, _ in seen] == [(True, False), (True, True)]
    assert os.environ.get("TRITON_CACHE_DIR") != str(seen[0][0])


@pytest.mark.slow
def test_a_new_process_makes_an_image():
    assert harness.in_new_process(bench_sampling.run_first_image, "", OURS)["wall_ms"]["median"] > 0


def test_a_step_by_part(monkeypatch):
    def profiled(calls, least):
        assert calls[0]().shape == (3, 1, 8, 8)
        steps = bench_sampling.STEPS
        return summed_up([("nvjet_sm90", 0.0, 2000.0 * steps), ("copy", 0.0, 1000.0 * steps)], count=1)

    monkeypatch.setattr(bench_sampling, "profiled", profiled)
    monkeypatch.setitem(bench_sampling.CONFIGS, "digits", MODELS["digits"])
    record = bench_sampling.run_by_part("digits", 3, PUBLIC)
    assert record["groups"] == {**dict.fromkeys(KINDS, 0.0), "matrix products": 2.0, "the rest": 1.0}
    assert (record["gpu_ms"]["median"], record["kernels_ms"]) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("attention", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7"),
        ("attention", "attention_fwd_kernel"),
        ("generator", "generator_kernel"),
        ("generator", "adaln_fwd_kernel"),
        ("norms and residuals", "dropout_add_layer_norm_fwd_kernel"),
        ("norms and residuals", "triton_per_fused_add_native_layer_norm_2"),
        ("GELU", "gelu_dropout_fwd_kernel"),
        ("GELU", "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(...)"),
        ("matrix products", "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN"),
        ("matrix products", "void cublasLt::splitKreduce_kernel<32, 16, int, float>"),
        ("the rest", "void at::native::(anonymous namespace)::CatArrayBatchedCopy<float>"),
    ],
)
def test_kernels_are_of_the_right_kind(kind, name):
    assert grouped([{"name": name, "ms": 1.0}], KINDS)[kind] == 1.0


def test_rows_need_a_gpu_and_are_chosen_by_name():
    names = [str(row) for row in ROWS]
    assert len(set(names)) == len(names)
    assert f"sampling, EAR-B, 256 images: {FP8}" in names
    assert {row.reason for row in ROWS if "small" not in row.case} == {"needs a GPU"}
    assert [row.rival for row in ROWS if "small" in row.case] == list(RIVALS)
