"""The rows of `foveate bench` under pytest-benchmark: the gate first, then the row and its peers.

    pytest benchmarks/bench_ops.py [-k "bits_encode and cpu"] [--rows all]

Each row is a group; the subject is named after its backend. pytest-benchmark measures one function
after the other: compare with `foveate bench`, which measures them in turn, where it matters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from foveate.bench import rows
from foveate.bench.peers import bind, differentiated, on_backend, peers_of
from foveate.testing import SPECS, Call, assert_ok

SUBJECT = "the op"


def _runners(task: rows.Task, *, compile_too: bool) -> dict[str, Callable[[Call], Any]]:
    """What the row times, by name: given the call, a function without arguments."""
    found: dict[str, Callable[[Call], Any]] = {
        SUBJECT: lambda call: bind(on_backend(task.spec, task.backend), call)
    }
    peers = peers_of(task.spec, task.bench, task.backend, compile_too=compile_too)
    return found | {peer.name: peer.bind for peer in peers}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("rows") == "all"
    params = []
    for task in rows.tasks(SPECS, quick=not everything, backend=None):
        if rows.unavailable(task) is not None:
            continue
        row = f"{task.spec.name}, {task.bench.id} [{task.backend}]"
        runners = _runners(task, compile_too=everything)
        params += [pytest.param(task, row, n, b, id=f"{row}-{n}") for n, b in runners.items()]
    metafunc.parametrize(("task", "row", "name", "binder"), params)


def judged(task: rows.Task, row: str, kept: dict[str, Call]) -> Call:
    """The row's tensors, once they passed the gate; `kept` holds those of the last row.

    Raises:
        AssertionError: the row is INVALID.
        NotImplementedError: the backend refuses these arguments.
    """
    if row not in kept:
        call = task.bench.make(rows.device_of(task.backend))
        with torch.set_grad_enabled(differentiated(call)):
            assert_ok([rows.worst(rows.judge(task, call))])
        kept.clear()
        kept[row] = call
    return kept[row]


@pytest.fixture(scope="module")
def kept() -> dict[str, Call]:
    return {}


def test_row(task, row, name, binder, kept, benchmark):
    try:
        call = judged(task, row, kept)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal))
    run = binder(call)

    def once() -> None:
        run()
        if rows.device_of(task.backend) == "cuda":
            torch.cuda.synchronize()

    benchmark.group = row
    benchmark.extra_info |= {
        "family": task.spec.family,
        "op": task.spec.name,
        "case": task.bench.id,
        "backend": task.backend,
        "runs": name,
    }
    with torch.set_grad_enabled(differentiated(call)):
        once()
        benchmark(once)
