"""benchmarks/gpu_round.sh: every leg has its turn and its verdict, and the record is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foveate.bench import evidence, record

ROOT = Path(__file__).parents[1]
LEGS = ["build", "doctor", "bench-triton", "bench-cuda", "tests", "sanitizer", "memcheck",
        "racecheck", "bench-all", "record"]  # fmt: skip
ENVIRONMENT = {
    "record": "environment", "device": "NVIDIA H100 80GB HBM3", "gpu": "NVIDIA H100 80GB HBM3",
    "commit": "abc", "date": "2026-01-02T03:04:05+00:00", "ceilings": {"cuda": {}},
    "sources": {"analog_bits/triton": "hash"},
}  # fmt: skip

# Stands in for `python` and `compute-sanitizer`: tests fail, benchmarks leave rows of a GPU.
STUB = """#!{python}
import json, os, sys
args = sys.argv[1:]
with open({calls!r}, "a") as file:
    file.write(" ".join([os.path.basename(sys.argv[0]), *args]) + "\\n")
if args[:2] == ["-m", "foveate.bench.record"]:
    os.execv({python!r}, [{python!r}, *args])
if "pytest" in args:
    sys.exit("1 failed")
if "--json" in args:
    with open(args[args.index("--json") + 1], "w") as file:
        for line in {lines!r}:
            file.write(json.dumps(line) + "\\n")
"""


def row(**changes):
    made = {"family": "analog_bits", "op": "bits_encode", "case": "maps", "dtype": "float32",
            "device": "cuda", "backend": "triton", "verdict": "ok"}  # fmt: skip
    return made | changes


def run_file(path, *rows, **changes):
    lines = [ENVIRONMENT | changes, *rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_dry_run_names_every_leg_within_ten_minutes_and_runs_none(tmp_path):
    done = subprocess.run(
        ["bash", "benchmarks/gpu_round.sh", "--dry-run", "--results", str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == LEGS
    for command in ("pip install --no-build-isolation --no-deps -e .", "pytest -q -m gpu",
                    "--tool memcheck", "--tool racecheck", "--backend triton --json",
                    "--backend cuda --json", f"--results {tmp_path}"):  # fmt: skip
        assert command in done.stdout
    assert not list(tmp_path.iterdir())
    assert "readonly LIMIT=580" in (ROOT / "benchmarks" / "gpu_round.sh").read_text()


def test_a_bad_flag_exits_2():
    done = subprocess.run(
        ["bash", "benchmarks/gpu_round.sh", "--fast"], capture_output=True, cwd=ROOT
    )
    assert done.returncode == 2


def test_a_failing_leg_stops_nothing_and_the_record_tells_of_it(tmp_path):
    tools, out, results = tmp_path / "tools", tmp_path / "out", tmp_path / "results"
    calls = tmp_path / "calls"
    for folder in (tools, out):
        folder.mkdir()
    for name in ("python", "compute-sanitizer"):
        stub = tools / name
        stub.write_text(
            STUB.format(python=sys.executable, calls=str(calls), lines=[ENVIRONMENT, row()])
        )
        stub.chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "benchmarks/gpu_round.sh", "--results", str(results)],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
        env=os.environ | {"PATH": path, "OUT": str(out)},
    )  # fmt: skip
    assert done.returncode == 1
    assert len(calls.read_text().splitlines()) == len(LEGS)
    (written,) = results.glob("*.json")
    assert written.name == "nvidia_h100_80gb_hbm3.json"
    environment, *rows = lines_of(written)
    assert rows == [row()]
    assert environment["legs"] == {
        name: "failed (1)" if name in ("tests", "memcheck", "racecheck") else "ok"
        for name in LEGS[:-1]
    }
    assert {p.name for p in out.iterdir()} == {"round.log", "legs.txt", written.name}
    assert "1 failed" in (out / "round.log").read_text()
    summary = (out / "legs.txt").read_text()
    assert [line.split()[0] for line in summary.splitlines()] == LEGS
    (standing,) = [
        s for s in evidence.standings(results, hashes=ENVIRONMENT["sources"])
        if (s.op, s.backend) == ("bits_encode", "triton")
    ]  # fmt: skip
    assert standing.current


# The record


def test_runs_are_joined_and_an_invalid_row_is_not_lost(tmp_path):
    files = [
        run_file(tmp_path / "a", row(time_us=1.0), row(case="large")),
        run_file(tmp_path / "b", row(time_us=2.0), row(case="large", verdict="INVALID"),
                 row(device="cpu", backend="cpu")),
        str(tmp_path / "was not reached"),
    ]  # fmt: skip
    assert record.main(["--results", str(tmp_path / "r"), "--leg", "tests=ok", *files]) == 0
    environment, first, second = lines_of(tmp_path / "r" / "nvidia_h100_80gb_hbm3.json")
    assert environment["legs"] == {"tests": "ok"}
    assert first == row(time_us=1.0)
    assert second == row(case="large", verdict="INVALID")
    (found,) = evidence.records(tmp_path / "r")
    standing = evidence.standing(
        "bits_encode", "analog_bits", "triton", [found], ENVIRONMENT["sources"]
    )
    assert not standing.current
    assert "INVALID" in standing.text
    assert "large" in standing.text


@pytest.mark.parametrize("key", ["commit", "device", "sources"])
def test_runs_of_different_sources_make_no_record(tmp_path, key, capsys):
    a, b = run_file(tmp_path / "a", row()), run_file(tmp_path / "b", row(), **{key: {"x": "y"}})
    assert record.main(["--results", str(tmp_path / "r"), a, b]) == 1
    assert f"another {key}" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_round_without_a_gpu_makes_no_record(tmp_path, capsys):
    file = run_file(tmp_path / "a", row(device="cpu"), device="A CPU")
    assert record.main(["--results", str(tmp_path / "r"), file]) == 1
    assert "no run has a row of a GPU" in capsys.readouterr().err


# What a record says of a kernel


@pytest.mark.parametrize(
    ("hashes", "verdict", "current", "text"),
    [
        ({"analog_bits/triton": "hash"}, "ok", True, "ok on NVIDIA"),
        ({"analog_bits/triton": "other"}, "ok", False, "source changed since NVIDIA"),
        ({"analog_bits/triton": "hash"}, "INVALID", False, "INVALID on NVIDIA"),
        ({"analog_bits/triton": "other"}, "INVALID", False, "source changed since NVIDIA"),
    ],
)
def test_a_record_speaks_for_the_source_that_it_measured(tmp_path, hashes, verdict, current, text):
    run_file(tmp_path / "gpu.json", row(verdict=verdict))
    found = {(s.op, s.backend): s for s in evidence.standings(tmp_path, hashes=hashes)}
    standing = found["bits_encode", "triton"]
    assert standing.current == current
    assert standing.text.startswith(text)
    assert found["bits_decode", "triton"].text == "no record"


def test_a_later_record_of_other_source_takes_nothing_from_one_that_holds(tmp_path):
    run_file(tmp_path / "a.json", row())
    run_file(tmp_path / "b.json", row(), sources={"analog_bits/triton": "older"},
             date="2026-05-05T00:00:00+00:00")  # fmt: skip
    found = evidence.standings(tmp_path, hashes={"analog_bits/triton": "hash"})
    assert next(s for s in found if (s.op, s.backend) == ("bits_encode", "triton")).current


@pytest.mark.parametrize("text", ["", "{}\n", "not json\n", '{"record": "row"}\n'])
def test_a_file_that_is_no_record_is_an_error(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json"):
        evidence.records(tmp_path)
