"""Configuration files: YAML that is checked against a schema before anything else happens.

`options.py` says what may be in one, and to which argument of `onnxcomp.optimize` each value goes.
What a file leaves out comes from its preset, or keeps its default.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.kinds import Rules
from onnxcomp.passes.config.methods import method_names, split_methods
from onnxcomp.passes.config.options import TARGETS, OptimizeOptions
from onnxcomp.passes.config.presets import preset_options
from onnxcomp.passes.config.rules import Rule
from onnxcomp.passes.config.schema import file_options, schema
from onnxcomp.passes.config.settings import settings_from
from onnxcomp.passes.config.values import check_pattern
from onnxcomp.passes.config.yaml import Document, parse, validate

__all__ = ["checked_options", "config_options", "merged"]


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Options of several layers; later layers win.

    A later target replaces all earlier ones; a later limit of the error replaces equal bits.
    """
    result: dict[str, Any] = {}
    for layer in layers:
        if any(layer.get(name) is not None for name in TARGETS):
            result = {name: value for name, value in result.items() if name not in TARGETS}
        elif layer.get("max_error") is not None:
            result.pop("bits", None)
        result |= layer
    return result


def config_options(
    path: str | os.PathLike[str], *, preset: str | None = None, stock: bool = False
) -> dict[str, Any]:
    """Arguments of `onnxcomp.optimize` that a configuration file gives.

    Args:
        path: The file.
        preset: A preset that takes the place of the file's own.
        stock: Whether no operator library may be needed, whatever the file says.

    Raises:
        UsageError: The file cannot be read, is not YAML, or does not fit the schema; the message
            names the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the configuration {str(path)!r} cannot be read: {error}") from error
    document = parse(text, str(path))
    validate(document, schema())
    found = dict(_options(document, Path(path).resolve().parent))
    targets = [name for name in TARGETS if name in found]
    if len(targets) > 1:
        raise document.error(("target",), f"{' and '.join(targets)} are given together", _ONE)
    name = preset or document.value.get("preset")
    stock = stock or bool(found.get("stock"))
    return merged(preset_options(name, stock=stock) if name else {}, found)


def checked_options(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`config_options`, checked as far as that goes without a model.

    Raises:
        UsageError: The file is wrong, or a method, a size or an expression in it is.
    """
    options = config_options(path)
    settings = settings_from(OptimizeOptions(**options))
    for methods in (settings.method, *(rule.methods for rule in settings.rules)):
        if methods:
            method_names(methods, CODECS, stock=settings.stock)
    return options


_ONE = "choose one of them"

# Parts of a rule that are not settings.
_SELECTORS = ("match", "op", "keep")


def _options(document: Document, folder: Path) -> Iterator[tuple[str, Any]]:
    """Arguments of `onnxcomp.optimize` that a document gives."""
    for entry in file_options():
        value: Any = document.value
        for key in entry.path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            continue
        if isinstance(entry.kind, Rules):
            yield entry.name, tuple(_rules(document, value))
            continue
        try:
            entry.checked(value, entry.path[-1])
            yield entry.name, entry.kind.located(value, folder)
        except UsageError as error:
            raise document.error(entry.path, error.message, error.hint) from error


def _rules(document: Document, items: Sequence[Mapping[str, Any]]) -> Iterator[Rule]:
    for number, item in enumerate(items):
        where = ("rules", number)
        settings = {key: value for key, value in item.items() if key not in _SELECTORS}
        pattern, op = item.get("match", ""), item.get("op", "")
        if not pattern and not op:
            raise document.error(where, "a rule matches no weight", "add match: or op:")
        if item.get("keep") and settings:
            raise document.error(where, "a rule keeps weights and has other settings, too", _ONE)
        if not item.get("keep") and not settings:
            raise document.error(where, "a rule has no settings", "add method, mode or params")
        try:
            check_pattern(pattern)
        except UsageError as error:
            raise document.error((*where, "match"), error.message, error.hint) from error
        method = "dense" if item.get("keep") else settings.get("method", ())
        names = [method] if isinstance(method, str) else method
        methods = tuple(part for name in names for part in split_methods(name))
        yield Rule(pattern, methods, settings.get("mode"), settings.get("params", {}), op)
