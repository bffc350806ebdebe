"""How tokens are sampled from hidden states within a decoding step that CUDA graphs hold, by kind of score.

A step is cut into pieces, each a name and work: a graph of that name, or, with the name None, plain calls.

Legend: B images, k tokens predicted of each, R = B k rows, C width, L tokens, D token size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ear_kernels.head import linear_parameters
from ear_model.config import SamplingConfig
from ear_model.scores.denoising import Denoising, plain_parameters
from ear_model.scores.diffusion import DenoisingMLP, DiffusionScore, TimeEmbedding
from ear_model.scores.generator import GeneratorScore

Piece = tuple[Any, Callable[[], Any]]
Predict = Callable[[], tuple[Tensor, Tensor]]
"""Gives the rows that are predicted, and their hidden states: see ``hidden`` of a decoding."""

MOST_PREPARED = 2**27
"""Bytes that are kept of what can be computed of all noise before the first step: 12 images of EAR-B."""


def make_head(decoding: Any) -> "Head":
    """The head of a decoding's score."""
    score = decoding.model.score
    if isinstance(score, GeneratorScore) and type(score).sample is GeneratorScore.sample:
        return GeneratorHead(decoding)
    if isinstance(score, DiffusionScore) and type(score).sample is DiffusionScore.sample:
        return DiffusionHead(decoding)
    return Head(decoding)


def is_read(score: Any) -> bool:
    """Whether what the head reads and bypasses of a score is what calling its modules does."""
    if isinstance(score, GeneratorScore):
        return score.generator.plain_parameters() is not None
    if isinstance(score, DiffusionScore):
        net = score.net
        embedding = [linear_parameters(each) for each in (net.cond_embed, *net.time_embed.mlp[::2])]
        own = type(net) is DenoisingMLP and type(net.time_embed) is TimeEmbedding
        return own and plain_parameters(net) is not None and None not in embedding
    return True


class Head:
    """Of any score: its ``sample`` is called between two graphs.

    Args:
        decoding: whose step it is part of (:class:`ear_model.sampling.state.Decoding`).
    """

    mixes_hidden = False
    """Whether guidance mixes hidden states, so that the score gets one for each token."""
    draws_once = False
    """Whether the score draws all its noise by one call, so that all steps' can be drawn at once."""

    def __init__(self, decoding: Any) -> None:
        self.decoding, self.score = decoding, decoding.model.score
        self._kept: dict[Any, Any] = {}

    def prepare(self, sampling: SamplingConfig) -> None:
        """What is known before the first step; the decoding has its noise."""
        self.sampling = sampling

    def pieces(self, name: tuple[Any, ...], known: int, count: int, guided: bool, predict: Predict) -> list[Piece]:
        """Of a step that predicts ``count`` tokens of every image.

        Args:
            name: of what ``predict`` does, unique with ``count`` and ``guided``.
            known: tokens predicted before.
        """
        decoding, sampling, rows = self.decoding, self.sampling, self.decoding.batch * count
        hidden, sampled = self._memory()
        options = {entry: getattr(sampling, entry) for entry in decoding.score_options}
        guidance = decoding.guidance[decoding.config.num_tokens - known - count]

        def predicted() -> None:
            rows_GK, hidden_RC = predict()
            decoding.rows[: len(rows_GK)].copy_(rows_GK)
            hidden[: len(hidden_RC)].copy_(hidden_RC)

        def sample() -> None:
            noise_RE = decoding.noise_BLE[:, known : known + count].flatten(0, 1)
            null = hidden[rows : 2 * rows] if guided else None
            found = self.score.sample(hidden[:rows], null, guidance, sampling.temperature, noise_RE, **options)
            sampled[:rows].copy_(found)

        def written() -> None:
            decoding.write(decoding.rows[: decoding.sequences * count], sampled[:rows], count)

        return [((*name, count, guided), predicted), (None, sample), (("write", count), written)]

    def _memory(self) -> tuple[Tensor, Tensor]:
        if not self._kept:
            decoding = self.decoding
            tokens, like = decoding.config.num_tokens, decoding.position_SC
            self._kept["hidden"] = like.new_zeros(decoding.sequences * tokens, like.shape[1])
            self._kept["sampled"] = torch.zeros_like(decoding.tokens_BLD.flatten(0, 1))
        return self._kept["hidden"], self._kept["sampled"]


class GeneratorHead(Head):
    """Of an MLP generator: in the step's own graph, its modulations before the first step if there is room."""

    mixes_hidden = True
    draws_once = True

    def __init__(self, decoding: Any) -> None:
        super().__init__(decoding)
        self.prepared_RM: Tensor | None = None

    def prepare(self, sampling: SamplingConfig) -> None:
        super().prepare(sampling)
        decoding, score = self.decoding, self.score
        self.temperature: float | None = sampling.temperature
        if score.prepared_bytes(decoding.batch * decoding.config.num_tokens) <= MOST_PREPARED:
            self.temperature = None
            noise_RE = decoding.noise_BLE.flatten(0, 1)
            self.prepared_RM = score.prepare(noise_RE, sampling.temperature, self.prepared_RM)

    def pieces(self, name: tuple[Any, ...], known: int, count: int, guided: bool, predict: Predict) -> list[Piece]:
        decoding = self.decoding

        def step() -> None:
            rows_GK, hidden_RC = predict()
            drawn_k = decoding.drawn(count)
            if self.temperature is None:
                assert self.prepared_RM is not None
                drawn_RM = self.prepared_RM.view(decoding.batch, decoding.config.num_tokens, -1)[:, drawn_k]
                sampled_RD = self.score.sample_prepared(hidden_RC, None, 1.0, drawn_RM.flatten(0, 1))
            else:
                noise_RE = decoding.noise_BLE[:, drawn_k].flatten(0, 1)
                sampled_RD = self.score.sample(hidden_RC, None, 1.0, self.temperature, noise_RE)
            decoding.write(rows_GK, sampled_RD, count)

        return [((*name, count, guided, self.temperature), step)]


class DiffusionHead(Head):
    """Of the diffusion score: a graph of some of its steps, replayed until all are done."""

    draws_once = True

    def prepare(self, sampling: SamplingConfig) -> None:
        super().prepare(sampling)
        self._are_ready: set[Any] = set()

    def pieces(self, name: tuple[Any, ...], known: int, count: int, guided: bool, predict: Predict) -> list[Piece]:
        decoding, steps = self.decoding, self.sampling.diffusion_steps
        rows, key = decoding.batch * count, (count, guided, steps)
        denoising = self._denoising(key)

        def start() -> None:
            rows_GK, hidden_RC = predict()
            decoding.rows[: len(rows_GK)].copy_(rows_GK)
            null = hidden_RC[rows:] if guided else None
            noise_RE = decoding.noise_BLE[:, decoding.drawn(count)].flatten(0, 1)
            scale = decoding.scales[decoding.left - count] if guided else 1.0
            denoising.start(hidden_RC[:rows], null, scale, noise_RE)

        def written() -> None:
            sampled_RD = denoising.state_RD.float()
            decoding.write(decoding.rows[: decoding.sequences * count], sampled_RD, count)

        advances = [(("advance", *key), denoising.advance)] * denoising.calls
        return [((*name, *key), start), *advances, (("write", *key), written)]

    def _denoising(self, key: tuple[int, bool, int]) -> Denoising:
        """That of so many tokens an image, ready for this call."""
        count, guided, steps = key
        if key not in self._kept:
            self._kept[key] = self.score.denoising(self.decoding.batch * count, steps, guided=guided)
        if key not in self._are_ready:
            self._are_ready.add(key)
            self._kept[key].prepare(self.sampling.temperature)
        return self._kept[key]
