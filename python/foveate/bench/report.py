"""Rows as a table on the terminal, and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any

from foveate.bench.peers import COMPILED, REFERENCE
from foveate.bench.roofline import Ceilings
from foveate.bench.rows import HOST, Row

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 160  # columns where the output is not a terminal


def write_line(file: IO[str], record: dict[str, Any]) -> None:
    """One JSON object on a line, on disk before the next row is measured."""
    file.write(json.dumps(record, allow_nan=False) + "\n")
    file.flush()


def time_text(us: float) -> str:
    """A time with three digits and its unit."""
    for unit, size in (("us", 1.0), ("ms", 1e3)):
        if us < 1e3 * size:
            return f"{us / size:.3g} {unit}"
    return f"{us / 1e6:.3g} s"


def bytes_text(count: int) -> str:
    """A size in MiB, or in KiB below one."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


def ratio_text(ratio: float) -> str:
    """Times faster, three digits at most: 0.94x, 12.3x, 240x."""
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.3g}x"


def best_named_peer(ratios: dict[str, float]) -> tuple[str, float] | None:
    """The fastest of the peers that a row names: the smallest ratio."""
    named = {n: r for n, r in ratios.items() if n not in (REFERENCE, COMPILED)}
    return min(named.items(), key=lambda item: item[1]) if named else None


def ceilings_text(ceilings: Ceilings) -> str:
    """The measured ceilings in a sentence."""
    bf16 = ceilings.bf16_tflop_per_s
    half = "" if bf16 is None else f", bf16 GEMM {bf16:.0f} TFLOP/s"
    return (
        f"measured ceilings: copy {ceilings.copy_gb_per_s:.1f} GB/s, "
        f"fp32 GEMM {ceilings.fp32_tflop_per_s:.3g} TFLOP/s{half}"
    )


def _rate(row: Row) -> str:
    if row.gb_per_s is None or row.tflop_per_s is None or row.case.endswith(HOST):
        return ""
    if row.tflop_per_s == 0:
        return f"{row.gb_per_s:.1f} GB/s"
    return f"{row.gb_per_s:.1f} GB/s\n{row.tflop_per_s:.3g} TFLOP/s"


def cells(row: Row) -> list[str]:
    """The columns of `table` for one row; an INVALID row has no times."""
    return [
        row.op,
        row.case,
        row.dtype,
        row.backend,
        row.verdict if row.time_us is None else time_text(row.time_us),
        _rate(row),
        f"{100 * row.roofline:.0f} %" if row.roofline is not None else "",
        "\n".join(f"{ratio_text(ratio)} {name}" for name, ratio in row.ratios.items()),
        bytes_text(row.peak_bytes) if row.peak_bytes is not None else "",
        f"{row.error:.2g} / {row.budget:.2g}" if row.error is not None else "not finite",
        row.verdict,
    ]


def table(rows: Iterable[Row]) -> Table:
    """Every row, with how many times faster it is than each peer."""
    from rich.table import Table

    made = Table(
        title="foveate bench (ratios: median of pairs measured in turn, below 1x is a loss)"
    )
    for header, justify in (
        ("op", "left"),
        ("case", "left"),
        ("dtype", "left"),
        ("backend", "left"),
        ("time", "right"),
        ("rate", "right"),
        ("roofline", "right"),
        ("times faster than", "left"),
        ("peak memory", "right"),
        ("error / budget", "right"),
        ("verdict", "left"),
    ):
        made.add_column(header, justify=justify)  # type: ignore[arg-type]
    family = None
    for row in rows:
        if family not in (None, row.family):
            made.add_section()
        family = row.family
        style = None if row.verdict == "ok" else "bold red"
        made.add_row(*cells(row), style=style)
    return made
