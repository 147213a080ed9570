"""The generated tables of the README and of docs/: complete, honest about losses, up to date."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foveate.bench import tables
from foveate.testing import SPECS

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "record": "environment", "device": "A CPU", "gpu": None, "isa": "avx2", "threads": 2,
    "date": "2026-01-02T03:04:05+00:00", "torch": "2.14.1", "triton": "3.8.0",
}  # fmt: skip


def row(**changes):
    made = {
        "family": "analog_bits", "op": "bits_encode", "case": "maps | b=2", "dtype": "float32",
        "device": "cpu", "backend": "cpu", "time_us": 1500.0,
        "ratios": {"reference": 20.0, "table": 2.5}, "gb_per_s": 7.0, "tflop_per_s": 0.0,
        "roofline": 0.6, "peak_bytes": 1 << 25, "error": 0.0, "budget": 0.0, "verdict": "ok",
        "samples_us": [1500.0],
    }  # fmt: skip
    return made | changes


@pytest.fixture
def tree(tmp_path):
    """A source tree with markers and no records, and a function that adds a record."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text("# x\n<!-- ops table -->\n<!-- end ops table -->\nend\n")
    (tmp_path / "docs" / "analog_bits.md").write_text(
        "# y\n<!-- performance table: analog_bits -->\nold\n<!-- end performance table -->\nend\n"
    )
    return tmp_path


def record(tree, *rows, name="cpu", **environment):
    lines = [ENVIRONMENT | environment, *rows]
    path = tree / "benchmarks" / "results" / f"{name}.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def ops_row(tree, op):
    (line,) = (
        line
        for line in (tree / "README.md").read_text().splitlines()
        if line.startswith(f"| `{op}` |")
    )
    return line


def test_the_committed_tables_are_those_of_the_committed_records(capsys):
    assert tables.main(["--check"], ROOT) == 0, capsys.readouterr().out


def test_every_op_has_one_row_and_every_family_a_method(tree):
    assert tables.main([], tree) == 0
    for spec in SPECS:
        cells = ops_row(tree, spec.name).split(" | ")
        assert cells[1] == f"`{spec.family}`"
        assert cells[4] == tables.METHODS[spec.family]
        assert all(backend in cells[3] for backend in spec.backends)
        assert "no record" in cells[5]
    assert tables.NO_RECORD in (tree / "docs" / "analog_bits.md").read_text()


def test_check_writes_nothing_and_tells_of_a_stale_table(tree, capsys):
    before = (tree / "README.md").read_text()
    assert tables.main(["--check"], tree) == 1
    assert (tree / "README.md").read_text() == before
    assert "README.md is stale" in capsys.readouterr().out
    assert tables.main([], tree) == 0
    assert tables.main(["--check"], tree) == 0
    record(tree, row())
    assert tables.main(["--check"], tree) == 1
    assert "docs/analog_bits.md is stale" in capsys.readouterr().out


def test_a_row_tells_its_device_date_and_all_its_peers(tree):
    record(tree, row())
    tables.main([], tree)
    page = (tree / "docs" / "analog_bits.md").read_text()
    assert "`cpu`: A CPU, avx2, 2 threads, 2026-01-02, torch 2.14.1." in page
    assert "| `bits_encode` | maps \\| b=2 | float32 | cpu | 1.5 ms | 7 GB/s | 60 % |" in page
    assert "20x reference, 2.5x table" in page
    assert "old" not in page
    assert page.startswith("# y\n")
    assert page.endswith("\nend\n")


def test_a_loss_is_published_and_the_strongest_peer_counts(tree):
    record(tree, row(), row(case="large", ratios={"reference": 9.0, "table": 0.75}))
    tables.main([], tree)
    assert "0.75x to 2.5x table (cpu, cpu)" in ops_row(tree, "bits_encode")
    assert "0.75x table" in (tree / "docs" / "analog_bits.md").read_text()


def test_an_invalid_row_has_no_time_in_either_table(tree):
    bad = row(verdict="INVALID", time_us=None, ratios={}, gb_per_s=None, tflop_per_s=None,
              roofline=None, peak_bytes=None)  # fmt: skip
    record(tree, row(), bad)
    tables.main([], tree)
    assert "INVALID (cpu)" in ops_row(tree, "bits_encode")
    assert "2.5x" not in ops_row(tree, "bits_encode")
    assert "| INVALID |" in (tree / "docs" / "analog_bits.md").read_text()


def test_the_host_time_of_a_gpu_row_is_not_taken_for_its_speed(tree):
    gpu = {"gpu": "NVIDIA H100", "device": "NVIDIA H100"}
    times = {"device": "cuda", "backend": "triton"}
    record(tree, row(**times), row(**times, case="maps, host", ratios={"reference": 99.0}),
           name="h100", **gpu)  # fmt: skip
    tables.main([], tree)
    assert "| 2.5x table (triton, h100) |" in ops_row(tree, "bits_encode")
    page = (tree / "docs" / "analog_bits.md").read_text()
    assert "`h100`: NVIDIA H100, 2026-01-02, torch 2.14.1, triton 3.8.0." in page
    assert "| maps, host | float32 | triton | 1.5 ms |  |  | 99x reference |" in page


@pytest.mark.parametrize(
    ("page", "text", "match"),
    [
        ("README.md", "no markers", "ops table"),
        ("docs/a.md", "<!-- performance table: analog_bits -->\n", "end performance table"),
        ("docs/a.md", "<!-- performance table: optics -->\n", "no family optics"),
    ],
)
def test_a_page_without_its_markers_is_an_error(tree, page, text, match):
    (tree / page).write_text(text)
    with pytest.raises(ValueError, match=match):
        tables.main([], tree)
