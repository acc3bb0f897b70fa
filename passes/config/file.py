"""Configuration files: YAML that is checked against a schema before anything else happens.

`schema.json` beside this file says what may be in one, and to which argument of
`onnxcomp.optimize` each value goes. What a file does not say comes from its preset, or
stays unsaid.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.presets import preset_options
from onnxcomp.passes.config.settings import (
    Rule,
    Settings,
    given_settings,
    method_names,
    split_methods,
)
from onnxcomp.passes.config.yaml import Document, parse, validate

__all__ = [
    "TARGETS",
    "checked_options",
    "config_options",
    "merged",
    "schema",
    "schema_text",
    "template_text",
]

_FOLDER = Path(__file__).parent

# Ways to say how small the output is to be: one of them replaces another.
TARGETS = ("bits", "ratio", "target_size")


def schema_text() -> str:
    """The JSON Schema of a configuration file."""
    return (_FOLDER / "schema.json").read_text(encoding="utf-8")


@functools.cache
def schema() -> dict[str, Any]:
    """The JSON Schema of a configuration file, read."""
    document: dict[str, Any] = json.loads(schema_text())
    return document


def template_text() -> str:
    """A configuration file with every setting in it, commented."""
    return (_FOLDER / "template.yaml").read_text(encoding="utf-8")


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Options of several layers, later ones first.

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
        UsageError: The file cannot be read, is no YAML, or does not fit the schema; the message
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
    fields = {field.name for field in dataclasses.fields(Settings)} | {"set_"}
    loose: dict[str, Any] = dict.fromkeys(["include", "exclude", "set_"], ())
    loose |= {"method": "auto", "target_size": None, "min_size": 0}
    settings = given_settings(**loose | {k: v for k, v in options.items() if k in fields})
    for methods in (settings.method, *(rule.methods for rule in settings.rules)):
        if methods:
            method_names(methods, CODECS, stock=settings.stock)
    return options


_ONE = "choose one of them"

# Parts of a rule that are no settings.
_SELECTORS = ("match", "op", "keep")


def _options(document: Document, folder: Path) -> Iterator[tuple[str, Any]]:
    for option, path, value in _values(document.value, schema()["properties"]):
        if option == "set_":
            yield option, tuple(_rules(document, value))
        elif option == "data":
            yield option, _paths(document, path, value, folder)
        elif option in ("cache", "evaluate"):
            yield option, str(folder / value)
        else:
            yield option, tuple(value) if isinstance(value, list) else value


def _values(
    values: Mapping[str, Any], properties: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, tuple[str, ...], Any]]:
    """Option, path in the document and value of everything that has an option."""
    for key, value in values.items():
        rules, here = properties[key], (*path, key)
        if "x-option" in rules:
            yield rules["x-option"], here, value
        elif isinstance(value, Mapping):
            yield from _values(value, rules["properties"], here)


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
            re.compile(pattern)
        except re.error as error:
            message = f"{pattern!r} is not a regular expression: {error}"
            raise document.error((*where, "match"), message, "write a dot as \\.") from error
        method = "dense" if item.get("keep") else settings.get("method", ())
        names = [method] if isinstance(method, str) else method
        methods = tuple(part for name in names for part in split_methods(name))
        yield Rule(pattern, methods, settings.get("mode"), settings.get("params", {}), op)


def _paths(
    document: Document, where: tuple[str, ...], value: str | Sequence[str], folder: Path
) -> tuple[str, ...]:
    """Paths relative to the folder of the file, patterns expanded; ``name=`` stays in front."""
    found: list[str] = []
    for item in [value] if isinstance(value, str) else value:
        name, sign, rest = item.rpartition("=")
        pattern = str(folder / rest)
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not matches:
            raise document.error(where, f"no file matches {item!r}", "paths start at this file")
        found += [f"{name}{sign}{match}" for match in matches]
    return tuple(found)
