"""What stands in the files of `foveate maskcut`, record by record, and where masks come from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

import foveate
from foveate.cli import main
from foveate.methods.maskcut import annotate, color_features

HEIGHT, WIDTH = 40, 56


def picture(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = np.full((HEIGHT, WIDTH, 3), (30, 60, 120), dtype=np.uint8)
    image[8:28, 10 + 3 * seed : 34 + 3 * seed] = (220, 150, 40)
    return np.clip(image + rng.integers(-8, 9, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    Image.fromarray(picture(0)).save(folder / "b.png")
    Image.fromarray(picture(1)).save(folder / "sub" / "a.png")
    return folder


def by_hand(image: np.ndarray, grid: tuple[int, int], patch: int, n_masks: int) -> list:
    """The non-empty masks at image size: LANCZOS, descriptors, cut, nearest."""
    h, w = grid
    resized = Image.fromarray(image).resize((w * patch, h * patch), Image.Resampling.LANCZOS)
    values = color_features(np.asarray(resized), grid)
    cut = foveate.maskcut(values, grid, n_masks=n_masks, size=image.shape[:2])
    return [mask.numpy() for mask in cut.masks if bool(mask.any())]


@pytest.mark.parametrize(
    ("flags", "grid", "patch"),
    [
        (["--size", "44", "--patch", "8"], (6, 6), 8),  # round(5.5) is even
        (["--size", "48", "--patch", "8", "--keep-aspect"], (4, 6), 8),
        (["--size", "30", "--patch", "4"], (8, 8), 4),
        (["--size", "32", "--patch", "4", "--keep-aspect"], (6, 8), 4),
    ],
)
def test_masks_are_those_of_the_resampled_picture(photos, tmp_path, flags, grid, patch):
    out = tmp_path / "o.json"
    assert main(["maskcut", str(photos / "b.png"), "--out", str(out), "--quiet", *flags]) == 0
    found = [
        rle.decode(record["segmentation"]) > 0
        for record in json.loads(out.read_text())["annotations"]
    ]
    wanted = by_hand(picture(0), grid, patch, 3)
    assert len(found) == len(wanted) > 0
    for mask, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(mask, expected)


def test_records_have_the_fields_of_coco(photos, tmp_path):
    out = tmp_path / "o.json"
    flags = ["--size", "40", "--n-masks", "2", "--quiet"]
    assert main(["maskcut", str(photos), "--out", str(out), *flags]) == 0
    data = json.loads(out.read_text())
    assert set(data) == {"info", "licenses", "images", "annotations", "categories"}
    common = {"date_captured": "", "license": 1, "coco_url": "", "flickr_url": ""}
    sides = {"width": WIDTH, "height": HEIGHT}
    assert data["images"] == [
        {"id": 1, "file_name": "b.png", **sides, **common},
        {"id": 2, "file_name": "sub/a.png", **sides, **common},
    ]
    for number, record in enumerate(data["annotations"], start=1):
        assert set(record) == {
            *("id", "image_id", "category_id", "iscrowd", "area", "bbox"),
            *("segmentation", "width", "height"),
        }
        assert record["id"] == number
        assert (record["category_id"], record["iscrowd"]) == (1, 0)
        assert type(record["area"]) is int
        assert all(type(side) is float for side in record["bbox"])
        assert record["segmentation"]["size"] == [HEIGHT, WIDTH]
        assert record["segmentation"]["counts"].isascii()
        assert (record["width"], record["height"]) == (WIDTH, HEIGHT)
    image_ids = [record["image_id"] for record in data["annotations"]]
    assert image_ids == sorted(image_ids)
    assert set(image_ids) == {1, 2}
    assert {"settings", "version", "date_created"} <= set(data["info"])


def test_the_result_does_not_depend_on_the_batch(photos, tmp_path):
    for size in (1, 2, 7):
        out = tmp_path / f"{size}.json"
        annotate(photos, out, size=40, batch_size=size, progress=False)
    first, *others = [json.loads((tmp_path / f"{size}.json").read_text()) for size in (1, 2, 7)]
    for other in others:
        assert other["annotations"] == first["annotations"]


def test_a_picture_without_masks_stays_in_the_file(tmp_path):
    Image.fromarray(np.full((24, 24, 3), 90, dtype=np.uint8)).save(tmp_path / "flat.png")
    values = torch.ones(9, 4)  # every pair alike: no second eigenvector
    (tmp_path / "saved").mkdir()
    np.save(tmp_path / "saved" / "flat.npy", values.numpy())
    done = annotate(
        tmp_path / "flat.png", tmp_path / "o.json", features=tmp_path / "saved", progress=False
    )
    assert (done.images, done.masks, done.failed) == (1, 0, 0)
    data = json.loads((tmp_path / "o.json").read_text())
    assert [record["file_name"] for record in data["images"]] == ["flat.png"]
    assert data["annotations"] == []


def test_parts_of_another_sharding_are_not_touched_unasked(photos, tmp_path, capsys):
    out = tmp_path / "o.json"
    arguments = ["maskcut", str(photos), "--out", str(out), "--size", "40", "--quiet"]
    assert main([*arguments, "--shard", "0/2"]) == 0
    assert not out.exists()
    (part,) = (tmp_path / "o.json.parts").iterdir()
    before = part.read_bytes()
    assert main(arguments) == 2
    assert "resume" in capsys.readouterr().err
    assert main([*arguments, "--shard", "0/2"]) == 2
    assert [path.read_bytes() for path in (tmp_path / "o.json.parts").iterdir()] == [before]
    assert main([*arguments, "--resume"]) == 0  # one process takes what the shard finished
    names = [json.loads(line).get("file_name") for line in before.splitlines()[1:]]
    (own,) = [p for p in (tmp_path / "o.json.parts").iterdir() if p.name == "0-of-1.jsonl"]
    assert not {json.loads(line).get("file_name") for line in own.read_text().splitlines()[1:]} & {
        *names
    }
    assert len(json.loads(out.read_text())["images"]) == 2


def test_help_exits_0_and_a_flag_that_does_not_exist_2(photos, capsys):
    assert main(["maskcut", "--help"]) == 0
    assert "--shard" in capsys.readouterr().out
    assert main(["maskcut", str(photos), "--out", "o.json", "--no-such-flag"]) == 2
    assert "--no-such-flag" in capsys.readouterr().err
