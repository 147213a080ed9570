"""The tables of the README and of docs/, generated from the registry and the committed records.

    python -m foveate.bench.tables [--check]

They depend on benchmarks/results/*.json and the registry alone, not on the machine. With --check
nothing is written, and the exit code is 1 if a table is stale.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from foveate.bench import report
from foveate.bench.evidence import Record, records
from foveate.bench.rows import EAGER, HOST
from foveate.bench.sources import checkout
from foveate.testing import SPECS, OpSpec

METHODS = {
    "analog_bits": "Bit Diffusion, Pix2Seq-D",
    "ncut": "TokenCut, CutLER (MaskCut), CuVLER",
    "pairwise_loss": "SigLIP, CLIP",
    "pearson": "Rosetta Neurons",
    "topdown_attention": "TOAST",
}
NO_RECORD = "No record yet."

_OPS = ("<!-- ops table -->", "<!-- end ops table -->")
_FAMILY_BEGIN = re.compile(r"<!-- performance table: (\w+) -->")
_FAMILY_END = "<!-- end performance table -->"


def strongest(row: dict[str, Any]) -> tuple[float, str] | None:
    """How many times faster than its fastest peer an op is, and that peer; None without peers."""
    return min((ratio, peer) for peer, ratio in row["ratios"].items()) if row["ratios"] else None


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _table(headers: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    made = [list(headers)]
    made.append(["---"] * len(made[0]))
    made += [[_cell(cell) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in made)


def _hosted(row: dict[str, Any]) -> bool:
    return bool(row["case"].endswith((EAGER, HOST)))


def _best(name: str, record: Record) -> str | None:
    """The op against the strongest peer of each of its rows: the range, and what the peers are."""
    rows = [r for r in record.rows if r["op"] == name and not _hosted(r)]
    if not rows:
        return None
    if any(row["verdict"] != "ok" for row in rows):
        return f"INVALID ({record.path.stem})"
    found = sorted((*pair, row["backend"]) for row in rows if (pair := strongest(row)))
    if not found:
        return f"no peer ({record.path.stem})"
    low, high = report.ratio_text(found[0][0]), report.ratio_text(found[-1][0])
    peers = ", ".join(dict.fromkeys(peer for _, peer, _ in found))
    backends = "/".join(sorted({backend for *_, backend in found}))
    span = low if low == high else f"{low} to {high}"
    return f"{span} {peers} ({backends}, {record.path.stem})"


def _where(record: Record) -> str:
    """Device, date and versions of a record, in a line."""
    e = record.environment
    where = [str(e["device"])]
    if e.get("gpu") is None:
        where.append(f"{e['isa']}, {e['threads']} threads")
    where += [str(e["date"])[:10], f"torch {e['torch']}"]
    if e.get("gpu") is not None:
        where.append(f"triton {e['triton']}")
    return f"`{record.path.stem}`: " + ", ".join(where) + "."


def ops_table(found: list[Record], specs: Iterable[OpSpec] = SPECS) -> str:
    """One row an op: what it computes, who computes it, and how it does against its peers."""
    lines = []
    for spec in specs:
        what = (inspect.getdoc(spec.api) or "").partition("\n")[0]
        measured = [text for record in found if (text := _best(spec.name, record)) is not None]
        lines.append(
            (
                f"`{spec.name}`",
                f"`{spec.family}`",
                what,
                ", ".join(spec.backends) or "reference alone",
                METHODS[spec.family],
                "; ".join(measured) or "no record",
            )
        )
    headers = (
        "op",
        "family",
        "result",
        "kernels",
        "method",
        "times faster than its strongest peer",
    )
    notes = [_where(record) for record in found] or [NO_RECORD]
    legend = "The last column spans an op's measured rows; below 1x is a loss."
    return "\n".join([_table(headers, lines), "", legend, *notes])


def _times(row: dict[str, Any]) -> tuple[str, ...]:
    if row["verdict"] != "ok":
        return ("INVALID", "", "", "", "")
    hosted = row["case"].endswith(HOST)
    rate = row["tflop_per_s"] or 0
    return (
        report.time_text(row["time_us"]),
        "" if hosted else f"{row['gb_per_s']:.3g} GB/s" + (f", {rate:.2g} TFLOP/s" if rate else ""),
        "" if hosted else f"{100 * row['roofline']:.0f} %",
        ", ".join(f"{report.ratio_text(ratio)} {peer}" for peer, ratio in row["ratios"].items()),
        report.bytes_text(row["peak_bytes"]) if row["peak_bytes"] is not None else "",
    )


def family_table(family: str, found: list[Record]) -> str:
    """Every measured row of a family, a table for each record; losses included."""
    headers = ("op", "case", "dtype", "backend", "time", "rate", "roofline", "times faster than",
               "peak memory")  # fmt: skip
    parts = []
    for record in found:
        rows = [row for row in record.rows if row["family"] == family]
        if rows:
            lines = (
                (f"`{r['op']}`", r["case"], r["dtype"], r["backend"], *_times(r)) for r in rows
            )
            parts.append(f"{_where(record)}\n\n{_table(headers, lines)}")
    return "\n\n".join(parts) or NO_RECORD


def _filled(text: str, begin: str, end: str, table: str) -> str:
    """`text` with `table` between the two markers, which must stand in it in this order."""
    before, mark, rest = text.partition(begin)
    _, close, after = rest.partition(end)
    if not mark or not close:
        raise ValueError(f"no {begin} ... {end}")
    return f"{before}{begin}\n{table}\n{end}{after}"


def generated(root: Path, specs: Iterable[OpSpec] = SPECS) -> Iterator[tuple[Path, str]]:
    """Each page that has markers, and what should stand in it.

    Raises:
        ValueError: the README has no markers, a marker is open, or a record cannot be read.
    """
    found = records(root / "benchmarks" / "results")
    readme = root / "README.md"
    yield readme, _filled(readme.read_text(encoding="utf-8"), *_OPS, ops_table(found, specs))
    for page in sorted((root / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for family in _FAMILY_BEGIN.findall(text):
            if family not in METHODS:
                raise ValueError(f"{page.name}: no family {family}")
            begin = f"<!-- performance table: {family} -->"
            text = _filled(text, begin, _FAMILY_END, family_table(family, found))
        yield page, text


def main(argv: list[str] | None = None, root: Path | None = None) -> int:
    """Write the tables, or with --check list the pages whose tables are stale: exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m foveate.bench.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if one is stale")
    args = parser.parse_args(argv)
    root = checkout() if root is None else root
    if root is None:
        print("no source tree here", file=sys.stderr)
        return 2
    stale = [(p, text) for p, text in generated(root) if p.read_text(encoding="utf-8") != text]
    for page, text in stale:
        if args.check:
            print(f"{page.relative_to(root)} is stale: run python -m foveate.bench.tables")
        else:
            page.write_text(text, encoding="utf-8")
            print(f"wrote {page.relative_to(root)}")
    return 1 if stale and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
