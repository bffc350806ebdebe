"""Progress where the output is a file."""

import pytest

from ear_model import progress
from ear_model.progress import Progress


@pytest.mark.parametrize("quiet", [False, True])
def test_lines_in_a_log(monkeypatch, capsys, quiet):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    with Progress(40, 10, "image", quiet=quiet) as shown:
        for _ in range(5):
            now[0] += 8
            shown.update(4, "error 0.5")
    captured = capsys.readouterr()
    assert captured.err == ""
    # At 24 s (12 images in 24 s, 18 left), and no second time before 44 s have passed.
    assert captured.out == ("" if quiet else "image 22/40  0.5/s  36 s left  error 0.5\n")
