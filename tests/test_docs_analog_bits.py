"""The page of analog bits: its examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[1] / "docs" / "analog_bits.md"


def test_the_examples_of_the_page_run():
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        torch.manual_seed(0)
        names: dict[str, object] = {}
        exec(compile(example, str(PAGE), "exec"), names)
        assert torch.isfinite(names["loss"])
        assert len([line for line in example.splitlines() if "import" not in line and line]) <= 6
    assert names["ids"].shape == (8, 16, 16)
    assert names["ids"].max() <= 10
