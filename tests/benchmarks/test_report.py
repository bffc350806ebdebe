"""Tables and plots from a result file."""

import json

import pytest
from PIL import Image

from benchmarks import report
from benchmarks.harness import COMPILED, EAGER, OURS, PUBLIC


@pytest.fixture
def saved(tmp_path):
    environment = {"device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-25T10:00:00"}
    environment |= {"commit": "abc", "command": "python -m benchmarks.bench_energy_loss"}

    def row(case, rival, gpu, wall, **more):
        return {"case": case, "rival": rival, "gpu_ms": {"median": gpu}, "wall_ms": {"median": wall}, **more}

    rows = [
        row("energy loss, EAR 32k", EAGER, 0.089, 1.0, peak_bytes=13_000_000),
        row("energy loss, EAR 32k", COMPILED, 0.0106, 0.324, peak_bytes=9_000_000),
        row("energy loss, EAR 32k", OURS, 0.0064, 0.3, peak_bytes=1_300),
        row("energy loss, ensemble", EAGER, 28.12, 28.2, peak_bytes=2_600_000_000),
        {"case": "energy loss, ensemble", "rival": COMPILED, "skipped": "fails to compile: a long story"},
        row("training step, EAR-B", OURS, 79.0, 80.04, groups={"attention": 9.81, "the rest": 123.4}),
    ]
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"environment": environment, "rows": rows}))
    return path


def test_the_table_has_gpu_and_wall_time_side_by_side(saved, capsys):
    report.main([str(saved)])
    lines = capsys.readouterr().out.splitlines()
    where = (
        "NVIDIA H200, torch 2.11.0, triton 3.6.0, 2026-11-25, commit abc: `python -m benchmarks.bench_energy_loss`."
    )
    assert lines[0] == where
    assert lines[2] == f"| | {EAGER} | {COMPILED} | {OURS} |"
    assert (
        lines[4] == "| energy loss, EAR 32k | 0.089 / 1 (13 MB) | 0.0106 / 0.324 (9 MB) | 0.0064 / 0.3 (0.0013 MB) |"
    )
    assert lines[5] == "| energy loss, ensemble | 28.1 / 28.2 (2.6 GB) | fails to compile |  |"
    assert lines[-2:] == ["| attention | 9.81 |", "| the rest | 123 |"]


def test_rows_are_chosen_and_plotted(saved, tmp_path, capsys):
    report.main([str(saved), "--only", "energy.*ours", "--plot", str(tmp_path / "new" / "plot.png")])
    assert "eager" not in capsys.readouterr().out
    width, height = Image.open(tmp_path / "new" / "plot.png").size
    report.main([str(saved), "--plot", str(tmp_path / "plot.png"), "--title", "All of it"])
    wider, same = Image.open(tmp_path / "plot.png").size
    assert wider > width > 200
    assert same == height


def test_of_sampling_the_time_of_an_image_is_shown(saved, tmp_path, capsys):
    result = json.loads(saved.read_text())
    result["rows"] = [
        {
            "case": "sampling, EAR-B, 8 images",
            "rival": rival,
            "wall_ms": {"median": 8 * ms},
            "image_ms": {"median": ms},
        }
        for rival, ms in ((PUBLIC, 162.0), (OURS, 20.5))
    ]
    saved.write_text(json.dumps(result))
    report.main([str(saved), "--plot", str(tmp_path / "plot.png")])
    assert "| sampling, EAR-B, 8 images | 1296 / 162 | 164 / 20.5 |" in capsys.readouterr().out
    assert Image.open(tmp_path / "plot.png").size[0] > 200
