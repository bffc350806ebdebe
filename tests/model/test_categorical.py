"""The categorical score: loss, sampling, and a run from a codebook to images."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2

from ear_model import cli
from ear_model.config import ModelConfig, RunConfig, from_dict, to_dict, with_score
from ear_model.draws import ImageDraws
from ear_model.ear import EAR
from ear_model.errors import RunError
from ear_model.model.backbone import TokenEmbedding
from ear_model.model.weights import load_weights, save_weights
from ear_model.run_dir import latest_checkpoint
from ear_model.scores import categorical as module
from ear_model.scores.categorical import CategoricalScore, draw_indices
from ear_model.tensor_files import read_tensors
from ear_model.tokenizers.codebook import Codebook, CodebookInfo
from ear_model.training import optim
from ear_model.training.trainer import NonFiniteLossError, Trainer
from tests.model.conftest import TINY, randomise, tiny_run

CODES = 11
CATEGORICAL = replace(with_score(TINY, "categorical"), codebook_size=CODES)


def codebook(codes=CODES, channels=1, patch_size=2):
    return Codebook(torch.randn(codes, channels * patch_size**2), CodebookInfo(channels, patch_size, 8))


def score(**changes) -> CategoricalScore:
    return randomise(CategoricalScore(replace(CATEGORICAL, **changes)))


def test_tokens_become_their_nearest_codes_and_these_are_kept():
    own = score()
    tokens = torch.randn(3, 16, 4)
    indices = own.encode(tokens)
    assert indices.shape == (3, 16, 1)
    assert indices.dtype == torch.float32
    nearest = (tokens.double().unsqueeze(2) - own.codebook.double()).square().sum(-1).argmin(-1)
    assert torch.equal(indices.squeeze(-1).long(), nearest)
    decoded = own.decode(indices)
    assert torch.equal(decoded, own.codebook[nearest])
    assert torch.equal(own.encode(decoded), indices)
    tokens[1, 2, 3] = math.nan
    again = own.encode(tokens)
    assert again.isnan().nonzero().tolist() == [[1, 2, 0]]
    assert own.decode(again).isnan().any(-1).nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("rows", [1, 7, 200])
def test_loss_is_the_cross_entropy_and_so_are_its_gradients(rows):
    own = score()
    hidden, targets = torch.randn(rows, 16) * 3, torch.randint(CODES, (rows,))
    given = hidden.clone().requires_grad_()
    loss = own.loss(given, targets.float().unsqueeze(1))
    loss.backward()

    def double(*inputs):
        logits = inputs[0] @ inputs[1].T + inputs[2]
        return -(logits[torch.arange(rows), targets] - logits.logsumexp(1)).mean()

    inputs = [each.detach().double().requires_grad_() for each in (hidden, own.linear.weight, own.linear.bias)]
    expected = double(*inputs)
    expected.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for found, wanted in zip((given.grad, own.linear.weight.grad, own.linear.bias.grad), inputs, strict=True):
        torch.testing.assert_close(found.double(), wanted.grad, rtol=2e-5, atol=1e-6)
    assert own.codebook.grad is None


def test_loss_of_no_rows_and_of_bad_ones():
    own = score()
    loss = own.loss(torch.zeros(0, 16, requires_grad=True), torch.zeros(0, 1))
    loss.backward()
    assert loss.item() == 0
    assert own.loss(torch.randn(2, 16), torch.tensor([[0.0], [math.nan]])).isnan()


def counts_fit(counts, probabilities, error_rate=1e-6):
    """Pearson's chi-square test; refuses a right sampler in one of 10^6 runs."""
    used = probabilities > 0
    assert not counts[~used].any()
    expected = probabilities[used] * counts.sum()
    statistic = ((counts[used] - expected).square() / expected).sum().item()
    freedom = int(used.sum()) - 1  # of a single code all draws are that one
    return freedom == 0 or statistic < chi2.isf(error_rate, freedom)


@pytest.mark.parametrize(("guidance", "temperature"), [(None, 1.0), (2.5, 0.6), (0.3, 1.7)])
def test_frequencies_are_those_of_the_softmax(guidance, temperature, monkeypatch):
    monkeypatch.setattr(module, "PROBABILITIES_AT_A_TIME", 5000 * CODES)
    own, number = score(), 40_000
    hidden, null_hidden = torch.randn(1, 16) * 3, torch.randn(1, 16) * 3
    logits = own.logits(hidden).double()
    if guidance is not None:
        logits = guidance * logits + (1 - guidance) * own.logits(null_hidden).double()
    probabilities = (logits / temperature).softmax(1)[0].detach()
    noise = own.draw_noise(number, 1, like=hidden).flatten(0, 1)
    assert noise.shape == (number, 1)
    null_rows = None if guidance is None else null_hidden.expand(number, -1)
    drawn = own.sample(hidden.expand(number, -1), null_rows, guidance or 1.0, temperature, noise)
    assert drawn.shape == (number, 1)
    counts = drawn.squeeze(1).long().bincount(minlength=CODES).double()
    # Codes that are expected less than five times make the test coarse: they count as one.
    rare = probabilities * number < 5
    counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    merged = torch.cat([probabilities[~rare], probabilities[rare].sum().view(1)])
    if merged[-1] * number < 5:
        assert counts[-1] < 40
        counts, merged = counts[:-1], merged[:-1] / merged[:-1].sum()
    assert counts_fit(counts, merged)
    shifted = merged.roll(1)
    assert len(merged) < 2 or torch.allclose(shifted, merged, atol=0.02) or not counts_fit(counts, shifted)


def test_draws_are_the_inverse_of_the_distribution_function():
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    logits = probabilities.log().nan_to_num(neginf=-1e4)
    steps = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-24]).unsqueeze(1)
    assert draw_indices(logits.expand(6, -1), 1.0, steps).squeeze(1).tolist() == [1, 1, 3, 3, 4, 4]
    assert draw_indices(logits.expand(6, -1), 0.0, steps).unique().tolist() == [3]
    assert draw_indices(logits.expand(6, -1), 1e-30, steps).unique().tolist() == [3]
    assert draw_indices(logits[:0].view(0, 1).expand(0, 6), 1.0, steps[:0]).shape == (0, 1)
    assert draw_indices(torch.tensor([[0.0, math.nan]]), 1.0, steps[:1]).isnan().all()
    many = torch.zeros(1, 16384)
    assert draw_indices(many, 1.0, torch.tensor([[1 - 2.0**-24]])).item() == 16383
    uniform = torch.rand(500, 1)
    assert torch.equal(draw_indices(many.expand(500, -1), 1.0, uniform), (uniform.double() * 16384).floor().float())


def test_the_backbone_embeds_indices_exactly():
    size = 5000  # above what 16 bits hold exactly
    config = replace(CATEGORICAL, codebook_size=size)
    model = randomise(EAR(config)).eval()
    assert isinstance(model.backbone.z_proj, TokenEmbedding)
    assert model.backbone.z_proj.weight.shape == (size, config.width)
    tokens = torch.randint(size, (2, 16, 1))
    expected = model.backbone.z_proj.weight[tokens.squeeze(-1)]
    assert torch.equal(model.backbone.embed_values(tokens.float()), expected)
    assert torch.equal(model.to(torch.bfloat16).backbone.embed_values(tokens.float()), expected.bfloat16())
    assert not isinstance(EAR(TINY).backbone.z_proj, TokenEmbedding)


def test_a_new_backbone_draws_what_it_drew_without_the_score():
    torch.manual_seed(5)
    first = EAR(TINY).backbone.decoder_pos_embed_learned
    torch.manual_seed(5)
    table = torch.nn.init.normal_(EAR(CATEGORICAL).backbone.z_proj.weight.detach().clone(), std=0.02)
    assert table.std().item() == pytest.approx(0.02, rel=0.3)
    assert first.shape == EAR(CATEGORICAL).backbone.decoder_pos_embed_learned.shape


def test_the_optimiser_leaves_the_codebook_and_the_average_keeps_it():
    model = randomise(EAR(CATEGORICAL))
    before = model.score.codebook.detach().clone()
    for grouping in ("paper", "public"):
        train = replace(tiny_run().train, parameter_groups=grouping)
        grouped = {id(each) for group in optim.parameter_groups(model, train) for each in group["params"]}
        left = [name for name, each in model.named_parameters() if id(each) not in grouped]
        assert left == ["score.codebook"]
    optimizer, average = optim.make_optimizer(model, train), optim.ExponentialMovingAverage(model, 0.9)
    for _ in range(3):
        model(torch.randn(4, 1, 8, 8), torch.arange(4)).backward()
        optim.clipped_step(optimizer, 1.0, average)
    assert torch.equal(model.score.codebook, before)
    assert torch.equal(average.averages["score.codebook"], before)


def test_codebooks_that_do_not_fit_are_named():
    own = score()
    for given, named in [
        (codebook(12), r"c.st has 12 codes; the model needs 11 \(or --model.codebook-size 12\)"),
        (codebook(patch_size=3), "c.st has 9 numbers in a code; the model needs 4"),
        (codebook(channels=4, patch_size=1), "c.st is of 4 channels and patches of 1; the model reads 1 channels"),
    ]:
        with pytest.raises(ValueError, match=named):
            own.load_codebook(given, "c.st")
    right = codebook()
    own.load_codebook(right)
    assert torch.equal(own.codebook, right.vectors)


def test_configurations_of_the_score(tmp_path):
    with pytest.raises(ValueError, match="codebook_size is 5; the energy score has no codebook_size"):
        replace(TINY, codebook_size=5)
    for size in (1, 0, 2**24 + 1):
        with pytest.raises(ValueError, match=f"codebook_size is {size}; it must be at"):
            replace(CATEGORICAL, codebook_size=size)
    with pytest.raises(ValueError, match=r"alpha is 1\.5; the categorical score has no alpha"):
        replace(CATEGORICAL, alpha=1.5)
    run = replace(tiny_run(), model=CATEGORICAL, codebook="codes.safetensors")
    assert from_dict(RunConfig, to_dict(run), "here") == run
    stored = to_dict(tiny_run())
    del stored["codebook"], stored["model"]["codebook_size"]
    assert from_dict(RunConfig, stored, "here") == tiny_run()
    path = tmp_path / "weights.safetensors"
    model = randomise(EAR(CATEGORICAL))
    save_weights(path, dict(model.named_parameters()), model.config)
    assert {"z_proj.weight", "score.codebook", "score.linear.weight"} <= set(read_tensors(path)[1])
    config, tensors = load_weights(path)
    assert config == CATEGORICAL
    assert all(torch.equal(tensors[name], each) for name, each in model.named_parameters())
    assert tensors.keys() == dict(model.named_parameters()).keys()


def test_images_have_draws_of_their_own_and_bad_weights_are_an_error():
    model = randomise(EAR(CATEGORICAL)).eval()
    options = {"steps": 5, "guidance": 2.0, "temperature": 0.8}
    labels = torch.randint(10, (6,))
    whole = model.sample(labels, draws=ImageDraws(3, range(6)), **options)
    part = model.sample(labels[2:5], draws=ImageDraws(3, range(2, 5)), **options)
    torch.testing.assert_close(part, whole[2:5])
    tokens = model.tokenizer.encode(whole).flatten(0, 1)
    assert bool((tokens.unsqueeze(1) == model.score.codebook).all(-1).any(-1).all())
    assert len(whole.unique(dim=0)) == 6
    with torch.no_grad():
        model.score.linear.bias[3] = math.nan
    with pytest.raises(RunError, match="not finite"):
        model.sample(labels, **options)


@pytest.fixture
def made(tmp_path):
    path = tmp_path / "codes.safetensors"
    options = f"--size {CODES} --steps 3 --batch-size 64 --device cpu".split()
    assert cli.main(["train-codebook", "digits", "--out", str(path), *options]) == 0
    return path


def categorical_run(path, **train) -> RunConfig:
    return replace(tiny_run(**train), model=CATEGORICAL, codebook=str(path))


def test_a_run_from_codebook_to_images(tmp_path, made):
    straight = Trainer(categorical_run(made, steps=4), tmp_path / "straight", device="cpu")
    straight.run(quiet=True)
    stopped = Trainer(categorical_run(made, steps=2, lr=1e-3), tmp_path / "run", device="cpu")
    stopped.run(quiet=True)
    vectors = stopped.model.score.codebook.detach().clone()
    made.unlink()
    resumed = Trainer(categorical_run(made, steps=4), tmp_path / "run", resume=True, device="cpu")
    resumed.run(quiet=True)
    assert resumed.step == 4
    for own, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(own, other)
    for model in (EAR.from_pretrained(tmp_path / "run"), EAR.from_pretrained(tmp_path / "run", ema=False)):
        assert torch.equal(model.score.codebook, vectors)
        images = model.sample(torch.tensor([3, 7]), steps=4, guidance=2.0)
        tokens = model.tokenizer.encode(images).flatten(0, 1)
        assert bool((tokens.unsqueeze(1) == vectors).all(-1).any(-1).all())
    assert torch.equal(resumed.averaged_model().score.codebook, vectors)
    held = read_tensors(latest_checkpoint(tmp_path / "run") / "ema.safetensors")[1]
    assert torch.equal(held["score.codebook"], vectors)


def test_runs_that_can_not_begin_write_nothing(tmp_path, made):
    out = tmp_path / "run"
    other = tmp_path / "other.safetensors"
    codebook(12).save(other)
    for config, named in [
        (categorical_run(""), "needs a codebook; make one with `ear train-codebook`"),
        (categorical_run(tmp_path / "gone.safetensors"), "gone.safetensors is not there"),
        (categorical_run(other), "other.safetensors has 12 codes; the model needs 11"),
        (replace(tiny_run(), codebook=str(made)), "the energy score has no codebook"),
    ]:
        with pytest.raises(ValueError, match=named):
            Trainer(config, out, device="cpu")
        assert not out.exists()


def test_images_that_are_not_finite_end_the_run(tmp_path, made):
    trainer = Trainer(categorical_run(made), tmp_path / "run", device="cpu")
    trainer.batches.dataset.images[:] = math.nan
    with pytest.raises(NonFiniteLossError, match="step 1: loss nan"):
        trainer.run(quiet=True)


def test_it_learns_a_code_a_class():
    """Two classes of one colour each: sampling gives the colour that was asked for."""
    config = replace(CATEGORICAL, num_classes=2, depth=1, label_dropout=0.0)
    model = EAR(config).train()
    vectors = torch.arange(CODES * 4.0).view(CODES, 4)
    model.score.load_codebook(Codebook(vectors, CodebookInfo(1, 2, 8)))
    images = model.tokenizer.decode(vectors[[2, 9]].unsqueeze(1).expand(-1, 16, -1))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    first = model(images, torch.tensor([0, 1])).item()
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(images, torch.tensor([0, 1]))
        loss.backward()
        optimizer.step()
    assert first == pytest.approx(math.log(CODES), abs=0.5)
    assert loss.item() < 0.2
    sampled = model.eval().sample(torch.tensor([1, 0]), steps=4, temperature=0.0)
    assert torch.equal(sampled, images.flip(0))


def test_default_size_is_of_the_score_alone():
    assert ModelConfig(score="categorical").codebook_size == 1024
    assert with_score(replace(ModelConfig(), noise="gaussian"), "categorical").noise == "uniform"
    assert with_score(CATEGORICAL, "energy").codebook_size == 1024
