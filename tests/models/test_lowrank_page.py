"""The program in docs/lowrank.md runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "lowrank.md"


def test_the_recipe_of_the_page_runs() -> None:
    pytest.importorskip("torch")
    [program] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)
    names: dict[str, object] = {}
    exec(compile(program, str(PAGE), "exec"), names)
    model: object = names["model"]
    assert [type(layer).__name__ for layer in model] == ["Linear", "ReLU", "Linear"]  # type: ignore[attr-defined]
