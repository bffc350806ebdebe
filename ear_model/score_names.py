"""The scores of the framework by name. A line here and a file in ``ear_model/scores`` add one (docs/scores.md)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ScoreEntry:
    """Where a score is and what of a configuration is its own."""

    path: str
    """``module:class``, imported when a model is made."""
    options: tuple[str, ...] = ()
    """Fields of ModelConfig that it reads and not every score does."""
    sampling_options: tuple[str, ...] = ()
    """Fields of SamplingConfig that its ``draw_noise`` and ``sample`` take as keywords."""
    train_options: tuple[str, ...] = ()
    """Fields of TrainConfig that it takes and not every score does."""
    vocabulary: str = ""
    """Field of ModelConfig with the number of different tokens, where tokens are indices ``[B, L, 1]``."""
    public_names: tuple[str, str] | None = None
    """A prefix of its parameters' names, and what stands in its place in public checkpoints."""


_MLP = ("generator_width", "generator_depth")
_GENERATOR = (*_MLP, "noise_dim", "noise", "num_samples")
_PUBLIC_GENERATOR = ("generator.", "scoreloss.net.")

SCORES: dict[str, ScoreEntry] = {
    "energy": ScoreEntry(
        "ear_model.scores.energy:EnergyScore",
        (*_GENERATOR, "alpha"),
        train_options=("tau", "finetune_tau", "loss_chunks", "rows_per_noise"),
        public_names=_PUBLIC_GENERATOR,
    ),
    "kernel": ScoreEntry(
        "ear_model.scores.kernel:KernelScore",
        (*_GENERATOR, "kernel", "bandwidth"),
        public_names=_PUBLIC_GENERATOR,
    ),
    "mixture": ScoreEntry("ear_model.scores.mixture:MixtureScore", ("components",)),
    "gaussian": ScoreEntry("ear_model.scores.gaussian:GaussianScore"),
    "categorical": ScoreEntry(
        "ear_model.scores.categorical:CategoricalScore", ("codebook_size",), vocabulary="codebook_size"
    ),
    "diffusion": ScoreEntry(
        "ear_model.scores.diffusion:DiffusionScore",
        (*_MLP, "num_samples", "diffusion_steps"),
        sampling_options=("diffusion_steps",),
        public_names=("net.", "diffloss.net."),
    ),
}


def score_entry(name: str) -> ScoreEntry:
    """The entry of that name. Raises ValueError for an unknown one."""
    if name not in SCORES:
        raise ValueError(f"score is {name!r}; it must be {' or '.join(map(repr, SCORES))}")
    return SCORES[name]
