"""An extension of griffe: functions that take a table of options are read as they are at run time.

Their signatures and docstrings are made from `passes/config/options.py` when the module is
imported; their source names one parameter that stands for all options.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import griffe

# Decorators of `onnxcomp.passes.config.signature`.
_MARKS = ("takes(", "takes_output(")


class TableOptions(griffe.Extension):
    """Shows the options of `optimize` and its like."""

    def on_function_instance(self, *, func: griffe.Function, **more: Any) -> None:
        """Take signature and docstring from the imported function."""
        if not any(str(one.value).startswith(_MARKS) for one in func.decorators):
            return
        made = getattr(importlib.import_module(func.module.path), func.name)
        func.decorators = []
        func.parameters = griffe.Parameters(*map(_parameter, _parameters(made)))
        func.docstring = griffe.Docstring(inspect.getdoc(made) or "", parent=func, parser="google")


def _parameters(function: Any) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _parameter(found: inspect.Parameter) -> griffe.Parameter:
    empty = inspect.Parameter.empty
    kinds = {
        inspect.Parameter.KEYWORD_ONLY: griffe.ParameterKind.keyword_only,
        inspect.Parameter.POSITIONAL_OR_KEYWORD: griffe.ParameterKind.positional_or_keyword,
    }
    return griffe.Parameter(
        found.name,
        kind=kinds[found.kind],
        annotation=None if found.annotation is empty else str(found.annotation),
        default=None if found.default is empty else repr(found.default),
    )
