"""`foveate bench`: measure the ops of the registry on real inputs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.bench.roofline import Ceilings
    from foveate.bench.rows import Row, Task

HELP = "Check and time the ops on real inputs, against their peers and this machine's ceilings."

_BACKENDS = ("cuda", "triton", "cpu", "reference")
_QUICK_SECONDS = 1.2  # of samples a row
_FULL_SECONDS = 6.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
    parser.add_argument(
        "--quick", action="store_true", help="one or two rows an op, in about two minutes"
    )
    parser.add_argument(
        "--ops", metavar="GLOB", default="*", help="ops whose name or family matches"
    )
    parser.add_argument("--backend", choices=_BACKENDS, help="this backend alone")
    parser.add_argument("--json", metavar="FILE", help="write one JSON object a line to FILE")
    parser.add_argument("--html", metavar="DIR", help="write a page with plots to DIR/index.html")
    parser.add_argument(
        "--evidence",
        action="store_true",
        help="list the GPU kernels that no record in benchmarks/results speaks for, and stop",
    )


def run(args: argparse.Namespace) -> int:
    """0: every row that ran is ok; 1: one is INVALID or nothing ran; 2: bad usage."""
    try:
        import rich  # noqa: F401
    except ImportError:
        print("foveate bench needs rich: pip install 'foveate[bench]'", file=sys.stderr)
        return 1
    from foveate.bench import rows
    from foveate.testing import SPECS

    specs = rows.matching(args.ops)
    if not specs:
        families = sorted({spec.family for spec in SPECS})
        print(
            f"--ops: nothing matches {args.ops!r}\n"
            f"families: {', '.join(families)}\n"
            f"ops: {', '.join(spec.name for spec in SPECS)}",
            file=sys.stderr,
        )
        return 2
    if args.evidence:
        return _evidence(specs)
    for flag, path in (("--json", args.json), ("--html", args.html)):
        if path is not None and not Path(path).resolve().parent.is_dir():
            print(f"{flag}: no directory {Path(path).resolve().parent}", file=sys.stderr)
            return 2
    found = rows.tasks(specs, quick=args.quick, backend=args.backend)
    if args.json is None:
        return _bench(found, args, None)
    try:
        file = open(args.json, "w", encoding="utf-8")  # noqa: SIM115  # closed below
    except OSError as error:
        print(f"--json: {error}", file=sys.stderr)
        return 2
    with file:
        return _bench(found, args, file)


def _evidence(specs: tuple[Any, ...]) -> int:
    """The standing of every GPU kernel; 1 if one has no passing record of its source."""
    from rich.console import Console
    from rich.table import Table

    from foveate.bench.evidence import results_folder, standings

    try:
        found = standings(results_folder(), specs)
    except (ValueError, KeyError) as error:
        print(f"--evidence: a record cannot be read: {error}", file=sys.stderr)
        return 1
    table = Table(title=f"GPU kernels and the records in {results_folder()}")
    for header in ("op", "backend", "record"):
        table.add_column(header)
    for kernel in found:
        style = None if kernel.current else "yellow"
        table.add_row(kernel.op, kernel.backend, kernel.text, style=style)
    _console().print(table)
    missing = sum(not kernel.current for kernel in found)
    Console().print(f"{missing} of {len(found)} GPU kernels have no passing record of their source")
    return 1 if missing else 0


def _console() -> Any:
    """Standard output; wide where it is not a terminal, so that files keep whole cells."""
    from rich.console import Console

    from foveate.bench.report import WIDTH

    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _ceilings(found: list[Task]) -> dict[str, Ceilings]:
    from foveate.bench import roofline, rows

    return {device: roofline.measure(device) for device in rows.devices(found)}


def _bench(found: list[Task], args: argparse.Namespace, file: IO[str] | None) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from foveate.bench import report, rows
    from foveate.bench.environment import environment

    out, err = _console(), Console(stderr=True)
    done: list[Row] = []
    skipped: dict[tuple[str, str], list[str]] = {}
    remarks: list[str] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        bar = progress.add_task("ceilings", total=len(found))
        ceilings = _ceilings(found)
        record = environment(ceilings)
        if file is not None:
            report.write_line(file, record)
        for task in found:
            name = f"{task.spec.name}, {task.bench.id}"
            progress.update(bar, description=f"{name} [{task.backend}]")
            measured, notes = rows.measure(
                task,
                ceilings.get(rows.device_of(task.backend)),
                seconds=_QUICK_SECONDS if args.quick else _FULL_SECONDS,
                compile_too=not args.quick,
            )
            done += measured
            if notes.skipped:
                skipped.setdefault((task.backend, notes.skipped), []).append(name)
            if notes.wrong:
                remarks.append(f"INVALID {name} [{task.backend}]: {notes.wrong}")
            remarks += [f"{name} [{task.backend}]: no {p}: {w}" for p, w in notes.peers.items()]
            if file is not None:
                for row in measured:
                    report.write_line(file, row._asdict())
            progress.advance(bar)
    if done:
        out.print(report.table(done))
        for device, ceiling in ceilings.items():
            out.print(f"{device}: {report.ceilings_text(ceiling)}", highlight=False)
    for (backend, reason), names in skipped.items():
        out.print(f"skipped [{backend}]: {reason}: {'; '.join(names)}", markup=False)
    for remark in remarks:
        out.print(remark, markup=False)
    if args.html is not None:
        from foveate.bench.html import write_page

        err.print(f"wrote {write_page(Path(args.html), record, done)}", markup=False)
    if not done:
        err.print("nothing ran", markup=False)
        return 1
    return 1 if any(row.verdict != "ok" for row in done) else 0
