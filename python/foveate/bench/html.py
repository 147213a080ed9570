"""Rows as one self-contained page: a table and plots, nothing loaded from elsewhere."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from foveate.bench.report import bytes_text, ratio_text, time_text
from foveate.bench.rows import HOST, Row

_COLOURS = ("#3b6ea8", "#c8553d", "#6a994e", "#8d6a9f", "#d9a441", "#4f9da6", "#7a7a7a")


def _svg(figure: Any) -> str:
    """The figure as inline SVG, without the prolog and metadata that name outside addresses."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    body = text.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", body[body.index("<svg") :], flags=re.DOTALL)


def _label(row: Row) -> str:
    return f"{row.op} [{row.backend}], {row.case}"


def _ratios(rows: list[Row]) -> str:
    """One mark a peer, on a line a row; right of 1 the kernel is faster."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.42 * len(rows)))
    axes = figure.add_subplot()
    peers = list(dict.fromkeys(name for row in rows for name in row.ratios))
    for index, peer in enumerate(peers):
        points = [(row.ratios[peer], y) for y, row in enumerate(rows) if peer in row.ratios]
        axes.scatter(
            *zip(*points, strict=True),
            label=peer,
            color=_COLOURS[index % len(_COLOURS)],
            marker="os^Dvp*"[index // len(_COLOURS) % 7],
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times faster than the peer")
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small", frameon=False)
    return _svg(figure)


def _rooflines(rows: list[Row]) -> str:
    """How much of the measured ceiling each row reaches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.32 * len(rows)))
    axes = figure.add_subplot()
    axes.barh(range(len(rows)), [100 * (row.roofline or 0) for row in rows], color=_COLOURS[0])
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlabel("% of the ceiling measured in the same run")
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    return _svg(figure)


def _spread(rows: list[Row]) -> str:
    """The raw samples of each row over their median."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.32 * len(rows)))
    axes = figure.add_subplot()
    for y, row in enumerate(rows):
        middle = row.time_us or 1.0
        axes.scatter(
            [sample / middle for sample in row.samples_us],
            [y] * len(row.samples_us),
            s=10,
            alpha=0.4,
            color=_COLOURS[1],
        )
    axes.set_xlabel("sample / median")
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    return _svg(figure)


def write_page(folder: Path, environment: dict[str, Any], rows: list[Row]) -> Path:
    """`folder/index.html` with the environment, the rows and their plots; the folder is made."""
    import jinja2
    import matplotlib

    timed = [row for row in rows if row.time_us is not None and not row.case.endswith(HOST)]
    loader = jinja2.PackageLoader("foveate.bench", "templates")
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("report.html")
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9}):
        plots = [
            (title, draw(timed))
            for title, draw in (
                ("Against the peers", _ratios),
                ("Against the ceiling", _rooflines),
                ("Spread of the samples", _spread),
            )
            if timed
        ]
    page = template.render(
        environment={key: value for key, value in environment.items() if key != "sources"},
        rows=rows,
        plots=plots,
        time_text=time_text,
        ratio_text=ratio_text,
        bytes_text=bytes_text,
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path
