"""The example of Bit Diffusion runs and leaves its picture."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "bit_diffusion.py"


@pytest.mark.usefixtures("one_thread")
def test_the_quick_example_prints_its_share_and_draws_a_picture(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "digits.png"
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--quick", "--out", str(path)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    (share,) = re.findall(r"(\d\.\d{3}) of 16 samples", capsys.readouterr().out)
    assert 0.0 <= float(share) <= 1.0
    with image.open(path) as picture:
        assert picture.size == (160, 70)  # 16 maps across; data, five states, samples down
    assert len(EXAMPLE.read_text().splitlines()) < 80
