"""The score's two ways to sample agree: all at once, and with what is known of the noise computed before."""

from dataclasses import replace

import pytest
import torch

from ear_model.scores import EnergyScore


def make(config, seed: int = 0) -> EnergyScore:
    torch.manual_seed(seed)
    score = EnergyScore(config).eval()
    for parameter in score.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return score


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("rows", [1, 7, 67])
@pytest.mark.parametrize("guidance", [None, 1.0, 0.0, 3.3, torch.tensor(2.5), torch.tensor([0.4])], ids=str)
def test_prepared_samples_are_samples(tiny_config, monkeypatch, backend, rows, guidance) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("EAR_KERNELS_BACKEND", backend)
    score = make(replace(tiny_config, generator_depth=2))
    hidden, null = torch.randn(2, rows, tiny_config.width)
    noise = torch.rand(rows, tiny_config.noise_dim) - 0.5
    other = None if guidance is None else null
    prepared = score.prepare(noise, 0.7)
    assert len(prepared) == rows
    assert prepared.nbytes == score.prepared_bytes(rows)
    ours = score.sample_prepared(hidden, other, 1.0 if guidance is None else guidance, prepared)
    monkeypatch.setenv("EAR_KERNELS_BACKEND", "eager")
    with torch.no_grad():
        wanted = score.sample(hidden, other, float(guidance or 0), 0.7, noise)
    assert ours.dtype == torch.float32
    assert ours.shape == (rows, tiny_config.token_dim)
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)


def test_rows_are_rows_of_what_was_prepared(tiny_config) -> None:
    """In any order that they are gathered in, from memory of the caller's too."""
    score = make(tiny_config)
    noise = torch.rand(9, tiny_config.noise_dim)
    memory = torch.empty_like(score.prepare(noise, 1.0))
    prepared = score.prepare(noise, 1.0, memory)
    assert prepared.data_ptr() == memory.data_ptr()
    hidden, order = torch.randn(9, tiny_config.width), torch.randperm(9)
    torch.testing.assert_close(
        score.sample_prepared(hidden[order], None, 1.0, prepared[order]),
        score.sample_prepared(hidden, None, 1.0, prepared)[order],
        atol=1e-5,
        rtol=1e-5,
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert score.prepared_bytes(9) == score.prepare(noise, 1.0).nbytes == memory.nbytes // 2
