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
import timm
import torch
from PIL import Image
from pycocotools.coco import COCO
from safetensors.torch import save_file

from foveate.cli import main
from foveate.methods.descriptors import normalized, vit_features
from foveate.methods.images import read_image, resize_image

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
    image.convert("LA").save(folder / "la.PNG")
    image.convert("1").save(folder / "bits.TIF")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by a quarter; the pixels are not
    image.save(folder / "exif.JPEG", exif=turned)
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
    assert len(names) == 12
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
    assert len(ids) == 12
    assert ids["g16.png"] == 6  # after four pictures and the failed empty.jpg
    assert main([*arguments, "--resume", "--strict"]) == 1
    for name in ("torn.png", "empty.jpg", "pipe.png"):
        (photos / name).unlink()
        (photos / name).write_bytes(whole)
    assert main([*arguments, "--resume", "--strict"]) == 0
    assert len(load(out)["images"]) == 15
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
        (["--features", ".", "--model", "test_vit"], "exclude"),
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
    assert len(names) == len(set(names)) == 42
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
    assert len(load(out)["images"]) == 12


def test_a_vision_transformer_and_saved_features_describe_pictures(photos, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    weights = str(tmp_path / "weights.safetensors")
    arguments = ["maskcut", str(photos / "c.ppm"), str(photos / "rgb.PNG"), "--n-masks", "1"]
    arguments += ["--tau", "0.9", "--quiet"]
    model = [*arguments, "--model", "test_vit", "--weights", weights, "--size", "96"]
    assert main([*model, "--out", str(tmp_path / "vit.json")]) == 0
    # The same descriptors from files: one as an array on its grid, one as a tensor of rows.
    saved = tmp_path / "saved"
    saved.mkdir()
    patch = network.patch_embed.patch_size[0]
    side = round(96 / patch)
    for name in ("c.ppm", "rgb.PNG"):
        image = resize_image(read_image(photos / name), side * patch, side * patch)
        values = vit_features(network.eval(), normalized(image, network)[None])[0]
        if name == "c.ppm":
            np.save(saved / "c.npy", values.reshape(side, side, -1).numpy())
        else:
            save_file({"features": values.contiguous()}, saved / "rgb.safetensors")
    flags = ["--features", str(saved), "--out", str(tmp_path / "saved.json")]
    assert main([*arguments, *flags]) == 0
    assert load(tmp_path / "vit.json") == load(tmp_path / "saved.json")
    assert len(load(tmp_path / "vit.json")["images"]) == 2


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
