"""The loss's graphs, and what surrounds them, on a GPU and with calls in their place on a CPU."""

import copy
import functools
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ear_model.ear import EAR
from ear_model.model import masking
from ear_model.training.graphs import CapturedLoss
from ear_model.training.loss import TrainingLoss
from ear_model.training.trainer import Trainer
from tests.model.conftest import randomise, tiny_run
from tests.model.test_graphs import SMALL, assert_alike

Loss = TrainingLoss | CapturedLoss
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def on_a_cpu(monkeypatch) -> None:
    """Calls in the place of graphs, so that all but the capture runs without a GPU."""

    def capture(self: CapturedLoss) -> None:
        self._prepare()
        self._graphs = {count: SimpleNamespace(replay=functools.partial(self._run, count)) for count in self._counts}
        self.captures = getattr(self, "captures", 0) + 1

    monkeypatch.setattr(CapturedLoss, "_capture", capture)


def small(device: str) -> EAR:
    torch.manual_seed(0)
    return randomise(EAR(replace(SMALL, dropout=0.0, attention_dropout=0.0, depth=1))).to(device).train()


def captured_loss(model: EAR, counts: list[int], *, chunks: int = 1, rows_per_noise: int = 1) -> CapturedLoss:
    use_bf16 = next(model.parameters()).is_cuda
    return CapturedLoss(TrainingLoss(model.score, chunks, rows_per_noise), counts, use_bf16=use_bf16)


def one_step(
    model: EAR, masked: int, weight: float = 1.0, loss: Loss | None = None, *, add: bool = False
) -> torch.Tensor:
    device = next(model.parameters()).device
    torch.manual_seed(masked)
    images, labels = torch.randn(2, 16, 16, 16, device=device), torch.arange(2, device=device)
    if not add:
        model.zero_grad(set_to_none=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        value = model(images, labels, num_masked=masked, score_loss=loss) * weight
    value.backward()
    return value.detach().clone()


def loss_and_gradients(
    model: EAR, masked: int, weight: float = 1.0, loss: Loss | None = None, *, add: bool = False
) -> list[torch.Tensor]:
    value = one_step(model, masked, weight, loss, add=add)
    return [value, *(parameter.grad.clone() for parameter in model.parameters())]


def prepare(request, device: str) -> None:
    if device == "cpu":
        request.getfixturevalue("on_a_cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("chunks", "per_noise"), [(1, 1), (3, 1), (1, 4)])
def test_the_loss_of_a_graph_and_its_gradients(request, device, chunks, per_noise) -> None:
    prepare(request, device)
    model = small(device)
    uncaptured = TrainingLoss(model.score, chunks, per_noise)
    cases = ((180, 1.0), (256, 0.5), (201, 1.0), (180, 2.0))
    plain = [loss_and_gradients(model, *case, uncaptured) for case in cases]
    random_state = torch.get_rng_state()
    captured = captured_loss(
        model, [2 * number for number in (180, 201, 256)], chunks=chunks, rows_per_noise=per_noise
    )
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not captured.takes(torch.zeros(2 * 190, SMALL.width))
    for case, expected in zip(cases, plain, strict=True):
        replays = captured.replays
        assert_alike(loss_and_gradients(model, *case, captured), expected)
        assert captured.replays == replays + 2
    # A number of tokens without a graph, and a parameter that changes in its place.
    loss_and_gradients(model, 190, loss=captured)
    with torch.no_grad():
        model.score.generator.input_proj.weight.mul_(3)
    replayed = loss_and_gradients(model, 201, loss=captured)
    assert_alike(replayed, loss_and_gradients(model, 201, loss=uncaptured))
    assert (replayed[0] - plain[2][0]).abs() > 1e-3


@pytest.mark.parametrize("device", DEVICES)
def test_another_tau_is_captured_anew(request, device) -> None:
    prepare(request, device)
    model = small(device)
    captured = captured_loss(model, [360])
    first = loss_and_gradients(model, 180, loss=captured)
    # A loss that is alive has nodes of the parameters in autograd, which belong to its stream.
    hidden, targets = torch.randn(360, SMALL.width, device=device), torch.randn(360, 16, device=device)
    alive = captured(hidden, targets)
    plain = model.score.loss_of(hidden, targets, model.score.draw_noise(360, SMALL.num_samples, like=hidden))
    parameters = list(model.parameters())
    model.score.tau = 0.9
    second = loss_and_gradients(model, 180, loss=captured)
    assert_alike(second, loss_and_gradients(model, 180))
    assert (first[0] - second[0]).abs() > 1e-3
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    if device == "cpu":
        assert captured.captures == 2
    assert alive.isfinite()
    assert plain.isfinite()


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_losses_add_up(request, device) -> None:
    prepare(request, device)
    model = small(device)
    single = [loss_and_gradients(model, number) for number in (180, 201)]
    captured = captured_loss(model, [360, 402])
    loss_and_gradients(model, 180, loss=captured)
    total = loss_and_gradients(model, 201, loss=captured, add=True)
    assert_alike(total[1:], [sum(parts) for parts in zip(*(each[1:] for each in single), strict=True)])


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_parameters_of_the_generator_get_no_gradient(request, device) -> None:
    prepare(request, device)
    model = small(device)
    model.score.generator.requires_grad_(False)
    model.score.generator.input_proj.requires_grad_(True)
    captured = captured_loss(model, [360])
    torch.manual_seed(1)
    hidden, targets = torch.randn(360, SMALL.width, device=device), torch.randn(360, 16, device=device)
    captured(hidden, targets).backward()
    given = {name for name, parameter in model.score.generator.named_parameters() if parameter.grad is not None}
    assert given == {"input_proj.weight", "input_proj.bias"}


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_were_overwritten_are_refused(request, device) -> None:
    prepare(request, device)
    captured = captured_loss(small(device), [360])
    hidden = torch.randn(360, SMALL.width, device=device)
    targets = torch.randn(360, 16, device=device)
    first, second = captured(hidden, targets), captured(hidden, targets)
    with pytest.raises(RuntimeError, match="gradients of this loss are gone"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradients of this loss are gone"):
        second.backward()


@pytest.mark.parametrize("device", DEVICES)
def test_parameters_that_are_frozen_later_and_freed_again(request, device) -> None:
    prepare(request, device)
    model = small(device)
    plain = loss_and_gradients(model, 180)
    names = [name for name, _ in model.named_parameters()]
    captured = captured_loss(model, [360])
    frozen = model.score.generator.noise_embed
    for trained in (False, True):
        frozen.requires_grad_(trained)
        one_step(model, 180, loss=captured)
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert (found["score.generator.noise_embed.weight"] is not None) == trained
        kept = [(found[name], other) for name, other in zip(names, plain[1:], strict=True) if found[name] is not None]
        assert_alike(*map(list, zip(*kept, strict=True)))


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_are_set_to_zero_in_place(request, device) -> None:
    prepare(request, device)
    model = small(device)
    captured = captured_loss(model, [360])
    first = loss_and_gradients(model, 180, loss=captured)
    for _ in range(2):
        model.zero_grad(set_to_none=False)
        repeated = loss_and_gradients(model, 180, loss=captured, add=True)
        assert_alike(repeated, first)


def test_the_copies_hold_around_forward_and_backward(tmp_path) -> None:
    events = []

    class Copies:
        def __enter__(self) -> None:
            events.append("enter")

        def __exit__(self, *error) -> None:
            events.append("leave")

    trainer = Trainer(tiny_run(accumulate=2), tmp_path / "run", device="cpu")
    trainer.engine.copies = Copies()
    trainer.model.backbone.z_proj.weight.register_hook(lambda gradient: events.append("backward"))
    update = trainer.optimizer.update
    trainer.optimizer.update = lambda *given, copies, **more: events.append(copies) or update(*given, **more)
    trainer.train_step()
    assert events == ["enter", "backward", "backward", "leave", trainer.engine.copies]


def test_no_graph_in_eval_mode_or_without_gradients(on_a_cpu) -> None:
    model = small("cpu")
    captured = captured_loss(model, [360])
    images, labels = torch.randn(2, 16, 16, 16), torch.arange(2)
    with torch.no_grad():
        model(images, labels, num_masked=180, score_loss=captured)
    model.eval()(images, labels, num_masked=180, score_loss=captured).backward()
    assert captured.replays == 0


def test_a_copied_or_pickled_model_has_no_engine(on_a_cpu) -> None:
    model = small("cpu")
    before = len(pickle.dumps(model))
    loss_and_gradients(model, 180, loss=captured_loss(model, [360]))
    model.zero_grad(set_to_none=True)
    assert len(pickle.dumps(model)) == before
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not [name for name, part in other.named_modules() if "training" in type(part).__module__]
        assert_alike(loss_and_gradients(other, 180), loss_and_gradients(model, 180))


def test_every_number_of_masked_tokens_is_known() -> None:
    cases = ((256, 0.7, "truncated_normal"), (16, 0.7, "truncated_normal"), (64, 0.0, "cosine"), (7, 1.0, "cosine"))
    for tokens, *rest in cases:
        possible = masking.possible_num_masked(tokens, *rest)
        drawn = {masking.draw_num_masked(tokens, *rest) for _ in range(3000)}
        assert drawn <= set(possible)
        assert max(drawn) == possible[-1] or tokens == 256
