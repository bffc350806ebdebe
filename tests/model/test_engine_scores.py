"""The engine's steps for every score on every backbone give the plain loop's images."""

from dataclasses import replace

import pytest
import torch

from ear_model.config import ModelConfig, SamplingConfig, with_score
from ear_model.draws import Draws, ImageDraws
from ear_model.ear import EAR
from ear_model.sampling.decoding import decode_tokens
from ear_model.sampling.engine import Engines, is_plain
from ear_model.score_names import SCORES
from tests.model.conftest import randomise
from tests.model.test_engine import LABELS, count_replays, images_of, incremental, wide_model

BACKBONES = ["ear", "mar", "causal", "random"]


def config_of(backbone: str, score: str, depth: int = 3) -> ModelConfig:
    config = with_score(wide_model(depth).config, score)
    changes = {"backbone": "mar", "encoder_depth": 2} if backbone == "mar" else {}
    changes |= {"order": backbone} if backbone in ("causal", "random") else {}
    changes |= {"diffusion_steps": 20} if score == "diffusion" else {}
    return replace(config, **changes)


def model_of(backbone: str, score: str, depth: int = 3) -> EAR:
    """Like :func:`wide_model`; randomly, so that hidden states and noise both matter to every token."""
    model = randomise(EAR(config_of(backbone, score, depth))).eval()
    if score == "categorical":
        model.score.codebook.normal_()
    return model


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("score", list(SCORES))
def test_a_model_made_on_a_device_is_there_whole(backbone, score):
    config = config_of(backbone, score)
    with torch.device("meta"):
        model = EAR(config)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.device.type == "meta", name


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("score", list(SCORES))
@pytest.mark.parametrize("guidance", [1.0, 1.8])
@torch.no_grad()
def test_every_score_on_every_backbone(backbone, score, guidance, monkeypatch):
    """Guided on a part of the steps; diffusion in chunks that do not divide its steps.

    In float64, tokens in float32: diffusion of random weights enlarges rounding errors from step to step.
    """
    model = model_of(backbone, score, depth=1 + int(torch.randint(3, ())))
    assert is_plain(model)
    model.double()
    monkeypatch.setattr("ear_model.scores.denoising.MOST_STEPS", 4)
    setting = SamplingConfig(5, guidance, "linear", 0.7, 0.1, 0.8, diffusion_steps=11)
    seed = int(torch.randint(2**40, ()))
    for draws in (lambda: ImageDraws(seed, range(3)), lambda: Draws(torch.Generator().manual_seed(seed % 2**31))):
        expected = decode_tokens(model, LABELS, setting, draws())
        found = incremental(model, setting, draws())
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


class PretendedGraphs:
    """Of a CPU: a name does what was captured under it first, as a CUDA graph does."""

    def __init__(self, device: torch.device) -> None:
        self.works: dict = {}
        self.names = self.works.keys()

    def capture(self, works, before) -> None:
        self.works.update({name: work for name, work in works.items() if name not in self.works})

    def __call__(self, name, work=None) -> None:
        self.works.setdefault(name, work)()


SETTINGS = (
    SamplingConfig(5, 2.0, "linear", 0.7, diffusion_steps=6),
    SamplingConfig(3, 1.5, "constant", 0.7, 0.1, 0.8, diffusion_steps=6),
    SamplingConfig(8, 3.0, "linear", 0.3, diffusion_steps=4),
    SamplingConfig(5, 2.0, "linear", 0.7, diffusion_steps=6),
)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("score", list(SCORES))
@torch.no_grad()
def test_names_of_graphs_say_all_that_they_depend_on(backbone, score, monkeypatch):
    """One engine for settings that differ in everything but the batch and whether there is guidance."""
    monkeypatch.setattr("ear_model.sampling.engine.Graphs", PretendedGraphs)
    model = model_of(backbone, score).double()
    engines = Engines()
    for number, setting in enumerate(SETTINGS):
        labels = LABELS.roll(number)
        expected = decode_tokens(model, labels, setting, ImageDraws(number, range(3)))
        engine = engines._engine(model, 3, True, (torch.float64, False))
        engine.refresh()
        found = engine(labels, setting, ImageDraws(number, range(3)))
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("score", list(SCORES))
def test_a_gpu_gives_the_images_of_a_cpu_by_every_score(monkeypatch, backbone, score):
    model = model_of(backbone, score)
    options = {"guidance": 1.5, "guidance_to": 0.8} | ({"diffusion_steps": 7} if score == "diffusion" else {})
    expected = images_of(model, **options)
    model.cuda()
    replays = count_replays(model, monkeypatch)
    for _ in range(2):
        found = images_of(model, precision="fp32", **options)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert replays
        replays.clear()
    # Nothing here has another precision's numbers.
    assert images_of(model, precision="bf16", **options).isfinite().all()
    randomise(model)
    assert not torch.allclose(images_of(model, precision="fp32", **options), found)
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "eager")
    plain = images_of(model, precision="fp32", **options)
    monkeypatch.delenv("EAR_KERNELS_BACKEND")
    torch.testing.assert_close(images_of(model, precision="fp32", **options), plain, rtol=1e-3, atol=1e-4)
