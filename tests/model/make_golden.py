"""Write golden_digits_loss.json: `python -m tests.model.make_golden`, when a change means to change training."""

import json
import tempfile
from pathlib import Path

import torch

from ear_model.presets import RUNS
from ear_model.training.trainer import Trainer

if __name__ == "__main__":
    trainer = Trainer(RUNS["digits"], Path(tempfile.mkdtemp()) / "run", device="cpu")
    losses = [trainer.train_step()[0].item() for _ in range(20)]
    content = {"preset": "digits", "torch": torch.__version__, "relative_tolerance": 0.001, "losses": losses}
    path = Path(__file__).with_name("golden_digits_loss.json")
    path.write_text(json.dumps(content, indent=1) + "\n")
