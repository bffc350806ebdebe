"""Sampling of public EAR and MAR models by our engine."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from benchmarks.public_ear import PublicEAR, initialise
from benchmarks.public_mar import PublicMAR
from ear_kernels import accelerate
from ear_model.config import with_score
from ear_model.model.masking import unmasking_schedule
from ear_model.sampling import public
from ear_model.sampling.engine import decoding_class, is_plain
from ear_model.sampling.weights import Weights
from tests.model.conftest import TINY

CONFIG = dataclasses.replace(TINY, patch_size=1, channels=4, image_size=4, width=32, class_tokens=3)


MAR = dataclasses.replace(with_score(CONFIG, "diffusion"), backbone="mar", encoder_depth=2, depth=1)
KINDS = ["ear", "mar"]


def public_model(kind: str = "ear") -> PublicEAR:
    model = PublicEAR(CONFIG).eval() if kind == "ear" else PublicMAR(MAR, num_sampling_steps=9).eval()
    initialise(model, int(torch.randint(1000, ())))
    if kind == "mar":
        with torch.no_grad():
            model.diffloss.net.final_layer.linear.weight.mul_(0.1)
    return model


def assert_alike(found: torch.Tensor, expected: torch.Tensor, kind: str) -> None:
    """Diffusion of random weights enlarges rounding errors in a few tokens (1e-6 as a rule, 4e-4 at worst of 40)."""
    if kind == "ear":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        return
    error = (found - expected).abs() / (expected.abs() + 0.1)
    assert error.quantile(0.9) < 1e-4
    assert error.max() < 0.02


def seed(number: int) -> None:
    np.random.seed(number)
    torch.manual_seed(number)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_go_back_to_a_mark(kind) -> None:
    """A call that is made anew, because weights have changed, has the draws of the public code: of numpy, too."""
    draws, device = public._Draws(public_model(kind), 5), torch.device("cpu")
    seed(int(torch.randint(1000, ())))
    rewind = draws.mark(device)
    first = draws.orders(3, 16), torch.rand(4)
    rewind()
    again = draws.orders(3, 16), torch.rand(4)
    assert all(map(torch.equal, first, again))
    assert not torch.equal(draws.orders(3, 16), first[0])


# The public MAR has no steps that predict nothing.
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [torch.tensor([1, 7, 7]), None])
@pytest.mark.parametrize(("steps", "guidance"), [(5, 3.0), (1, 2.0), (9, 1.0), (30, 1.0)])
@torch.no_grad()
def test_the_engines_steps_are_the_public_ones(steps, guidance, labels, kind) -> None:
    """On a CPU, where the engine itself stays away: draws, kept values and tokens."""
    if kind == "mar":
        steps = min(steps, 9)
    model = public_model(kind)
    seed(steps)
    expected = model.sample_tokens(3, steps, guidance, "linear", labels, 0.7)
    view = public.PublicModel(model)
    wanted = torch.full((3,), -1) if labels is None else labels
    weights = Weights(view, torch.float32)
    weights.refresh()
    assert is_plain(view)
    decoding = decoding_class(view.config)(view, weights, 3, guided=guidance != 1)
    counts = [left - keep for left, keep in unmasking_schedule(16, steps) if left > keep]
    seed(steps)
    setting = view.setting(steps, guidance, "linear", 0.7)
    decoding.fill(wanted, setting, public._Draws(model, steps), counts)
    decoding.prepare(setting)
    decoding.begin()
    for number, count in enumerate(counts):
        decoding.step(sum(counts[:number]), count)
    assert_alike(view.decode(decoding.tokens_BLD), expected, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_replaces_the_method_and_says_so(kind) -> None:
    model = public_model(kind)
    done = accelerate(model)
    assert done.methods["sample_tokens"] == "the steps as CUDA graphs"
    assert model.sample_tokens.func is public.sample_tokens
    accelerate(model)
    options = {"num_iter": 4, "cfg": 2.0, "labels": torch.tensor([3, 1])}
    for temperature in ({"infer_temperature": 0.5}, {"temperature": 0.5}, {}):
        seed(1)
        found = model.sample_tokens(2, **options, **temperature)
        seed(1)
        factor = 0.5 if temperature else 1.0
        expected = type(model).sample_tokens(model, 2, 4, 2.0, "linear", options["labels"], factor)
        torch.testing.assert_close(found, expected)
    other = copy.deepcopy(model)
    assert other.sample_tokens.args == (other,)
    assert public.swap(torch.nn.Linear(2, 2)) is None


def test_another_process_is_left_alone() -> None:
    """One that predicts something else than the noise, or says nothing of its times."""
    model = public_model("mar")
    assert public._is_read_process(model.diffloss.gen_diffusion)
    model.diffloss.gen_diffusion.model_mean_type = type("", (), {"name": "START_X"})
    assert public.swap(model) is None
    del model.diffloss.gen_diffusion
    assert public.swap(model) is None


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [torch.tensor([1, 7, 7]), None])
@torch.no_grad()
def test_on_a_gpu_it_gives_the_public_latents(labels, kind, monkeypatch) -> None:
    model = public_model(kind).cuda()
    labels = None if labels is None else labels.cuda()
    accelerate(model)
    public.swap(model)
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(1) or replay(graph))
    for guidance in (1.0, 3.0):
        results = []
        for sample in (model.sample_tokens, lambda *rest: type(model).sample_tokens(model, *rest)):
            seed(4)
            results.append(sample(3, 6, guidance, "linear", labels, 0.7))
        assert_alike(*results, kind)
    count = len(replays)
    assert count >= 14
    with torch.autocast("cuda", torch.bfloat16):
        assert model.sample_tokens(3, 6, 3.0, "linear", labels, 0.7).isfinite().all()
    assert len(replays) > count
    count = len(replays)
    model.train().sample_tokens(3, 6, 3.0, "linear", labels, 0.7)
    assert len(replays) == count
