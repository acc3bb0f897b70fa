"""YAML with line numbers, and the part of JSON Schema that configuration files need."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import yaml

from onnxcomp.errors import UsageError
from onnxcomp.passes.suggest import suggest

__all__ = ["Document", "parse", "validate"]

Path = tuple[str | int, ...]

_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_WORDS = {
    "object": "a mapping",
    "array": "a list",
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "nothing",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A YAML document.

    Attributes:
        name: Of its file.
        value: What it says, in plain values.
        lines: Line of each value, counted from 1, by its path.
    """

    name: str
    value: dict[str, Any]
    lines: Mapping[Path, int]

    def error(self, path: Path, message: str, hint: str) -> UsageError:
        """An error about one value, with its line."""
        while path and path not in self.lines:
            path = path[:-1]
        return UsageError(f"{self.name}, line {self.lines.get(path, 1)}: {message}", hint=hint)


def parse(text: str, name: str) -> Document:
    """Read a document whose top is a mapping.

    Raises:
        UsageError: It is not YAML, has a key twice, or is not a mapping.
    """
    lines: dict[Path, int] = {}
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            hint = "onnxcomp config init writes one to start from"
            raise UsageError(f"{name} is not a mapping of settings", hint=hint)
        _note_lines(node, (), lines, name)
        value = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = 1 + (error.problem_mark.line if error.problem_mark else 0)
        raise UsageError(
            f"{name}, line {line}: {error.problem or 'this is not YAML'}",
            hint="check indentation, brackets and quotes",
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not YAML: {error}", hint="check its characters") from error
    finally:
        loader.dispose()
    return Document(name, value, lines)


def _note_lines(node: yaml.Node, path: Path, lines: dict[Path, int], name: str) -> None:
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _note_lines(item, (*path, number), lines, name)
    elif isinstance(node, yaml.MappingNode):
        for key, item in node.value:
            line = key.start_mark.line + 1
            here = (*path, str(key.value))
            if here in lines:
                raise UsageError(
                    f"{name}, line {line}: {key.value!r} is given twice", hint="remove one"
                )
            lines[here] = line
            _note_lines(item, here, lines, name)


def validate(document: Document, schema: Mapping[str, Any]) -> None:
    """Check a document against a schema.

    Raises:
        UsageError: The first thing that is wrong, with its line.
    """
    _check(document, document.value, schema, ())


def _check(document: Document, value: Any, schema: Mapping[str, Any], path: Path) -> None:
    name = str(path[-1]) if path else "the file"
    if "enum" in schema and not any(value is item or _same(value, item) for item in schema["enum"]):
        known = [str(item) for item in schema["enum"]]
        hint = suggest(str(value), known)
        raise document.error(path, f"{name} cannot be {_shown(value)}", hint)
    if "type" in schema:
        _check_type(document, value, schema, path)
    if isinstance(value, dict):
        _check_mapping(document, value, schema, path)
    elif isinstance(value, list):
        if len(value) < schema.get("minItems", 0):
            raise document.error(path, f"{name} is empty", "name at least one")
        for number, item in enumerate(value):
            _check(document, item, schema.get("items", {}), (*path, number))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _check_range(document, value, schema, path)


def _same(value: Any, item: Any) -> bool:
    return type(value) is type(item) and bool(value == item)


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _check_type(document: Document, value: Any, schema: Mapping[str, Any], path: Path) -> None:
    wanted = schema["type"]
    names = [wanted] if isinstance(wanted, str) else wanted
    kinds = tuple(kind for name in names for kind in _TYPES[name])
    if isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)):
        return
    name = str(path[-1]) if path else "the file"
    words = " or ".join(_WORDS[name] for name in names)
    raise document.error(path, f"{name} is {_shown(value)}", f"it must be {words}")


def _check_mapping(
    document: Document, value: dict[Any, Any], schema: Mapping[str, Any], path: Path
) -> None:
    properties = schema.get("properties", {})
    others = schema.get("additionalProperties", True)
    for key, item in value.items():
        if key in properties:
            _check(document, item, properties[key], (*path, key))
        elif others is False:
            where = f" in {path[-1]}" if path and isinstance(path[-1], str) else ""
            hint = suggest(str(key), properties)
            raise document.error((*path, str(key)), f"unknown setting {str(key)!r}{where}", hint)
        elif isinstance(others, Mapping):
            _check(document, item, others, (*path, str(key)))
    for key in schema.get("required", ()):
        if key not in value:
            raise document.error(path, f"{key!r} is missing", f"add {key}:")


def _check_range(document: Document, value: float, schema: Mapping[str, Any], path: Path) -> None:
    least, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    if least is not None and not value >= least:
        raise document.error(path, f"{path[-1]} is {value}", f"it must be at least {least}")
    if above is not None and not value > above:
        raise document.error(path, f"{path[-1]} is {value}", f"it must be more than {above}")
    below = schema.get("exclusiveMaximum")
    if below is not None and not value < below:
        raise document.error(path, f"{path[-1]} is {value}", f"it must be less than {below}")
