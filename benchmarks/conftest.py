"""The flag of bench_ops.py."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rows",
        choices=("quick", "all"),
        default="quick",
        help="the rows of `foveate bench --quick`, or all of them",
    )
