"""The README keeps its promises, and every public function documents its contract."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import foveate

README = Path(__file__).parents[1] / "README.md"
FUNCTIONS = [name for name in foveate.__all__ if inspect.isfunction(getattr(foveate, name))]


def test_the_example_has_six_lines_and_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    lines = [line for line in example.splitlines() if line.strip()]
    assert len(lines) == 6
    exec(compile(example, str(README), "exec"), {})


@pytest.mark.parametrize(
    "command",
    ["pip install '.[bench]' && foveate bench --quick", "pip install -e '.[test]' && pytest"],
)
def test_the_two_commands_stand_in_it(command):
    assert f"\n{command}\n" in README.read_text()


def test_the_table_of_ops_has_its_place():
    text = README.read_text()
    assert 0 < text.index("<!-- ops table -->") < text.index("<!-- end ops table -->")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_document_their_contract(name):
    text = inspect.getdoc(getattr(foveate, name)) or ""
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in text, f"the docstring of foveate.{name} has no section {section}"
