"""The command line: `foveate COMMAND`, also `python -m foveate COMMAND`.

A command is a module with HELP, `configure(parser)` and `run(args) -> exit code`. It imports what
it needs in `run`, so that `foveate --help` is quick and works in a broken installation.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

import foveate

_COMMANDS: dict[str, str] = {
    "bench": "foveate.bench.command",
    "doctor": "foveate.doctor",
    "maskcut": "foveate.methods.maskcut_command",
    "rosetta": "foveate.methods.rosetta_command",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="foveate",
        description="The fused, exact cores of ICCV 2023's vision methods.",
    )
    parser.add_argument("--version", action="version", version=f"foveate {foveate.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, path in _COMMANDS.items():
        module = importlib.import_module(path)
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.configure(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 success, 1 failure of the work, 2 bad usage."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help (0) or the usage error (2)
        return int(stop.code or 0)
    code: int = args.run(args)
    return code


def run() -> None:
    """Entry point of the installed script."""
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)
