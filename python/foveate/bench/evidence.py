"""Which GPU kernels have a passing record of the source that stands, and which do not."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from foveate.bench.sources import GPU_BACKENDS, checkout, source_hashes
from foveate.testing import SPECS, OpSpec


class Record(NamedTuple):
    """One file of results: the environment, then a row a line."""

    path: Path
    environment: dict[str, Any]
    rows: list[dict[str, Any]]


class Standing(NamedTuple):
    """What the records say about one kernel; `current` if a passing one is of its source."""

    op: str
    backend: str
    current: bool
    text: str


def results_folder() -> Path:
    """`benchmarks/results` of the source tree, or under the current directory outside of one."""
    return (checkout() or Path.cwd()) / "benchmarks" / "results"


def read(path: Path) -> Record:
    """A file of JSON lines as `foveate bench --json` writes it.

    Raises:
        ValueError: it does not begin with an environment record, or a line is not JSON.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON lines: {error}") from error
    if not lines or lines[0].get("record") != "environment":
        raise ValueError(f"{path}: the first line is not an environment record")
    return Record(path, lines[0], lines[1:])


def records(folder: Path) -> list[Record]:
    """Every file of results in a folder, oldest first; none if it does not exist."""
    found = [read(path) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda record: str(record.environment.get("date", "")))


def standing(
    op: str, family: str, backend: str, found: Iterable[Record], hashes: dict[str, str]
) -> Standing:
    """What records, oldest first, say about the kernel of an op."""
    key = f"{family}/{backend}"
    best = Standing(op, backend, False, "no record")
    for record in found:
        rows = [r for r in record.rows if r["op"] == op and r["backend"] == backend]
        if not rows:
            continue
        environment = record.environment
        where = f"{environment['device']}, {environment['date'][:10]} ({record.path.name})"
        bad = [row["case"] for row in rows if row["verdict"] != "ok"]
        if environment.get("sources", {}).get(key) != hashes.get(key):
            # A record of other source says nothing against one of the source that stands.
            if not best.current:
                best = Standing(op, backend, False, f"source changed since {where}")
        elif bad:
            best = Standing(op, backend, False, f"INVALID on {where}: {', '.join(bad)}")
        else:
            best = Standing(op, backend, True, f"ok on {where}")
    return best


def standings(
    folder: Path, specs: Iterable[OpSpec] = SPECS, hashes: dict[str, str] | None = None
) -> list[Standing]:
    """The standing of every GPU kernel of the registry."""
    found = records(folder)
    known = source_hashes() if hashes is None else hashes
    return [
        standing(spec.name, spec.family, backend, found, known)
        for spec in specs
        for backend in GPU_BACKENDS
        if backend in spec.backends
    ]
