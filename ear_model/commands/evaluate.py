"""``ear evaluate``: scores of a trained model, on digits, by a judge, or by Inception."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ear_model.commands.parsing import parse_command
from ear_model.evaluation.config import ScoringConfig
from ear_model.run_dir import load_config


@dataclass(frozen=True)
class Evaluate:
    """Score a trained model on samples and write RUN/evaluation.json, or --out."""

    run: tyro.conf.Positional[Path]
    """Run directory of the trained model."""
    scoring: Annotated[ScoringConfig, tyro.conf.arg(name="")] = field(default_factory=ScoringConfig)
    """What to score with."""
    out: Path | None = None
    """File to write the scores to, in place of RUN/evaluation.json, such as for a run that can't be written in."""
    seed: int = 0
    """The same seed gives the same scores."""
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

    out = command.out or command.run / EVALUATION_FILE
    if command.out is not None and (out.exists() or out.is_symlink()):
        raise ValueError(f"{out} exists already; give a new --out")
    device = resolve_device(command.device)
    config = load_config(command.run)
    if command.tokenizer:
        config = dataclasses.replace(config, tokenizer=command.tokenizer)
    decoder = Decoder(config, device)
    scoring = Scoring(config, command.scoring, decoder, command.device)
    require_writable(out)
    model = EAR.from_pretrained(command.run, device=device)
    print(scoring.score(model, command.run, seed=command.seed, out=out))
    print(f"scores: {out}")
    return 0
