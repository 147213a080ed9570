"""`python -m foveate`."""

from foveate.cli import run

run()
