"""What the fields of a configuration may hold: types by their annotations, and ranges."""

import functools
import math
import types
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ear_model.errors import shown

# Numbers of configurations are multiplied into float32 tensors, where a larger one is infinite.
FLOAT32_MAX = float(2**128 - 2**104)

_RANGES: dict[str, Callable[[Any], bool]] = {
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "at least 2": lambda value: value >= 2,
    "from 0 to 1024": lambda value: 0 <= value <= 1024,
    "from 1 to 1024": lambda value: 1 <= value <= 1024,
    "at most 2^24": lambda value: value <= 2**24,  # indices are exact in float32
    "positive": lambda value: value > 0,
    "positive and finite": lambda value: 0 < value < math.inf,
    "at least 0 and finite": lambda value: 0 <= value < math.inf,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in (0, 2]": lambda value: 0 < value <= 2,
}


def check_range(config: Any, wanted: str, *names: str) -> None:
    """Raise ValueError unless these fields are in a range of ``_RANGES``, such as "at least 1"."""
    for name in names:
        if not _RANGES[wanted](getattr(config, name)):
            raise ValueError(f"{name} is {getattr(config, name)}; it must be {wanted}")


_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


@functools.cache
def type_hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def check_types(config: Any) -> None:
    """Make sure that every field of a dataclass holds what its annotation says.

    Raises:
        TypeError: a value of another type; true and false are no numbers. ValueError: a number that is not finite or
            is an integer of more than 63 bits, one beyond float32 where a number is computed with, or a word that
            is none of a Literal's.
    """
    kinds: dict[str, Any] = type_hints(config.__class__)
    for name, kind in kinds.items():
        value = getattr(config, name)
        if get_origin(kind) is Literal:
            # Not `in`: a list would be compared with the words, True with 1.
            if not any(type(value) is type(word) and value == word for word in get_args(kind)):
                raise ValueError(f"{name} is {shown(value)}; it must be {' or '.join(map(repr, get_args(kind)))}")
        elif not _fits(value, kind):
            raise TypeError(f"{name} is {shown(value)}; it must be {_words(kind)}")
        elif isinstance(value, (int, float)) and not (math.isfinite(value) and (kind is float or abs(value) < 2**63)):
            raise ValueError(f"{name} is {value}; it must be finite and, as an integer, below 2^63")
        elif kind is float and abs(value) > FLOAT32_MAX:
            raise ValueError(f"{name} is {value}; it must be a float32 number, at most {FLOAT32_MAX:.2e}")


def _fits(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        if not isinstance(value, tuple):
            return False
        if inner[-1] is Ellipsis:
            inner = inner[:1] * len(value)
        return len(value) == len(inner) and all(map(_fits, value, inner))
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, each) for each in get_args(kind))
    return isinstance(value, kind)


def _words(kind: Any) -> str:
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        count = "any number of" if inner[-1] is Ellipsis else str(len(inner))
        return f"{count} values, each {_words(inner[0])}"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(_words, get_args(kind)))
    return _WORDS.get(kind) or ("nothing" if kind is type(None) else f"a {kind.__name__}")
