"""Steps as CUDA graphs: the same losses and gradients as without, on a GPU; nothing is captured elsewhere."""

import functools
from dataclasses import replace

import pytest
import torch

from ear_kernels import FusedAdamW
from ear_model.ear import EAR
from ear_model.presets import EAR_BASE, MODELS, RUNS
from ear_model.run_dir import read_metrics
from ear_model.training.engine import Engine
from ear_model.training.graphs import CapturedBlocks, CapturedLoss, can_capture
from ear_model.training.loss import TrainingLoss
from ear_model.training.trainer import Trainer
from tests.model.conftest import randomise, tiny_run

SMALL = replace(EAR_BASE, width=128, depth=3, num_heads=2, generator_width=128, generator_depth=2, num_classes=10)


def make(dropout: float) -> EAR:
    torch.manual_seed(0)
    return randomise(EAR(replace(SMALL, dropout=dropout, attention_dropout=dropout))).cuda().train()


def gradients(model: EAR, seed: int, engine: Engine | None = None, *, add: bool = False) -> list[torch.Tensor]:
    engine = engine or Engine(model)
    torch.manual_seed(3)
    images, labels = torch.randn(4, 16, 16, 16, device="cuda"), torch.arange(4, device="cuda")
    if not add:
        model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    with engine.scope():
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(images, labels, num_masked=200, **engine.options)
        loss.backward()
    return [loss.detach().clone(), *(parameter.grad.clone() for parameter in model.parameters())]


def captured_blocks(model: EAR, images: int, *, parts: int = 1) -> Engine:
    engine = Engine(model)
    engine.blocks = CapturedBlocks(model.backbone, images, use_bf16=True, parts=parts)
    return engine


def assert_alike(ours: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    for one, two in zip(ours, others, strict=True):
        assert (one - two).norm() <= 2e-3 * two.norm() + 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_replayed_gradients_are_those_of_single_launches(parts) -> None:
    model = make(0.0)
    plain = [gradients(model, seed) for seed in (1, 2)]
    engine = captured_blocks(model, 4, parts=parts)
    for seed in (1, 2):
        assert_alike(gradients(model, seed, engine), plain[seed - 1])


@pytest.mark.gpu
def test_parameters_that_an_optimiser_changed_are_read() -> None:
    model = make(0.0)
    engine = captured_blocks(model, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    before = gradients(model, 1, engine)
    optimizer.step()
    after = gradients(model, 1, engine)
    assert (after[0] - before[0]).abs() > 1e-3
    assert_alike(after, gradients(model, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [FusedAdamW, functools.partial(torch.optim.AdamW, fused=True)])
def test_steps_of_a_whole_captured_model(kind) -> None:
    """Graphs read 16-bit copies, which our optimiser writes; after another one's step they are cast anew."""
    losses = []
    for captured in (True, False):
        model = make(0.0)
        engine = Engine(model)
        if captured:
            engine.capture(4, use_bf16=True, num_masked=[200])
            assert engine.copies is not None
        optimizer = kind(model.parameters(), lr=0.02)
        losses.append([])
        for seed in range(4):
            losses[-1].append(gradients(model, seed, engine)[0])
            optimizer.update(copies=engine.copies) if isinstance(optimizer, FusedAdamW) else optimizer.step()
        with torch.no_grad():
            model.backbone.decoder_blocks[0].attn.qkv.weight.zero_()
        losses[-1].append(gradients(model, 9, engine)[0])
    one, other = torch.stack(losses[0]), torch.stack(losses[1])
    torch.testing.assert_close(one, other, rtol=5e-3, atol=0)
    assert one.std() > 1e-2


@pytest.mark.gpu
def test_accumulated_gradients_add_up() -> None:
    model = make(0.0)
    single = [gradients(model, seed) for seed in (1, 2, 3)]
    engine = captured_blocks(model, 4)
    gradients(model, 1, engine)
    gradients(model, 2, engine, add=True)
    total = gradients(model, 3, engine, add=True)
    assert_alike(total[1:], [sum(parts) for parts in zip(*(each[1:] for each in single), strict=True)])


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2])
def test_dropout_draws_anew_and_capturing_draws_nothing(parts) -> None:
    model = make(0.1)
    torch.manual_seed(9)
    expected = torch.rand(3, device="cuda")
    torch.manual_seed(9)
    engine = captured_blocks(model, 4, parts=parts)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
    losses = [gradients(model, seed, engine)[0] for seed in (5, 6, 5)]
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-3, atol=0)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model, 7, engine))


@pytest.mark.gpu
def test_other_batches_and_eval_go_without() -> None:
    model = make(0.0)
    engine = captured_blocks(model, 2)
    assert_alike(gradients(model, 1, engine), gradients(model, 1))
    model.eval()
    images, labels = torch.randn(2, 16, 16, 16, device="cuda"), torch.arange(2, device="cuda")
    losses = []
    for options in (engine.options, {}):
        torch.manual_seed(1)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            losses.append(model(images, labels, num_masked=200, **options))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_with_graphs_has_the_curve_of_one_without(tmp_path, accumulate) -> None:
    losses = []
    for name, graphs in (("with", True), ("without", False)):
        config = tiny_run(steps=12, accumulate=accumulate, cuda_graphs=graphs, checkpoint_every=6)
        trainer = Trainer(config, tmp_path / name, device="cuda")
        assert isinstance(trainer.engine.blocks, CapturedBlocks) == graphs
        assert isinstance(trainer.engine.loss, CapturedLoss) == graphs
        trainer.run(quiet=True)
        losses.append([line["loss"] for line in read_metrics(tmp_path / name)])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=2e-2, atol=0)


def test_parts_of_the_blocks_are_the_blocks() -> None:
    torch.manual_seed(0)
    model = randomise(EAR(replace(SMALL, dropout=0.0, attention_dropout=0.0)))
    hidden = torch.randn(2, 8, SMALL.width)
    backbone = model.backbone
    stream, pending = backbone.run_blocks(hidden, part=slice(0, 1))
    stream, pending = backbone.run_blocks(stream, pending, slice(1, 2))
    torch.testing.assert_close(backbone.run_blocks(stream, pending, slice(2, None)), backbone.run_blocks(hidden))


def test_what_was_never_captured_is_not(monkeypatch) -> None:
    assert can_capture(MODELS["ear_base"], use_bf16=True)
    assert can_capture(MODELS["digits"], use_bf16=True)
    assert not can_capture(MODELS["ear_base"], use_bf16=False)
    assert can_capture(MODELS["ear_huge"], use_bf16=True)
    assert not can_capture(replace(MODELS["ear_huge"], num_heads=8), use_bf16=True)
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "eager")
    assert not can_capture(MODELS["ear_base"], use_bf16=True)


def test_nothing_is_captured_on_a_cpu(tmp_path) -> None:
    assert RUNS["imagenet256"].train.cuda_graphs
    trainer = Trainer(tiny_run(), tmp_path / "run", device="cpu")
    assert trainer.engine.blocks is None
    assert isinstance(trainer.engine.loss, TrainingLoss)
    assert trainer.engine.copies is None
