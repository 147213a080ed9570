"""The example of TOAST runs and leaves its figures; the page's lines run."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHODS = ("linear probe", "frozen", "toast-lite", "toast", "end2end")


@pytest.mark.usefixtures("one_thread")
def test_the_quick_example_prints_every_method_and_draws(tmp_path, monkeypatch, capsys):
    for package in ("sklearn", "timm", "matplotlib"):
        pytest.importorskip(package)
    path = ROOT / "examples" / "toast_digits.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--quick", "--out", str(tmp_path)])
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out
    counts = {}
    for method in METHODS:
        (row,) = re.findall(rf"^{method} +(\d+) +(\d\.\d+) +\d+\.\d$", printed, re.MULTILINE)
        counts[method] = int(row[0])
        assert 0.0 <= float(row[1]) <= 1.0
    assert counts["linear probe"] == counts["frozen"] == 5 * 65
    assert counts["frozen"] < counts["toast-lite"] < counts["toast"] < counts["end2end"]
    figures = sorted(found.stem for found in tmp_path.glob("*.png"))
    assert figures == sorted(METHODS[1:])
    assert all(found.stat().st_size > 5000 for found in tmp_path.glob("*.png"))


@pytest.mark.usefixtures("one_thread")
def test_the_lines_of_the_page_run():
    pytest.importorskip("timm")
    page = (ROOT / "docs" / "topdown_attention.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in lines.splitlines() if line.strip()]) == 6
    names = {}
    exec(compile(lines, "topdown_attention.md", "exec"), names)
    assert names["logits"].shape == (1, 5)
    assert names["maps"].selection.shape == (1, 14, 14)
