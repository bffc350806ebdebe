"""Codebooks by k-means with exponential moving averages, and a run's start with one.

The steps are written out here, the first codes are scikit-learn's k-means++. Its MiniBatchKMeans moves a code by 1 /
(tokens that it has had): codes stop moving before those that died and came back elsewhere have pulled the others
along. It also runs on a CPU alone, and its distances, in float32, have no rule for ties.
"""

import glob
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ear_model import signals
from ear_model.config import RunConfig
from ear_model.data.batches import Batches, TrainingData
from ear_model.draws import mixed_seed, seeded_generator
from ear_model.ear import EAR
from ear_model.files import remove_temporaries, require_writable
from ear_model.progress import Progress
from ear_model.score_names import score_entry
from ear_model.tokenizers.codebook import Codebook, CodebookInfo, load_codebook, nearest_codes, squared_distances
from ear_model.tokenizers.config import CodebookTraining
from ear_model.tokenizers.latent import load_latent_tokenizer
from ear_model.tokenizers.patches import PixelPatches
from ear_model.tokenizers.vq16 import VqAutoencoder

WINDOW = 50
"""Steps between tests; a code that no token used since the last one is dead."""
STALLED = 1e-3
"""Training ends when the distortion of the test tokens fell by less than this share since the last test."""
MIN_TEST_TOKENS, TEST_TOKENS_A_CODE, FIRST_TOKENS_A_CODE = 65_536, 16, 4


@dataclass(frozen=True)
class CodebookReport:
    """How good a codebook is, on tokens of images drawn at random."""

    steps: int
    """Steps that it took."""
    tested: int
    """Tokens that the rest is of."""
    distortion: float
    """Mean squared error per number."""
    distortion_of_mean: float
    """That of the mean token for all."""
    perplexity: float
    """exp of the entropy of the codes' use: about how many are used."""
    dead: int
    """Codes that no token uses."""


class MovingKMeans:
    """K codes as quotients of moving averages: of the sum of a code's tokens, and of their number.

    Args:
        codes_KD: the first codes.
        decay: of the averages, a step.
    """

    def __init__(self, codes_KD: Tensor, decay: float) -> None:
        self.codes_KD, self.decay = codes_KD.float(), decay
        # Both begin at 0, so that what is missing of either cancels.
        self._sums_KD = torch.zeros_like(codes_KD, dtype=torch.float64)
        self._counts_K = self._sums_KD.new_zeros(len(codes_KD))
        self._used_K = torch.zeros_like(self._counts_K, dtype=torch.bool)

    def step(self, tokens_ND: Tensor) -> None:
        """Move the codes by a batch of tokens; nothing waits for the device."""
        indices_N = nearest_codes(tokens_ND, self.codes_KD)
        counts_K = torch.zeros_like(self._counts_K).index_add_(0, indices_N, self._counts_K.new_ones(len(tokens_ND)))
        sums_KD = torch.zeros_like(self._sums_KD).index_add_(0, indices_N, tokens_ND.double())
        self._counts_K.lerp_(counts_K, 1 - self.decay)
        self._sums_KD.lerp_(sums_KD, 1 - self.decay)
        self._used_K |= counts_K > 0
        means_KD = (self._sums_KD / self._counts_K.unsqueeze(1)).float()
        self.codes_KD = torch.where(self._used_K.unsqueeze(1), means_KD, self.codes_KD)

    def revive(self, tokens_ND: Tensor, generator: torch.Generator) -> int:
        """Put codes that no token used since the last call where tokens are far from all codes; how many there were.

        They begin without a past. Where fewer tokens than dead codes are away from all codes, the rest stay dead.
        """
        dead = (~self._used_K).nonzero().squeeze(1)
        self._used_K.zero_()
        if len(dead):
            far_nD = far_tokens(tokens_ND, self.codes_KD, len(dead), generator)
            dead = dead[: len(far_nD)]
            self.codes_KD = self.codes_KD.index_copy(0, dead, far_nD)
            self._sums_KD[dead], self._counts_K[dead] = 0, 0
        return len(dead)


def far_tokens(tokens_ND: Tensor, codes_KD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Different ones of the tokens, drawn in proportion to their squared distance to the nearest code, as k-means++
    does; at most ``count`` of them, and none that is a code."""
    distances_N = squared_distances(tokens_ND, codes_KD, nearest_codes(tokens_ND, codes_KD))
    # multinomial wants sums below float's largest, and no more than 2^24 entries.
    weights_N = distances_N / distances_N.max().clamp(min=torch.finfo(torch.float64).tiny)
    count = min(count, int(weights_N.count_nonzero()))
    if not count:
        return tokens_ND[:0]
    return tokens_ND[torch.multinomial(weights_N, count, generator=generator)]


def first_codes(tokens_ND: Tensor, count: int, seed: int) -> Tensor:
    """``count`` of the tokens by scikit-learn's k-means++, on the CPU; some twice if too few are different."""
    from sklearn.cluster import kmeans_plusplus

    codes_KD, _ = kmeans_plusplus(tokens_ND.cpu().numpy(), count, random_state=mixed_seed(seed, 3))
    return torch.from_numpy(codes_KD).to(tokens_ND.device)


def check_out(out: Path) -> None:
    """Raise ValueError unless a codebook can be written to ``out``; what killed processes left of it is removed."""
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} must end in .safetensors")
    if out.exists():
        raise ValueError(f"{out} exists already; give a new --out, or remove it")
    require_writable(out)
    remove_temporaries(out.parent, glob.escape(out.name))


def train_codebook(
    data: TrainingData,
    patch_size: int,
    training: CodebookTraining,
    *,
    source: str = "",
    device: torch.device | str = "cpu",
    quiet: bool = False,
) -> tuple[Codebook, CodebookReport]:
    """A codebook of a data set's tokens; on a CPU the same seed gives the same one.

    Args:
        data: images or latents.
        patch_size: side of the patch that makes one token.
        training: how.
        source: what the data are, for the file.
        device: where.
        quiet: no progress bar.

    Raises:
        ValueError: a patch size that does not fit; fewer tokens than codes; data that are not finite.
    """
    channels, size, width = data.image_shape
    if patch_size < 1 or size != width or size % patch_size:
        raise ValueError(f"patch_size is {patch_size}; the data are {size} x {width}, which it must divide")
    patches = PixelPatches(size, channels, patch_size)
    codes, length = training.size, patches.num_tokens
    if len(data) * length < codes:
        raise ValueError(f"size is {codes}; the data have {len(data) * length} tokens, and need one a code")
    images = min(len(data), -(-max(MIN_TEST_TOKENS, TEST_TOKENS_A_CODE * codes) // length))

    def tokens(batch: Tensor) -> Tensor:
        return patches.encode(batch.to(device)).flatten(0, 1).float()

    order = torch.randperm(len(data), generator=seeded_generator(training.seed, 0))
    test_ND = tokens(data.gather(order[:images].sort().values, seeded_generator(training.seed, 1))[0])
    if not test_ND.isfinite().all():
        raise ValueError(f"{source or 'the data'} hold values that are not finite; no codebook can be made of them")
    generator = seeded_generator(training.seed, 2, device=device)
    first_ND = test_ND[: max(MIN_TEST_TOKENS, FIRST_TOKENS_A_CODE * codes)]
    means = MovingKMeans(first_codes(first_ND, codes, training.seed), training.decay)
    batches = Batches(data, training.batch_size, training.seed)
    step, best = 0, report_on(means.codes_KD, test_ND, 0)
    kept_KD = means.codes_KD
    with Progress(training.steps, 0, "step", quiet=quiet) as progress:
        while step < training.steps:
            batch_ND = tokens(batches[step][0])
            means.step(batch_ND)
            step += 1
            if number := signals.received():
                raise signals.Interrupted(number)
            if step % WINDOW and step < training.steps:
                progress.update()
                continue
            found = report_on(means.codes_KD, test_ND, step)
            stalls = found.distortion > (1 - STALLED) * best.distortion
            if found.distortion <= best.distortion:
                best, kept_KD = found, means.codes_KD
            progress.update(1, f"distortion {found.distortion:.6f}")
            if stalls:
                break
            means.revive(batch_ND, generator)
    info = CodebookInfo(channels, patch_size, size, source, training.seed, best.distortion)
    return Codebook(kept_KD.cpu(), info), best


def report_on(codes_KD: Tensor, tokens_ND: Tensor, steps: int) -> CodebookReport:
    """Distortion and use of codes over these tokens, after so many steps. Raises ValueError if it is not finite."""
    indices_N = nearest_codes(tokens_ND, codes_KD)
    distortion = float(squared_distances(tokens_ND, codes_KD, indices_N).mean()) / codes_KD.shape[1]
    if not torch.tensor(distortion).isfinite():
        raise ValueError(f"step {steps}: the distortion is {distortion}; the data hold values that are not finite")
    shares_K = indices_N.bincount(minlength=len(codes_KD)).double() / len(tokens_ND)
    return CodebookReport(
        steps=steps,
        tested=len(tokens_ND),
        distortion=distortion,
        distortion_of_mean=float((tokens_ND.double() - tokens_ND.double().mean(dim=0)).square().mean()),
        perplexity=float(torch.special.entr(shares_K).sum().exp()),
        dead=int((shares_K == 0).sum()),
    )


def give_codebook(model: EAR, config: RunConfig) -> None:
    """Begin a run with the codebook that its configuration names; nothing for scores that have none.

    Raises:
        ValueError: none is named or one too many; a file that is not there, damaged or does not fit.
    """
    if not score_entry(config.model.score).vocabulary:
        if config.codebook:
            raise ValueError(f"codebook is {config.codebook}; the {config.model.score} score has no codebook")
        return
    if not config.codebook:
        raise ValueError(
            "the categorical score needs a codebook; make one with `ear train-codebook` and give it with --codebook"
        )
    path, shape = Path(config.codebook), config.model
    if path.suffix == ".safetensors" or not path.is_file():
        codebook = load_codebook(path)
    else:
        autoencoder = load_latent_tokenizer(path).autoencoder
        if not isinstance(autoencoder, VqAutoencoder):
            raise ValueError(f"{path} is an autoencoder without a codebook; give one of `ear train-codebook`")
        codes = autoencoder.codes
        codebook = Codebook(codes, CodebookInfo(codes.shape[1], 1, shape.image_size, path.name))
    model.score.load_codebook(codebook, config.codebook)
