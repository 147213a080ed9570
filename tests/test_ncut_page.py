"""The page of ncut and its example: what they show runs, what they link to is there."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.methods import maskcut_command

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "ncut.md").read_text()


@pytest.fixture(scope="module")
def example():
    path = ROOT / "examples" / "maskcut_photographs.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_python_of_the_page_runs_and_the_first_has_six_lines():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in blocks[0].splitlines() if line.strip()]) == 6
    names: dict = {}
    for block in blocks:
        exec(compile(block, "ncut.md", "exec"), names)
    assert names["cut"].masks.shape == (2, 512, 512)
    assert bool(names["cut"].masks.flatten(1).any(1).all())
    assert (names["tinted"] != names["image"]).any()


def test_the_commands_of_the_page_are_commands():
    parser = argparse.ArgumentParser()
    maskcut_command.configure(parser)
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
        for line in block.splitlines()
    ]
    seen = 0
    for line in lines:
        words = shlex.split(line)
        if "maskcut" in words:
            assert parser.parse_args(words[words.index("maskcut") + 1 :]).out
            seen += 1
        else:
            assert words[:2] == ["python", "examples/maskcut_photographs.py"]
    assert seen == 4


def test_the_pictures_of_the_page_are_there_and_small():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE)
    assert len(pictures) == 5
    sizes = [(ROOT / "docs" / picture).stat().st_size for picture in pictures]
    assert max(sizes) < 60_000
    assert sum(sizes) < 300_000


def test_the_example_annotates_photographs(example, tmp_path):
    out = tmp_path / "out"
    flags = ["--out", str(out), "--size", "160", "--thumbnails", "64"]
    assert example.main(["horse", "camera", *flags]) == 0
    data = json.loads((out / "annotations.json").read_text())
    assert [image["file_name"] for image in data["images"]] == ["camera.png", "horse.png"]
    assert {a["image_id"] for a in data["annotations"]} == {1, 2}
    # The horse is black: most of the largest mask is, and it holds most of what is black.
    from pycocotools import mask as rle

    horse = np.asarray(Image.open(out / "pictures" / "horse.png"))[..., 0] == 0
    masks = [rle.decode(a["segmentation"]) > 0 for a in data["annotations"] if a["image_id"] == 2]
    best = max(masks, key=lambda mask: mask.sum())
    assert (best & horse).sum() > 0.9 * horse.sum()
    assert (best & horse).sum() > 0.7 * best.sum()
    for name in ("horse", "camera"):
        assert max(Image.open(out / "thumbnails" / f"{name}.jpg").size) == 64
        assert (out / "overlays" / f"{name}.png.png").exists()
