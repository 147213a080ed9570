"""Runs of `foveate maskcut` that die at chosen points, and what a resumed run makes of the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.cli import main

FLAGS = ["--size", "32", "--n-masks", "2", "--batch-size", "2", "--quiet"]
COUNT = 7  # pictures, one of them broken

# Forks a child per point, which kills itself there with SIGKILL, and a second one that resumes.
# One thread before the forks: a child of a process with OpenMP threads would wait for them.
_SERVER = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from foveate.cli import main
from foveate.methods import parts

photos, folder, flags = sys.argv[1], sys.argv[2], sys.argv[3:]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def at_line(count, share):
    written, append = [0], parts.append
    def dying(file, record):
        if written[0] == count:
            line = parts.json.dumps(record).encode() + b"\\n"
            file.write(line[: int(share * len(line))])
            die()
        written[0] += 1
        append(file, record)
    parts.append = dying

def at_rename(count):
    seen, replace = [0], parts.Path.replace
    def dying(self, target):
        if seen[0] == count:
            die()
        seen[0] += 1
        return replace(self, target)
    parts.Path.replace = dying

def after_rename(count):
    seen, replace = [0], parts.Path.replace
    def dying(self, target):
        replace(self, target)
        seen[0] += 1
        if seen[0] == count:
            die()
    parts.Path.replace = dying

points = {
    "before the settings": lambda: at_line(0, 0),
    "in the settings": lambda: at_line(0, 0.5),
    "before the first image": lambda: at_line(1, 0),
    "in an image": lambda: at_line(4, 0.7),
    "but for a newline": lambda: at_line(5, 0.999),
    "after the last image": lambda: at_rename(0),
    "between the two files": lambda: at_rename(1),
    "when all is done": lambda: after_rename(2),
}

def child(action):
    pid = os.fork()
    if pid == 0:
        os._exit(action())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for i, plant in enumerate(points.values()):
    arguments = ["maskcut", photos, "--out", f"{folder}/{i}.json", *flags]
    first = child(lambda: (plant(), main(arguments))[1])
    second = child(lambda: main([*arguments, "--resume"]))
    print(first, second)
"""


def scene(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = np.full((40, 48, 3), (40, 70, 110), dtype=np.uint8)
    y, x = rng.integers(2, 16, 2)
    image[y : y + 16, x : x + 20] = (210, 150, 60)
    return np.clip(image + rng.integers(-9, 10, image.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(COUNT - 1):
        Image.fromarray(scene(i)).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def load(path: Path) -> dict:
    data = json.loads(path.read_text())
    del data["info"]
    return data


def assert_whole(out: Path, expected: dict) -> None:
    """The file of an undisturbed run, and parts with each finished image once."""
    assert load(out) == expected
    names = []
    for part in (out.with_name(out.name + ".parts")).glob("*.jsonl"):
        records = [json.loads(line) for line in part.read_text().splitlines()]
        assert "settings" in records[0]
        names += [record["file_name"] for record in records[1:] if "error" not in record]
    assert sorted(names) == sorted(record["file_name"] for record in expected["images"])
    failures = out.with_name(out.name + ".failed.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in failures] == ["broken.png"]


@pytest.fixture
def expected(photos: Path, tmp_path: Path) -> dict:
    assert main(["maskcut", str(photos), "--out", str(tmp_path / "one.json"), *FLAGS]) == 0
    data = load(tmp_path / "one.json")
    assert len(data["images"]) == COUNT - 1
    assert len(data["annotations"]) >= COUNT - 1
    return data


def test_a_run_killed_anywhere_resumes_to_the_file_of_one_run(photos, expected, tmp_path):
    (tmp_path / "runs").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _SERVER, str(photos), str(tmp_path / "runs"), *FLAGS],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    codes = [line.split() for line in done.stdout.splitlines()]
    assert codes == [["-9", "0"]] * 8
    for i in range(8):
        assert_whole(tmp_path / "runs" / f"{i}.json", expected)


def test_a_part_torn_at_any_byte_resumes_to_the_file_of_one_run(photos, expected, tmp_path):
    whole = (tmp_path / "one.json.parts" / "0-of-1.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    rng = np.random.default_rng(1)
    cuts = {0, 1, *ends, *(end - 1 for end in ends), *rng.integers(2, len(whole), 6).tolist()}
    for i, cut in enumerate(sorted(cuts)):
        out = tmp_path / f"torn{i}.json"
        parts = tmp_path / f"torn{i}.json.parts"
        parts.mkdir()
        (parts / "0-of-1.jsonl").write_bytes(whole[:cut])
        for shard in (["0/1"], ["0/2", "1/2"])[i % 2]:
            flags = ["--resume", "--shard", shard]
            assert main(["maskcut", str(photos), "--out", str(out), *FLAGS, *flags]) == 0
        assert load(out) == expected


def test_two_processes_under_torchrun_write_one_file(photos, expected, tmp_path):
    out = tmp_path / "two.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [
            *(sys.executable, *launcher, "-m", "foveate", "maskcut"),
            *(str(photos), "--out", str(out), *FLAGS),
        ],
        capture_output=True,
        check=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert_whole(out, expected)
    parts = sorted(path.name for path in (tmp_path / "two.json.parts").iterdir())
    assert parts == ["0-of-2.jsonl", "1-of-2.jsonl"]  # and no draft
