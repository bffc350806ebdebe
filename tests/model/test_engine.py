"""Sampling step by step over kept values, by CUDA graphs, image by image: all give the plain loop's images."""

import copy
import pickle

import numpy as np
import pytest
import torch

from ear_model.config import SamplingConfig
from ear_model.draws import Draws, ImageDraws
from ear_model.ear import EAR
from ear_model.errors import RunError
from ear_model.model.masking import unmasking_schedule
from ear_model.sampling.decoding import decode_tokens
from ear_model.sampling.engine import Engines, decoding_class, is_plain
from ear_model.sampling.first_step import NULL, FirstStep
from ear_model.sampling.images import sample_images
from ear_model.sampling.incremental import IncrementalDecoding
from ear_model.sampling.weights import Weights
from tests.model.conftest import TINY, randomise

LABELS = torch.tensor([0, 5, 9])


def wide_model(depth: int = 3) -> EAR:
    """Big enough for every kernel of a GPU, with heads of 16 features."""
    config = copy.copy(TINY)
    for name, value in {
        "width": 64,
        "depth": depth,
        "num_heads": 4,
        "class_tokens": 5,
        "generator_width": 64,
    }.items():
        object.__setattr__(config, name, value)
    return randomise(EAR(config)).eval()


def incremental(model: EAR, setting: SamplingConfig, draws: Draws) -> torch.Tensor:
    weights = Weights(model, model.backbone.decoder_pos_embed_learned.dtype)
    weights.refresh()
    decoding = decoding_class(model.config)(model, weights, len(LABELS), guided=setting.guidance != 1)
    tokens = model.config.num_tokens
    number = tokens if decoding.is_causal else setting.steps
    steps = [(left, keep) for left, keep in unmasking_schedule(tokens, number) if left > keep]
    decoding.fill(LABELS, setting, draws, [left - keep for left, keep in steps])
    decoding.prepare(setting)
    decoding.begin()
    for left, keep in steps:
        decoding.step(tokens - left, left - keep, setting.guides(left, tokens))
    return decoding.tokens_BLD


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("steps", [1, 5, 40])
@pytest.mark.parametrize("guidance", [1.0, 1.0000001, 2.5])
@torch.no_grad()
def test_kept_values_change_no_token(depth, steps, guidance):
    model, setting = wide_model(depth), SamplingConfig(steps, guidance, temperature=0.7)
    seed = int(torch.randint(2**40, ()))
    for draws in (lambda: ImageDraws(seed, range(3)), lambda: Draws(torch.Generator().manual_seed(seed % 2**31))):
        expected = decode_tokens(model, LABELS, setting, draws())
        torch.testing.assert_close(incremental(model, setting, draws()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interval", [(0.3, 1.0), (0.0, 0.6), (0.2, 0.7)])
@torch.no_grad()
def test_guidance_on_an_interval_and_another_order(interval, monkeypatch):
    model, setting = wide_model(), SamplingConfig(6, 3.0, "linear", 0.7, *interval, "halton")
    sizes = []
    forward = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda t, m, c, **more: sizes.append(len(t)) or forward(t, m, c))
    expected = decode_tokens(model, LABELS, setting, ImageDraws(4, range(3)))
    assert set(sizes) == {3, 6}
    torch.testing.assert_close(incremental(model, setting, ImageDraws(4, range(3))), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@torch.no_grad()
def test_the_first_step_from_a_table(guidance, monkeypatch):
    model, setting = wide_model(), SamplingConfig(4, guidance, temperature=0.7)
    weights = Weights(model, torch.float32)
    weights.refresh()
    runs = []
    bytes_of_a_class = 4 * model.config.num_tokens * model.config.width
    monkeypatch.setattr("ear_model.sampling.first_step.MOST_BYTES", 5 * bytes_of_a_class)
    table = FirstStep(IncrementalDecoding, model, weights, lambda name, work: runs.append(name) or work())
    assert table.capacity == 5
    decoding = IncrementalDecoding(model, weights, 3, guided=guidance != 1)
    counts = [left - keep for left, keep in unmasking_schedule(16, 4)]
    for labels in (LABELS, torch.tensor([9, 9, 1]), torch.tensor([7, 3, 9]), LABELS):
        expected = decode_tokens(model, labels, setting, ImageDraws(8, range(3)))
        decoding.fill(labels, setting, ImageDraws(8, range(3)), counts)
        decoding.prepare(setting)
        places = table.places(labels.tolist() + [NULL] * (decoding.sequences - 3))
        decoding.begin()
        pieces = decoding.pieces(0, counts[0], True, (table.hidden_TLC, torch.tensor(places)))
        for _, work in pieces:
            work()
        for number, count in enumerate(counts[1:], 1):
            decoding.step(sum(counts[:number]), count)
        torch.testing.assert_close(decoding.tokens_BLD, expected, rtol=1e-4, atol=1e-5)
    before = len(runs)
    assert table.places([9, 0, 9]) == [table.places([9])[0], table.places([0])[0], table.places([9])[0]]
    assert len(runs) == before
    assert table.places(range(6)) is None
    table.clear()
    table.places([0])
    assert runs[-1] == ("first", 2)
    assert len(runs) == before + 1


def test_an_image_depends_on_seed_and_index_alone(tiny_model):
    labels = torch.arange(70) % 10
    options = {"steps": 5, "guidance": 2.0, "seed": 2**70 + 3}
    whole = sample_images(tiny_model, labels, batch_size=64, **options)
    for batch_size in (1, 7):
        torch.testing.assert_close(sample_images(tiny_model, labels, batch_size=batch_size, **options), whole)
    some = [3, 69, 12]
    torch.testing.assert_close(sample_images(tiny_model, labels[some], indices=some, **options), whole[some])
    assert len({image.numpy().tobytes() for image in whole}) == 70
    others = sample_images(tiny_model, labels, steps=5, guidance=2.0, seed=2**70 + 4)
    assert not torch.isclose(others, whole).all(dim=(1, 2, 3)).any()


@pytest.mark.parametrize("seeds", [(5, 5 + 7 * 2**32), (0, 2**32), (1, 2**64 + 1), (0, 2**128)])
def test_seeds_of_any_size_are_distinct(seeds):
    first, second = (ImageDraws(seed, range(9)).rand(9, 40).numpy() for seed in seeds)
    assert len(np.unique(np.concatenate([first, second]), axis=0)) == 18


def test_draws_do_not_depend_on_how_they_are_divided():
    for draw in ("rand", "randn"):
        whole = getattr(ImageDraws(3, range(4)), draw)(4, 10, 3)
        parts = ImageDraws(3, range(4))
        pieces = [getattr(parts, draw)(4, count, 3) for count in (1, 2, 7)]
        assert torch.equal(torch.cat(pieces, 1), whole)
        assert torch.equal(getattr(ImageDraws(3, [2]), draw)(1, 10, 3), whole[2:3])
    uniform = ImageDraws(int(torch.randint(2**31, ())), range(8)).rand(8, 5000)
    assert 0 <= uniform.min() < 0.01
    assert 0.99 < uniform.max() < 1


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": 1.5}, TypeError, "seed is 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"indices": [1]}, ValueError, "1 indices were given for 3 labels"),
        ({"precision": "int4"}, ValueError, "precision is 'int4'"),
        ({"precision": "fp8"}, ValueError, "compute capability 9"),
        ({"steps": 0}, ValueError, "steps is 0"),
        ({"guidance": float("nan")}, ValueError, "guidance is nan"),
    ],
)
def test_bad_options_are_named(tiny_model, options, error, named):
    with pytest.raises(error, match=named):
        sample_images(tiny_model, LABELS, **options)


def test_no_images(tiny_model):
    assert sample_images(tiny_model, LABELS[:0]).shape == (0, 1, 8, 8)


def test_values_that_are_not_finite_are_an_error(tiny_model):
    with torch.no_grad():
        tiny_model.score.generator.final_layer.linear.bias[1] = float("inf")
    with pytest.raises(RunError, match="not finite"):
        tiny_model.sample(LABELS, steps=2)


def test_what_wraps_the_steps_sees_the_images_form(tiny_model):
    seen = []

    def progress(steps):
        for step in steps:
            yield step
            seen.append((step.left, step.keep, step.images()))

    images = tiny_model.sample(LABELS, steps=4, progress=progress)
    assert [(left, keep) for left, keep, _ in seen] == [(16, 14), (14, 11), (11, 6), (6, 0)]
    assert torch.equal(seen[-1][2], images)
    known = [(tiny_model.tokenizer.encode(part) != 0).any(-1).sum(1).tolist() for _, _, part in seen]
    assert known == [[2] * 3, [5] * 3, [10] * 3, [16] * 3]


def test_engines_are_no_part_of_a_copy(tiny_model):
    tiny_model.sample(LABELS, steps=2)
    for other in (copy.deepcopy(tiny_model), pickle.loads(pickle.dumps(tiny_model))):
        assert other._engines is not tiny_model._engines
        draws = [ImageDraws(1, range(3)) for _ in range(2)]
        found, expected = (model.sample(LABELS, steps=2, draws=draws.pop()) for model in (other, tiny_model))
        assert torch.equal(found, expected)


def test_moving_a_model_frees_its_engines(tiny_model):
    tiny_model._engines._kept["key"] = None
    assert tiny_model.to("cpu") is tiny_model
    assert not tiny_model._engines._kept


def test_what_is_not_plain_is_seen():
    model = wide_model()
    assert is_plain(model)
    hook = model.backbone.decoder_blocks[1].attn.qkv.register_forward_hook(lambda *arguments: None)
    assert not is_plain(model)
    hook.remove()
    assert is_plain(model)
    torch.nn.utils.parametrizations.weight_norm(model.backbone.decoder_blocks[0].mlp.fc1)
    assert not is_plain(model)


class PretendedEngine:
    """In the place of an engine, where there is no GPU: the plain loop of the model as it was."""

    def __init__(self, model: EAR) -> None:
        self.model, self.calls, self.weights = copy.deepcopy(model), 0, self
        self.moved = self.changed = False

    def start_check(self) -> None:
        self.calls += 1

    def fits(self, model: EAR) -> bool:
        return not self.moved

    def have_changed(self) -> bool:
        return self.changed

    def __call__(self, labels: torch.Tensor, sampling: SamplingConfig, draws: Draws) -> torch.Tensor:
        return decode_tokens(self.model.eval(), labels, sampling, draws)


@pytest.mark.parametrize("draws", [lambda: ImageDraws(9, range(3)), lambda: Draws(torch.Generator().manual_seed(4))])
@pytest.mark.parametrize("change", ["nothing", "hook", "moved", "changed"])
@torch.no_grad()
def test_what_has_changed_is_seen_afterwards_and_drawn_again(tiny_model, monkeypatch, draws, change):
    """An engine that is there starts at once; if the model is another by now, the same draws are made again."""
    setting = SamplingConfig(3, 2.0)
    engine = PretendedEngine(tiny_model)
    tiny_model._engines._kept[3, True, (torch.float32, False)] = engine
    monkeypatch.setattr(Engines, "_may_capture", staticmethod(lambda labels: True))
    monkeypatch.setattr(Engines, "takes", staticmethod(lambda *arguments: False))
    called = []
    if change == "hook":
        tiny_model.backbone.z_proj.register_forward_hook(lambda *arguments: called.append(1))
    elif change != "nothing":
        randomise(tiny_model)
        setattr(engine, change, True)
    expected = decode_tokens(copy.deepcopy(tiny_model).eval(), LABELS, setting, draws())
    called.clear()
    found = tiny_model._engines.decode(tiny_model, LABELS, setting, draws())
    torch.testing.assert_close(found, expected)
    assert engine.calls == 1
    assert bool(called) == (change == "hook")


def count_replays(model: EAR, monkeypatch) -> list[int]:
    replays: list[int] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    return replays


def images_of(model: EAR, labels: torch.Tensor = LABELS, **options) -> torch.Tensor:
    settings = {"steps": 6, "guidance": 2.0, "temperature": 0.7, "seed": 3, **options}
    return sample_images(model, labels, **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_gpu_gives_the_images_of_a_cpu(monkeypatch, guidance):
    model = wide_model()
    expected = images_of(model, guidance=guidance)
    model.cuda()
    replays = count_replays(model, monkeypatch)
    for _ in range(2):
        found = images_of(model, guidance=guidance, precision="fp32")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # The first call computes the table of the first step.
    assert len(replays) == 15
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "eager")
    torch.testing.assert_close(images_of(model, guidance=guidance, precision="fp32"), found, rtol=1e-4, atol=1e-5)
    assert len(replays) == 15


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_16_bits_are_as_far_off_as_the_plain_loops(precision):
    model = wide_model(5).cuda()
    labels = torch.arange(70) % 10
    exact = images_of(model, labels, precision="fp32")
    found = images_of(model, labels, precision=precision)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EAR_KERNELS_BACKEND", "eager")
        plain = images_of(model, labels, precision="bf16")
    error, limit = ((part - exact).square().mean().sqrt() for part in (found, plain))
    # e4m3 keeps 4 bits of a number, bfloat16 8.
    assert error <= limit * (2 if precision == "bf16" else 32)
    for batch_size in (1, 7, 64):
        other = images_of(model, labels, precision=precision, batch_size=batch_size)
        assert (other - exact).square().mean().sqrt() <= 1.5 * error


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_changed_weights_are_seen(precision):
    model = wide_model().cuda()
    first = images_of(model, precision=precision)
    assert torch.equal(images_of(model, precision=precision), first)
    for change in (
        lambda: model.backbone.decoder_blocks[1].mlp.fc1.weight.data.mul_(1.5),
        lambda: model.load_state_dict(wide_model().state_dict()),
        lambda: randomise(model.score),
        lambda: model.float().to("cpu").to("cuda"),
        lambda: setattr(model.backbone, "z_proj", copy.deepcopy(model.backbone.z_proj)),
    ):
        change()
        fresh = copy.deepcopy(model)
        torch.testing.assert_close(images_of(model, precision=precision), images_of(fresh, precision=precision))
    assert not torch.allclose(images_of(model, precision=precision), first)


@pytest.mark.gpu
def test_a_model_in_training_samples_and_goes_on(monkeypatch):
    model = wide_model().cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    images, labels = torch.rand(8, 1, 8, 8, device="cuda"), torch.arange(8, device="cuda")
    replays = count_replays(model, monkeypatch)
    before = None
    for _ in range(3):
        optimizer.zero_grad()
        model(images, labels).backward()
        optimizer.step()
        sampled = images_of(model, precision="fp32")
        assert model.training
        torch.testing.assert_close(sampled, images_of(copy.deepcopy(model), precision="fp32"))
        assert before is None or not torch.allclose(sampled, before)
        before = sampled
    assert replays


@pytest.mark.gpu
def test_hooks_are_called_and_engines_released(monkeypatch):
    model = wide_model().cuda()
    expected = images_of(model, precision="fp32")
    called = []
    hook = model.backbone.decoder_blocks[0].attn.proj.register_forward_hook(lambda *arguments: called.append(1))
    replays = count_replays(model, monkeypatch)
    torch.testing.assert_close(images_of(model, precision="fp32"), expected, rtol=1e-4, atol=1e-5)
    assert len(called) == 6
    hook.remove()
    model._engines.release()
    torch.testing.assert_close(images_of(model, precision="fp32"), expected)
    assert replays


@pytest.mark.gpu
def test_other_batches_steps_and_temperatures_between():
    model = wide_model().cuda()
    expected = images_of(model)
    others = ({"steps": 1}, {"temperature": 0.3}, {"guidance": 1.0}, {"batch_size": 2}, {"steps": 40})
    for options in (*others, {"guidance_from": 0.5}, {"order": "halton"}):
        images_of(model, **options)
    for count in range(1, 6):
        images_of(model, torch.arange(count))
    assert torch.equal(images_of(model), expected)
    assert len(Engines()._kept) == 0 < len(model._engines._kept) <= 3
