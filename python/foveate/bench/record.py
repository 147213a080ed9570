"""One record of a GPU round out of the files of its benchmark runs.

    python -m foveate.bench.record --results DIR [--leg NAME=VERDICT ...] FILE...

The record is DIR/<gpu>.json: the environment of the runs, with the verdicts of the round's other
legs, then every row measured on the GPU, each once.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from foveate.bench.evidence import Record, read


def name_of(device: str) -> str:
    """The device's name as that of a file: lower-case letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def joined(runs: Iterable[Record], legs: dict[str, str]) -> list[dict[str, Any]]:
    """The environment, then the rows of all runs; of a row in two of them the first stands.

    A row that is INVALID in any run stands as INVALID.

    Raises:
        ValueError: no run measured on a GPU, or they are of different sources or devices.
    """
    found = [run for run in runs if any(row["device"] == "cuda" for row in run.rows)]
    if not found:
        raise ValueError("no run has a row of a GPU")
    first = found[0].environment
    for run in found[1:]:
        for key in ("device", "commit", "sources"):
            if run.environment[key] != first[key]:
                raise ValueError(f"{run.path}: another {key} than {found[0].path}")
    rows: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for run in found:
        for row in run.rows:
            same = (row["op"], row["case"], row["dtype"], row["backend"])
            if row["device"] == "cuda" and (same not in rows or row["verdict"] != "ok"):
                rows[same] = row
    ceilings = {k: v for run in found for k, v in run.environment["ceilings"].items()}
    return [first | {"ceilings": ceilings, "legs": legs}, *rows.values()]


def main(argv: list[str] | None = None) -> int:
    """Write the record; 1 if no file holds a row of a GPU."""
    parser = argparse.ArgumentParser(prog="python -m foveate.bench.record", description=__doc__)
    parser.add_argument("--results", type=Path, required=True, metavar="DIR")
    parser.add_argument("--leg", action="append", default=[], metavar="NAME=VERDICT")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    legs = dict(leg.partition("=")[::2] for leg in args.leg)
    present = [file for file in args.files if file.is_file() and file.stat().st_size]
    for file in set(args.files) - set(present):
        print(f"no rows: {file.name}")
    try:
        lines = joined(map(read, present), legs)
    except ValueError as error:
        print(f"no record: {error}", file=sys.stderr)
        return 1
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"{name_of(lines[0]['device'])}.json"
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
