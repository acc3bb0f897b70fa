"""The user's own measure of a model: ``script.py:function``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from onnxcomp.errors import UsageError

__all__ = ["Evaluation", "Score", "load_function"]

# Gets a function that opens sessions of the model, and returns how good it is; higher is better.
Score = Callable[[Callable[..., Any]], float]


def load_function(text: str) -> Score:
    """The function that ``script.py:function`` names; its folder can be imported from.

    Raises:
        UsageError: The file or the function is not there, or the file cannot be executed.
    """
    name, colon, function = text.rpartition(":")
    path = Path(name)
    if not colon or not function.isidentifier():
        raise UsageError(f"{text!r} does not name a function", hint="for example mine.py:accuracy")
    if not path.is_file():
        raise UsageError(f"there is no file {name!r}", hint="name a Python file")
    spec = importlib.util.spec_from_file_location(f"onnxcomp_evaluation_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{name} cannot be executed: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(folder)
    found = getattr(module, function, None)
    if not callable(found):
        raise UsageError(f"{name} has no function {function!r}", hint="check its spelling")
    return found  # type: ignore[no-any-return]


@dataclasses.dataclass(slots=True)
class Evaluation:
    """A score and how far it may drop.

    Attributes:
        score: Measures a model.
        max_drop: Largest accepted difference of the dense model's score to the compressed one's.
        dense: Score of the dense model, once it is known.
        compressed: Score of the compressed model.
    """

    score: Score
    max_drop: float
    dense: float | None = None
    compressed: float | None = None

    def run(self, reference: str | os.PathLike[str], compressed: Path) -> bool:
        """Measure, the dense model on the first call only, and judge.

        Raises:
            UsageError: The function fails, or returns no finite number.
        """
        if self.dense is None:
            self.dense = self._measured(reference)
        self.compressed = self._measured(compressed)
        return self.passed

    def _measured(self, path: str | os.PathLike[str]) -> float:
        from onnxcomp.runtime.session import open_session

        try:
            value = float(self.score(functools.partial(open_session, path)))
        except Exception as error:
            text = f"the evaluation failed on {os.fspath(path)}: {type(error).__name__}: {error}"
            raise UsageError(
                text, hint="it gets a function that opens a session, and returns a number"
            ) from error
        if not math.isfinite(value):
            raise UsageError(f"the score of {os.fspath(path)} is {value}")
        return value

    @property
    def passed(self) -> bool:
        """Whether the score has not dropped too far."""
        if self.dense is None or self.compressed is None:
            return False
        return self.dense - self.compressed <= self.max_drop

    def to_json(self) -> dict[str, Any]:
        """Both scores and the verdict."""
        return {
            "dense": self.dense,
            "compressed": self.compressed,
            "max_drop": self.max_drop,
            "passed": self.passed,
        }
