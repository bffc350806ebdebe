"""Weight files and checkpoints: layout, round trip, damage, foreign files."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from ear_model.ear import EAR
from ear_model.model.weights import load_weights, save_weights
from ear_model.presets import RUNS
from ear_model.run_dir import checkpoint_steps, latest_checkpoint, save_config
from ear_model.training import checkpoint
from tests.model.conftest import TINY, randomise, tiny_run


@pytest.fixture
def run_dir(tmp_path, tiny_model):
    save_config(tmp_path, tiny_run())
    averages = {name: parameter.detach() + 1 for name, parameter in tiny_model.named_parameters()}
    checkpoint.save_checkpoint(tmp_path, 2, tiny_model, averages, {"step": 2})
    return tmp_path


def test_weights_come_back(run_dir, tiny_model):
    raw, averaged = EAR.from_pretrained(run_dir, ema=False), EAR.from_pretrained(run_dir)
    assert raw.config == TINY
    assert not averaged.training
    for (name, expected), a, b in zip(
        tiny_model.named_parameters(), raw.parameters(), averaged.parameters(), strict=True
    ):
        assert torch.equal(a, expected), name
        assert torch.equal(b, expected + 1), name


def test_files_are_in_the_public_layout(run_dir):
    path = latest_checkpoint(run_dir) / "model.safetensors"
    keys = safetensors.torch.load_file(path).keys()
    assert "decoder_blocks.0.attn.qkv.weight" in keys
    assert "scoreloss.net.res_blocks.0.adaLN_modulation.1.weight" in keys
    assert not any(key.startswith(("backbone.", "score.")) for key in keys)


def test_the_previous_checkpoint_goes_only_when_the_new_one_is_whole(run_dir, tiny_model, monkeypatch):
    averages = dict(tiny_model.named_parameters())

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save_checkpoint(run_dir, 4, tiny_model, averages, {"step": 4})
    assert checkpoint_steps(run_dir) == [2]
    assert EAR.from_pretrained(run_dir) is not None
    checkpoint.save_checkpoint(run_dir, 4, tiny_model, averages, {"step": 4})
    assert checkpoint_steps(run_dir) == [4]
    assert [entry.name for entry in (run_dir / "checkpoints").iterdir()] == ["step_00000004"]


def test_directories_that_are_no_runs(tmp_path, run_dir):
    with pytest.raises(ValueError, match="not a directory"):
        EAR.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"not a run directory.*config\.json"):
        EAR.from_pretrained(tmp_path / "empty")
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(ValueError, match="no checkpoint yet"):
        EAR.from_pretrained(run_dir)


def test_damaged_configuration(run_dir):
    (run_dir / "config.json").write_text('{"format_version": 1, "da')
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        EAR.from_pretrained(run_dir)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated_weights(run_dir, keep):
    path = latest_checkpoint(run_dir) / "ema.safetensors"
    content = path.read_bytes()
    assert keep < len(content)
    path.write_bytes(content[:keep])
    with pytest.raises(ValueError, match=r"ema\.safetensors is truncated"):
        EAR.from_pretrained(run_dir)


def test_foreign_weights(run_dir):
    path = latest_checkpoint(run_dir) / "ema.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="not a weight file of ear_model"):
        EAR.from_pretrained(run_dir)
    safetensors.torch.save_file({"x": torch.zeros(2)}, path, {"format": "ear_model", "config": "{"})
    with pytest.raises(ValueError, match="metadata is damaged"):
        EAR.from_pretrained(run_dir)
    stored = json.dumps({"format_version": 99})
    safetensors.torch.save_file({"x": torch.zeros(2)}, path, {"format": "ear_model", "config": stored})
    with pytest.raises(ValueError, match="version 99"):
        EAR.from_pretrained(run_dir)
    path.unlink()
    with pytest.raises(ValueError, match="is not there"):
        EAR.from_pretrained(run_dir)


def test_weights_that_do_not_fit(run_dir, tiny_model):
    path = latest_checkpoint(run_dir) / "ema.safetensors"
    tensors = {name: parameter.detach() for name, parameter in tiny_model.named_parameters()}
    del tensors["backbone.z_proj.bias"]
    save_weights(path, tensors, TINY)
    with pytest.raises(ValueError, match=r"1 tensors missing \['backbone.z_proj.bias'\]"):
        EAR.from_pretrained(run_dir)
    tensors["backbone.z_proj.bias"] = torch.zeros(3)
    save_weights(path, tensors, TINY)
    with pytest.raises(ValueError, match=r"z_proj.bias has shape \(3,\)"):
        EAR.from_pretrained(run_dir)


def test_trainer_state_never_runs_code(run_dir):
    path = latest_checkpoint(run_dir)
    marker = run_dir / "ran"

    class Attack:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"optimizer": Attack()}, path / "trainer.pt")
    with pytest.raises(ValueError, match=r"trainer\.pt is damaged or foreign"):
        checkpoint.load_trainer_state(path)
    assert not marker.exists()


def test_digits_model_round_trip(tmp_path):
    model = randomise(EAR(RUNS["digits"].model))
    path = tmp_path / "weights.safetensors"
    save_weights(path, dict(model.named_parameters()), model.config)
    config, tensors = load_weights(path)
    assert config == model.config
    assert all(torch.equal(tensors[name], parameter) for name, parameter in model.named_parameters())
