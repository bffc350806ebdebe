"""`ear train-tokenizer`: it learns, goes on where it was interrupted, and its file makes a cache."""

import pytest
import torch

from ear_model import cli
from ear_model.data.cache import LatentCache
from ear_model.data.images import ImageFolderData
from ear_model.tokenizers.config import AutoencoderConfig, TokenizerTraining
from ear_model.tokenizers.latent import load_latent_tokenizer
from ear_model.training import autoencoder as training
from ear_model.training.autoencoder import AutoencoderSteps, train_autoencoder
from tests.model.conftest import write_tree

TINY = AutoencoderConfig(
    channels=32, multipliers=(1, 1), residual_blocks=1, latent_channels=4, attention=False, norm_groups=8
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    write_tree(root, {"a": 60, "b": 60}, size=8)
    return root


def test_learns_to_reconstruct_and_makes_a_cache(tree, tmp_path, capsys):
    weights, cache = tmp_path / "small.safetensors", tmp_path / "cache"
    options = "--image-size 8 --steps 150 --batch-size 8 --lr 0.0005 --device cpu --workers 1 --model.channels 32"
    shape = "--model.multipliers 1 1 --model.residual-blocks 1 --model.latent-channels 4"
    command = ["train-tokenizer", str(tree), "--out", str(weights), *options.split(), *shape.split()]
    assert cli.main(command) == 0
    assert "reconstruction of 12 held-out images" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["small.safetensors"]
    tokenizer = load_latent_tokenizer(weights)
    images = ImageFolderData(tree, 8).read(torch.arange(120))
    decoded = tokenizer.decode(tokenizer.encode(images).chunk(2, dim=1)[0] * tokenizer.latent_scale)
    error, error_of_mean = (decoded - images).square().mean(), (images.mean(0) - images).square().mean()
    assert error < 0.15 * error_of_mean
    options = ["--tokenizer", "autoencoder", "--weights", str(weights), "--image-size", "8", "--workers", "0"]
    assert cli.main(["cache", str(tree), *options, "--out", str(cache)]) == 0
    latents, _ = LatentCache(cache).gather(torch.arange(120), torch.Generator().manual_seed(0))
    assert latents.std().item() == pytest.approx(1, abs=0.1)
    assert cli.main(command) == 1
    assert "exists already" in capsys.readouterr().err


def test_same_seed_same_file_also_after_an_interruption(tree, tmp_path, monkeypatch):
    settings = TokenizerTraining(image_size=8, steps=6, batch_size=4, checkpoint_every=2)
    straight, resumed = tmp_path / "straight.safetensors", tmp_path / "resumed.safetensors"
    report = train_autoencoder(tree, straight, TINY, settings, quiet=True)
    assert report.held_out == 12
    step = training.AutoencoderSteps.step

    done = iter(range(6))

    def interrupted(*arguments):
        if next(done) == 5:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(training.AutoencoderSteps, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(tree, resumed, TINY, settings, quiet=True)
    partial = tmp_path / "resumed.safetensors.partial"
    assert partial.is_file()
    assert not resumed.exists()
    monkeypatch.setattr(training.AutoencoderSteps, "step", step)
    other = TokenizerTraining(image_size=8, steps=7, batch_size=4)
    with pytest.raises(ValueError, match="begun with another training; remove it"):
        train_autoencoder(tree, resumed, TINY, other, quiet=True)
    assert train_autoencoder(tree, resumed, TINY, settings, threads=2, quiet=True) == report
    assert resumed.read_bytes() == straight.read_bytes()
    assert not partial.exists()
    seeded = tmp_path / "seeded.safetensors"
    train_autoencoder(tree, seeded, TINY, TokenizerTraining(8, 6, 4, seed=1), quiet=True)
    assert seeded.read_bytes() != straight.read_bytes()


def test_whole_batches_are_replayed_and_others_are_not(monkeypatch):
    """Capturing itself needs a GPU; what is captured, when it is used, and that both ways train alike do not."""
    settings = TokenizerTraining(image_size=8, steps=4, batch_size=4)
    cpu = torch.device("cpu")
    plain, replaying = AutoencoderSteps(TINY, settings, cpu), AutoencoderSteps(TINY, settings, cpu)
    replays = []

    def graphed(callable_, samples):
        assert isinstance(callable_, torch.nn.Module)
        assert [tuple(sample.shape) for sample in samples] == [(4, 3, 8, 8), (4, 4, 4, 4)]

        def replay(images, noise):
            assert (images.shape, noise.shape) == tuple(sample.shape for sample in samples)
            replays.append(len(images))
            return callable_(images, noise)

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    replaying.capture()
    assert replaying._captured is None  # nothing to capture on a CPU
    replaying._capture()
    for step, batch in enumerate((4, 4, 3, 1, 4)):
        images = torch.rand(batch, 3, 8, 8) * 2 - 1
        losses = [steps.step(images, step, 1e-3) for steps in (plain, replaying)]
        assert losses[0].equal(losses[1])
        assert not losses[0].requires_grad
    assert replays == [4, 4, 4]
    for one, other in zip(plain.model.parameters(), replaying.model.parameters(), strict=True):
        assert one.equal(other)


@pytest.mark.gpu
def test_the_graph_trains_as_without():
    cuda = torch.device("cuda")
    settings = TokenizerTraining(image_size=8, steps=20, batch_size=4)
    plain, replaying = (AutoencoderSteps(TINY, settings, cuda) for _ in range(2))
    replaying.capture()
    batches = torch.rand(20, 4, 3, 8, 8, device="cuda") * 2 - 1
    for step, batch in enumerate(batches):
        images = batch if step % 5 else batch[:3]  # a smaller one goes without the graph
        losses = [steps.step(images, step, 1e-3).item() for steps in (plain, replaying)]
        assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--steps", "0"], "steps is 0"),
        (["--lr", "-1"], "lr is -1.0"),
        (["--image-size", "30"], "image size is 30; it must be a multiple of 8"),
        (["--model.channels", "44"], "channels is 44"),
        (["--model.image-channels", "1"], "image_channels is 1"),
        (["--out", "weights.ckpt"], "must end in .safetensors"),
        (["--workers", "0"], "workers is 0"),
        (["--workers", "99999999999999999999"], "it must be from 1 to 1024"),
    ],
)
def test_bad_options_are_one_line(tree, tmp_path, monkeypatch, capsys, options, named):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train-tokenizer", str(tree), "--out", "w.safetensors", *options]) == 1
    captured = capsys.readouterr()
    assert named in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
