"""Reading JSON that others may have written or damaged: bounded in size and depth, and strict."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

MAX_BYTES = 64 << 20
MAX_DEPTH = 32
MAX_DIGITS = 40  # of a number; converting millions of them takes minutes


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ValueError: not there, no regular file, or damaged; see :func:`parse_json`.
    """
    if not path.is_file():
        raise ValueError(f"{path} is {'no regular file' if path.exists() else 'not there'}")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged (it is no UTF-8 text at byte {error.start})") from error
    values = parse_json(text, str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged (no object)")
    return values


def parse_json(text: str, where: str) -> Any:
    """What a JSON text says.

    Args:
        text: the text.
        where: what it is the content of, for messages.

    Raises:
        ValueError: no JSON, an object with a name twice, a number that is not finite or endless, text that can't be
            written, more than 64 MiB, or more than 32 levels.
    """
    try:
        if len(text) > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
        values = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_number, parse_int=_integer
        )
        _check_depth(values)
    except RecursionError as error:
        raise ValueError(f"{where} is damaged (more than {MAX_DEPTH} levels)") from error
    except ValueError as error:
        raise ValueError(f"{where} is damaged ({error})") from error
    return values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return values


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _number(digits: str) -> float:
    value = float(digits) if len(digits) <= MAX_DIGITS else math.inf
    if not math.isfinite(value):
        raise ValueError(f"{digits[:MAX_DIGITS]} is no number of ours")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"{digits[:MAX_DIGITS]}... has {len(digits)} digits")
    return int(digits)


def _check_depth(values: Any) -> None:
    level = [values]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in _inner(value)]
        if not level:
            return
    raise ValueError(f"more than {MAX_DEPTH} levels")


def _inner(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, list):
        yield from value
    elif isinstance(value, str):
        value.encode("utf-8")  # a lone surrogate has no bytes: no file name, no line of a message
