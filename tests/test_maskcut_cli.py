"""The command `foveate maskcut` on small pictures: files, exit codes, shards, resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from foveate.cli import main

FLAGS = ["--size", "40", "--n-masks", "2", "--batch-size", "1", "--quiet"]


def picture(seed: int, height: int = 40, width: int = 56) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = np.empty((height, width, 3), dtype=np.uint8)
    image[:] = (30, 60, 120)
    y, x = rng.integers(4, 14, 2)
    image[y : y + 18, x : x + 22] = (220, 150, 40)
    noise = rng.integers(-8, 9, image.shape)
    return np.clip(image.astype(int) + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    image = Image.fromarray(picture(0))
    image.save(folder / "rgb.PNG")
    image.convert("RGBA").save(folder / "rgba.png")
    image.convert("P").save(folder / "palette.png")
    image.convert("L").save(folder / "grey.bmp")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "sub" / "a.webp")
    image.save(folder / "sub" / "b.tiff")
    image.save(folder / "c.ppm")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(folder / "g16.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def load(path: Path) -> dict:
    data = json.loads(path.read_text())
    del data["info"]
    return data


def test_every_kind_of_image_is_annotated_and_pycocotools_reads_the_masks(photos, tmp_path):
    out = tmp_path / "ann.json"
    assert main(["maskcut", str(photos), "--out", str(out), *FLAGS]) == 0
    data = load(out)
    names = [record["file_name"] for record in data["images"]]
    assert len(names) == 9
    assert names == sorted(names)
    assert "sub/a.webp" in names
    assert data["categories"] == [{"id": 1, "name": "fg", "supercategory": "fg"}]
    coco = COCO(str(out))
    assert [a["id"] for a in data["annotations"]] == list(range(1, len(data["annotations"]) + 1))
    assert len(data["annotations"]) >= len(names)
    for annotation in data["annotations"]:
        mask = coco.annToMask(annotation)
        rows, columns = np.nonzero(mask)
        assert mask.shape == (40, 56)
        assert int(mask.sum()) == annotation["area"] > 0
        x, y = columns.min(), rows.min()
        box = [x, y, columns.max() + 1 - x, rows.max() + 1 - y]
        assert annotation["bbox"] == box
    assert not Path(f"{out}.failed.tsv").exists()


def test_shards_write_the_file_of_one_run(photos, tmp_path):
    one, many = tmp_path / "one.json", tmp_path / "many.json"
    assert main(["maskcut", str(photos), "--out", str(one), *FLAGS]) == 0
    for i in (2, 0, 1):
        assert not many.exists()
        assert main(["maskcut", str(photos), "--out", str(many), "--shard", f"{i}/3", *FLAGS]) == 0
    assert load(one) == load(many)


def test_broken_images_are_listed_and_do_not_stop_the_run(photos, tmp_path):
    whole = (photos / "rgb.PNG").read_bytes()
    (photos / "torn.png").write_bytes(whole[: len(whole) // 2])
    (photos / "empty.jpg").write_bytes(b"")
    os.mkfifo(photos / "pipe.png")
    out = tmp_path / "ann.json"
    arguments = ["maskcut", str(photos), "--out", str(out), *FLAGS]
    assert main(arguments) == 0
    lines = Path(f"{out}.failed.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["empty.jpg", "pipe.png", "torn.png"]
    assert all(len(line.split("\t")) == 3 for line in lines)
    ids = {r["file_name"]: r["id"] for r in load(out)["images"]}
    assert len(ids) == 9
    assert ids["g16.png"] == 4  # after c.ppm, cmyk.jpg and the failed empty.jpg
    assert main([*arguments, "--resume", "--strict"]) == 1
    for name in ("torn.png", "empty.jpg", "pipe.png"):
        (photos / name).unlink()
        (photos / name).write_bytes(whole)
    assert main([*arguments, "--resume", "--strict"]) == 0
    assert len(load(out)["images"]) == 12
    assert not Path(f"{out}.failed.tsv").exists()


def test_only_broken_images_exit_1(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.png").write_bytes(b"nothing")
    assert main(["maskcut", str(tmp_path / "x"), "--out", str(tmp_path / "o.json"), *FLAGS]) == 1


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--model", "test_vit"], "weights"),
        (["--model", "test_vit", "--weights", "missing.pth"], "missing.pth"),
        (["--weights", "missing.pth"], "model"),
        (["--features", "nowhere"], "nowhere"),
        (["--tau", "2"], "tau"),
        (["--n-masks", "0"], "n_masks"),
        (["--backend", "abacus"], "backend"),
        (["--device", "abacus"], "device"),
        (["--resume", "--overwrite"], "overwrite"),
        (["--shard", "3/3"], "shard"),
        (["--size", "8"], "size"),
        (["--batch-size", "0"], "batch_size"),
    ],
)
def test_bad_flags_exit_2_and_leave_nothing(photos, tmp_path, capsys, flags, word):
    out = tmp_path / "ann.json"
    assert main(["maskcut", str(photos), "--out", str(out), *FLAGS, *flags]) == 2
    assert word in capsys.readouterr().err
    assert not out.exists()
    assert not Path(f"{out}.parts").exists()


def test_no_images_a_name_twice_and_an_unwritable_out_exit_2(photos, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    out = str(tmp_path / "ann.json")
    assert main(["maskcut", str(tmp_path / "none"), "--out", out, *FLAGS]) == 2
    assert main(["maskcut", str(photos), str(photos / "c.ppm"), "--out", out, *FLAGS]) == 2
    assert "c.ppm" in capsys.readouterr().err
    assert main(["maskcut", str(photos), "--out", str(tmp_path / "no" / "o.json"), *FLAGS]) == 2


def test_existing_results_need_resume_or_overwrite(photos, tmp_path, capsys):
    out = tmp_path / "ann.json"
    arguments = ["maskcut", str(photos), "--out", str(out), *FLAGS]
    assert main(arguments) == 0
    before = out.read_bytes()
    assert main(arguments) == 2
    assert main([*arguments, "--tau", "0.3", "--resume"]) == 2
    assert "tau" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main([*arguments, "--tau", "0.3", "--overwrite"]) == 0


def test_torn_lines_and_other_shardings_resume_to_the_same_file(photos, tmp_path):
    one, again = tmp_path / "one.json", tmp_path / "again.json"
    assert main(["maskcut", str(photos), "--out", str(one), *FLAGS]) == 0
    whole = (tmp_path / "one.json.parts" / "0-of-1.jsonl").read_bytes()
    parts = tmp_path / "again.json.parts"
    parts.mkdir()
    rng = np.random.default_rng(1)
    for cut in [0, 1, *rng.integers(2, len(whole), 2), len(whole) - 1]:
        for shards in (1, 2):
            for path in (again, *parts.iterdir()):
                path.unlink(missing_ok=True)
            (parts / "0-of-1.jsonl").write_bytes(whole[:cut])
            for i in range(shards):
                flags = ["--resume", "--shard", f"{i}/{shards}"]
                assert main(["maskcut", str(photos), "--out", str(again), *FLAGS, *flags]) == 0
            assert load(again) == load(one)


def test_a_killed_run_resumes_without_loss_or_doubles(photos, tmp_path):
    for i in range(30):
        Image.fromarray(picture(i)).save(photos / f"more{i:02}.png")
    out = tmp_path / "ann.json"
    part = tmp_path / "ann.json.parts" / "0-of-1.jsonl"
    arguments = ["maskcut", str(photos), "--out", str(out), *FLAGS]
    process = subprocess.Popen([sys.executable, "-m", "foveate", *arguments])
    while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") > 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert main([*arguments, "--resume"]) == 0
    names = [json.loads(line).get("file_name") for line in part.read_text().splitlines()[1:]]
    assert len(names) == len(set(names)) == 39
    assert main([*arguments[:3], str(tmp_path / "one.json"), *FLAGS]) == 0
    assert load(out) == load(tmp_path / "one.json")


def test_torchrun_environment_gives_the_shard(photos, tmp_path, monkeypatch):
    out = tmp_path / "ann.json"
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["maskcut", str(photos), "--out", str(out), *FLAGS]) == 0
    parts = sorted(path.name for path in (tmp_path / "ann.json.parts").iterdir())
    assert parts == ["0-of-2.jsonl", "1-of-2.jsonl"]
    assert len(load(out)["images"]) == 9


def test_overlays_and_the_swap_for_cutler(photos, tmp_path):
    out, pictures = tmp_path / "ann.json", tmp_path / "pictures"
    flags = ["--overlay", str(pictures), "--compat", "cutler"]
    assert main(["maskcut", str(photos), "--out", str(out), *FLAGS, *flags]) == 0
    assert np.asarray(Image.open(pictures / "sub" / "a.webp.png")).shape == (40, 56, 3)
    assert {(r["width"], r["height"]) for r in load(out)["images"]} == {(40, 56)}
    assert {(r["width"], r["height"]) for r in load(out)["annotations"]} == {(56, 40)}


def test_a_missing_package_exits_2_and_is_named(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    assert main(["maskcut", str(photos), "--out", str(tmp_path / "a.json"), *FLAGS]) == 2
    assert "pycocotools" in capsys.readouterr().err
