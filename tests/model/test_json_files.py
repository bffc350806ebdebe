"""JSON that others may have written or damaged."""

import os

import pytest

from ear_model.json_files import parse_json, read_json


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"[" * 100_000, "levels"),
        (b'{"a":' * 100_000, "levels"),
        (b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", "levels"),
        (b'{"steps": 1, "steps": 2}', "'steps' is there twice"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' is there twice"),
        (b'{"a": "\xff\xfe"}', "UTF-8 text at byte 7"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "Infinity is no number"),
        (b'{"a": 1e999}', "1e999 is no number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "has 5000 digits"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
        (b"[1]", "no object"),
        (b"", "Expecting value"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else value,
)
def test_json_is_bounded_and_strict(tmp_path, content, named):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json is damaged.*{named}"):
        read_json(tmp_path / "config.json")


def test_json_that_is_no_regular_file(tmp_path):
    """A FIFO would be waited for."""
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json is no regular file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"x\.json is not there"):
        read_json(tmp_path / "x.json")
    assert parse_json('{"a": [1, 2.5, "b", null, true]}', "text") == {"a": [1, 2.5, "b", None, True]}
