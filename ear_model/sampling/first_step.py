"""The hidden states of the first step, in which all tokens are masked: they depend on the class alone.

A table holds them for the classes that were asked for last; the null class is one of them.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ear_model.sampling.state import Decoding
from ear_model.sampling.steps import SamplingModel
from ear_model.sampling.weights import Weights

MOST_BYTES = 2**26
"""Of the table: 85 classes of EAR-B."""

NULL = -1
"""The null class's label."""


class FirstStep:
    """The table of a model's weights.

    Args:
        make: decodes such a model.
        model: in eval mode.
        weights: of the model.
        run: runs a piece of work ``(name, work)``, such as by capturing it once and replaying it.
    """

    def __init__(
        self,
        make: type[Decoding],
        model: SamplingModel,
        weights: Weights,
        run: Callable[[Any, Callable[[], Any]], None],
    ) -> None:
        config, self._make, self._model, self._weights, self._run = model.config, make, model, weights, run
        position = model.backbone.decoder_pos_embed_learned
        self.capacity = max(1, MOST_BYTES // (config.num_tokens * config.width * position.element_size()))
        """Classes that fit."""
        shape = self.capacity, config.num_tokens, config.width
        self.hidden_TLC = torch.zeros(shape, dtype=position.dtype, device=position.device)
        """Hidden states by place in the table."""
        self._places: OrderedDict[int, int] = OrderedDict()
        self._workers: dict[int, tuple[Decoding, Tensor]] = {}

    def clear(self) -> None:
        """Forget all: the weights have changed."""
        self._places.clear()

    def places(self, labels: Sequence[int]) -> list[int] | None:
        """The classes' places in the table, which gets those that are missing; None if they are too many."""
        wanted = dict.fromkeys(labels)
        if len(wanted) > self.capacity:
            return None
        for label in wanted:
            if label in self._places:
                self._places.move_to_end(label)
        missing = [label for label in wanted if label not in self._places]
        size = 2 if len(missing) <= 2 else 8
        for first in range(0, len(missing), size):
            self._add(missing[first : first + size], size)
        return [self._places[label] for label in labels]

    def _add(self, labels: list[int], size: int) -> None:
        """Compute the hidden states of up to ``size`` classes."""
        if size not in self._workers:
            decoding = self._make(self._model, self._weights, size, guided=False)
            decoding.orders_BL.copy_(decoding.places_L.expand(size, -1))
            self._workers[size] = decoding, torch.zeros(size, dtype=torch.int64, device=decoding.left.device)
        decoding, places_B = self._workers[size]
        places = []
        for label in labels:
            oldest = self._places.popitem(last=False)[1] if len(self._places) >= self.capacity else len(self._places)
            self._places[label] = oldest
            places.append(oldest)
        # A batch that is not full computes its last class again.
        rest = size - len(labels)
        device = places_B.device
        places_B.copy_(torch.tensor(places + places[-1:] * rest).to(device))
        known = torch.tensor(labels + labels[-1:] * rest).to(device)
        null = self._model.backbone.null_class(size)
        classes = self._model.backbone.embed_classes(known.clamp(min=0))
        decoding.classes_GC.copy_(torch.where(known.unsqueeze(1) == NULL, null, classes))

        def work() -> None:
            decoding.begin()
            _, hidden_RC = decoding.hidden(0, decoding.config.num_tokens)
            self.hidden_TLC.index_copy_(0, places_B, hidden_RC.view(size, *self.hidden_TLC.shape[1:]))

        self._run(("first", size), work)
