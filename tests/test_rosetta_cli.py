"""`foveate rosetta` on photographs."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.cli import main
from foveate.methods.rosetta import RosettaResult

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.ReLU())
"""


@pytest.fixture
def folder(tmp_path):
    data = pytest.importorskip("skimage.data")
    (tmp_path / "in").mkdir()
    for name in ("astronaut", "coffee", "chelsea"):
        pixels = np.ascontiguousarray(getattr(data, name)()[::4, ::4])
        Image.fromarray(pixels).save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "nets.py").write_text(NETS)
    return tmp_path


def command(folder, *more):
    net = f"{folder / 'nets.py'}:net"
    given = ["rosetta", str(folder / "in"), "--model", f"p={net}", "--model", f"q={net}"]
    return main([*given, "--image-size", "64", "--out", str(folder / "out"), *more])


def test_equal_networks_match_unit_by_unit(folder, capsys):
    assert command(folder, "--json", "--k", "1,1", "--baseline", "--plot", "2") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["units"]) == (3, {"p": 8, "q": 8})
    assert report["best"][0]["score"] > 1 - 1e-5
    assert all(row["p"] == row["q"] for row in report["best"])
    assert len(RosettaResult.load(folder / "out").sets) == report["sets"]
    assert (folder / "out" / "sets.csv").exists()
    assert np.asarray(Image.open(folder / "out" / "sets.png")).std() > 0


def test_what_cannot_start_exits_with_two(folder, capsys):
    assert command(folder, "--k", "1") == 2
    assert command(folder, "--anchor", "x") == 2
    assert command(folder, "--model", "r=timm:nothing") == 2
    assert command(folder, "--model", f"r={folder / 'nets.py'}:net@{folder / 'no.pth'}") == 2
    assert main(["rosetta", str(folder / "no"), "--model", "a=b:c", "--out", "x"]) == 2
    assert "existing folder" in capsys.readouterr().err


def test_unreadable_images_are_named_or_skipped(folder, capsys):
    (folder / "in" / "broken.png").write_bytes(b"no picture")
    assert command(folder) == 1
    assert "broken.png" in capsys.readouterr().err
    assert command(folder, "--skip-bad") == 0
    assert "3 images" in capsys.readouterr().out


def test_the_example_finds_units_above_chance(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    script = Path(__file__).parents[1] / "examples" / "rosetta_digits.py"
    given = [str(script), "--quick", "--json", str(tmp_path / "found.json")]
    monkeypatch.setattr(sys, "argv", given)
    runpy.run_path(str(script), run_name="__main__")
    found = json.loads((tmp_path / "found.json").read_text())
    assert min(found["accuracy"].values()) >= 0.9
    assert found["sets"] > 5
    assert found["best"] > found["baseline"] + 0.3
