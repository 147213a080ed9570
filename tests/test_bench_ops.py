"""benchmarks/bench_ops.py and overhead.py: generated, judged before timed, complete."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from test_bench import double, toy, wrong_double

from foveate.bench import rows

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench_ops():
    spec = importlib.util.spec_from_file_location("bench_ops", ROOT / "benchmarks/bench_ops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pytest_runs_a_row_of_the_registry_under_pytest_benchmark():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "benchmarks/bench_ops.py", "--benchmark-disable",
         "-p", "no:cacheprovider", "-k", "prompt_select and (op or original)"],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert "the op] PASSED" in done.stdout
    assert "original] PASSED" in done.stdout


def test_a_plain_run_of_the_suite_measures_nothing(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
    assert "bench_*.py" in pytestconfig.getini("python_files")
    assert not list((ROOT / "tests").glob("bench_*.py"))


@pytest.mark.parametrize("api", [double, wrong_double])
def test_the_gate_comes_before_the_time(bench_ops, api):
    task = rows.tasks((toy(api),), quick=True, backend=None)[0]
    kept: dict = {}
    if api is wrong_double:
        with pytest.raises(AssertionError, match="over budget"):
            bench_ops.judged(task, "a row", kept)
        assert not kept  # its peers are not timed either
    else:
        assert kept == {"a row": bench_ops.judged(task, "a row", kept)}


def test_a_row_and_its_peers_run_on_the_same_tensors(bench_ops):
    task = rows.tasks((toy(peers={"2x": lambda x: 2 * x}),), quick=True, backend=None)[0]
    runners = bench_ops._runners(task, compile_too=False)
    assert list(runners) == [bench_ops.SUBJECT, "reference", "2x"]
    call = bench_ops.judged(task, "a row", {})
    for binder in runners.values():
        assert binder(call)().equal(2 * call.args[0])


def test_the_overhead_table_has_a_line_for_each_layer(tmp_path):
    wheel = tmp_path / "foveate.whl"
    wheel.write_bytes(b"x" * 2048)
    done = subprocess.run(
        [sys.executable, "benchmarks/overhead.py", "--rounds", "1", "--wheel", str(wheel)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "| what | floor | of |"
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| a call"] * 6 + ["| import"] * 2 + [
        "| wheel"
    ]
    assert lines[-1] == "| wheel | 2 KiB | compressed |"
