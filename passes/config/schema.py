"""The JSON Schema of configuration files, made from the table of options."""

from __future__ import annotations

import json
from typing import Any

from onnxcomp.passes.config.option import SECTIONS, Option, Options, options_of
from onnxcomp.passes.config.options import OptimizeOptions
from onnxcomp.passes.config.presets import PRESETS

__all__ = ["file_options", "schema", "schema_text"]


def file_options(table: type[Options] = OptimizeOptions) -> list[Option]:
    """The options that may be in a file, in the order of their sections."""
    entries = [entry for entry in options_of(table) if entry.in_file]
    return sorted(entries, key=lambda entry: list(SECTIONS).index(entry.section))


def schema(table: type[Options] = OptimizeOptions) -> dict[str, Any]:
    """The JSON Schema of a configuration file."""
    properties: dict[str, Any] = {
        "version": {"description": "Version of this format.", "enum": [1]},
        "preset": {
            "description": "A set of settings; those given here win over it.",
            "enum": list(PRESETS),
        },
    }
    for entry in file_options(table):
        section = SECTIONS[entry.section]
        inside = properties
        if section.group:
            # A group whose settings are all commented out is null.
            group = {
                "description": section.text,
                "type": ["object", "null"],
                "additionalProperties": False,
                "properties": {},
            }
            inside = properties.setdefault(section.group, group)["properties"]
        inside[entry.path[-1]] = _described(entry)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://onnxcomp.invalid/config.schema.json",
        "title": "Configuration of onnxcomp optimize",
        "description": "What `onnxcomp optimize --config FILE` reads. `x-option` names the "
        "argument of `onnxcomp.optimize`.",
        "type": "object",
        "required": ["version"],
        "additionalProperties": False,
        "properties": properties,
    }


def schema_text(table: type[Options] = OptimizeOptions) -> str:
    """The JSON Schema of a configuration file, as text."""
    return json.dumps(schema(table), indent=2, ensure_ascii=False) + "\n"


def _described(entry: Option) -> dict[str, Any]:
    default = list(entry.default) if isinstance(entry.default, tuple) else entry.default
    known = {} if default is None else {"default": default}
    return {"description": entry.help, **entry.kind.schema(), **known, "x-option": entry.name}
