"""``ear evaluate``: scores of a trained model, on digits, by a judge, or by Inception."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import tyro

from ear_model.commands.parsing import parse_command
from ear_model.run_dir import load_config


@dataclass(frozen=True)
class Evaluate:
    """Score a trained model on samples and write RUN/evaluation.json."""

    run: tyro.conf.Positional[Path]
    """Run directory of the trained model."""
    num: int = 1000
    """Samples per setting, the same number of every class."""
    guidance: float | None = None
    """Guidance scale of the setting scored first; 1 if not given (the run's own with --fidelity)."""
    temperature: float | None = None
    """Temperature of the setting scored first; 1 if not given (the run's own with --fidelity)."""
    steps: int | None = None
    """Decoding steps. The run's own default if not given."""
    seed: int = 0
    """The same seed gives the same scores."""
    judge: Path | None = None
    """Judge of `ear train-judge`; needs --real. Digits need none."""
    real: Path | None = None
    """Image tree of held-out real images."""
    train_images: Path | None = None
    """Image tree of the training images, to look for copies; the run's own data if it is pixels."""
    fidelity: Path | None = None
    """Statistics file (.npz with mu, sigma) for FID and Inception Score by torch-fidelity; scores one setting."""
    batch_size: int = 64
    """Images sampled at a time; other sizes give other samples."""
    tokenizer: str = ""
    """Weights that decode latents, in place of the run's own."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda."""


def run(arguments: list[str]) -> int:
    """The command; returns the exit status. Raises ValueError for what can't be scored."""
    command = parse_command(Evaluate, arguments, "ear evaluate")
    from ear_model.devices import resolve_device
    from ear_model.ear import EAR
    from ear_model.evaluation.digits import EVALUATION_FILE
    from ear_model.evaluation.scoring import Scoring
    from ear_model.files import require_writable
    from ear_model.sampling.decoder import Decoder

    device = resolve_device(command.device)
    config = load_config(command.run)
    if command.tokenizer:
        config = dataclasses.replace(config, tokenizer=command.tokenizer)
    decoder = Decoder(config, device)
    scoring = Scoring(
        config,
        decoder=decoder,
        judge=command.judge,
        real=command.real,
        train_images=command.train_images,
        fidelity=command.fidelity,
        num=command.num,
        guidance=command.guidance,
        temperature=command.temperature,
        steps=command.steps,
        batch_size=command.batch_size,
        device=command.device,
    )
    require_writable(command.run / EVALUATION_FILE)
    model = EAR.from_pretrained(command.run, device=device)
    print(scoring.score(model, decoder, command.run, seed=command.seed))
    print(f"scores: {command.run / EVALUATION_FILE}")
    return 0
