"""The stand-in for the public code computes what ours computes, from the same weights, orders and noise."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.public_ear import PublicEAR, initialise
from ear_model.config import SamplingConfig
from ear_model.draws import Draws
from ear_model.ear import EAR
from ear_model.model import masking
from ear_model.model.masking import unmasking_schedule
from ear_model.model.weights import our_key
from ear_model.presets import EAR_BASE
from ear_model.sampling.decoding import decode_tokens

CONFIG = replace(
    EAR_BASE, image_size=6, channels=3, patch_size=2, num_classes=7, width=24, depth=2, num_heads=3, class_tokens=5,
    generator_width=20, generator_depth=2, noise_dim=6,
)  # fmt: skip


class Given(Draws):
    """Orders ``[B, L]`` and a noise vector for each token ``[B, L, E]``, whichever step predicts it."""

    def __init__(self, orders: Tensor, noise: Tensor, steps: int) -> None:
        super().__init__()
        self.given, self.noise = orders, noise
        schedule = unmasking_schedule(orders.shape[1], steps)
        self.predicted = [orders[:, keep:left] for left, keep in schedule if left > keep]
        self.steps = iter(self.predicted)

    def orders(self, images: int, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        assert self.given.shape == (images, tokens)
        return self.given

    def rand(self, *shape: int, device: torch.device | str = "cpu") -> Tensor:
        return self.noise_of(next(self.steps), shape)

    def noise_of(self, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.stack([own[chosen] for own, chosen in zip(self.noise, positions, strict=True)]).view(shape)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Give the public code the same; it goes through the tokens of a step by position."""
        orders, steps = iter(self.given.numpy()), iter(self.predicted)

        def rand(shape: tuple[int, int], **options) -> Tensor:
            # With more steps than tokens, the public code draws for none at times.
            return self.noise_of(next(steps).sort(dim=-1).values, shape) if shape[0] else torch.empty(shape)

        monkeypatch.setattr(np.random, "shuffle", lambda order: np.copyto(order, next(orders)))
        monkeypatch.setattr(torch, "rand", rand)


def public_scale(guidance: float, schedule: str, num_tokens: int, keep: int) -> float:
    """The last step counts one token as left (docs/model.md, "Sampling")."""
    return masking.guidance_scale(guidance, schedule, num_tokens, max(keep, 1))


def make_pair() -> tuple[PublicEAR, EAR]:
    public, ours = PublicEAR(CONFIG).eval(), EAR(CONFIG).eval()
    initialise(public, seed=int(torch.randint(2**31, ())))
    ours.load_state_dict({our_key(key): tensor for key, tensor in public.state_dict().items()})
    return public, ours


@torch.no_grad()
@pytest.mark.parametrize(
    ("steps", "guidance", "schedule"),
    [(4, 3.0, "linear"), (9, 2.0, "constant"), (14, 3.0, "linear"), (1, 0.5, "linear"), (3, 1.0, "linear")],
)
def test_it_samples_as_we_do(monkeypatch, steps, guidance, schedule):
    public, ours = make_pair()
    tokens = CONFIG.num_tokens
    orders = torch.rand(3, tokens).argsort(dim=-1)
    draws = Given(orders, torch.rand(3, tokens, CONFIG.noise_dim), steps)
    labels = torch.randint(CONFIG.num_classes, (3,))
    monkeypatch.setattr("ear_model.sampling.decoding.guidance_scale", public_scale)
    wanted = decode_tokens(ours, labels, SamplingConfig(steps, guidance, schedule, 0.7), draws)
    wanted = ours.tokenizer.decode(wanted)
    draws.patch(monkeypatch)
    found = public.sample_tokens(3, steps, guidance, schedule, labels, infer_temperature=0.7)
    assert found.shape == (3, CONFIG.channels, CONFIG.image_size, CONFIG.image_size)
    assert found.std() > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_labels_it_samples_the_null_class():
    public, _ = make_pair()

    def sample(cfg: float, labels: Tensor | None) -> Tensor:
        torch.manual_seed(1)
        np.random.seed(1)
        return public.sample_tokens(2, 3, cfg, labels=labels)

    assert torch.equal(sample(1.0, None), sample(1.0, None))
    assert not torch.equal(sample(1.0, None), sample(1.0, torch.tensor([0, 1])))
    torch.testing.assert_close(sample(3.0, None), sample(1.0, None), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="cfg_schedule is 'cosine'"):
        public.sample_tokens(1, cfg_schedule="cosine")


def test_patches_are_put_together_again():
    public, ours = make_pair()
    images = torch.randn(2, CONFIG.channels, CONFIG.image_size, CONFIG.image_size)
    assert torch.equal(public.patchify(images), ours.tokenizer.encode(images))
    assert torch.equal(public.unpatchify(public.patchify(images)), images)
