"""A configuration file with every option in it, made from the table."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Iterator

from onnxcomp.passes.config.option import SECTIONS, Option, Options
from onnxcomp.passes.config.options import OptimizeOptions
from onnxcomp.passes.config.presets import PRESETS
from onnxcomp.passes.config.schema import file_options

__all__ = ["template_text"]

# The one that is not commented out, to start from.
_OPEN = "ratio"

_HEAD = (
    "Settings of `onnxcomp optimize --config FILE`. All are optional but the version. A line that "
    "starts with # and a setting shows its default, or an example: remove the # to set it. Options "
    "of the command line win over this file."
)


def template_text(table: type[Options] = OptimizeOptions) -> str:
    """A configuration file with every setting in it, explained and commented out."""
    *names, last = PRESETS
    preset = f"{', '.join(names)} or {last}; what is set below wins over the preset."
    lines = [*_comment(_HEAD), "version: 1", "", *_comment(preset), "#preset: balanced"]
    for name, entries in itertools.groupby(file_options(table), lambda entry: entry.section):
        section = SECTIONS[name]
        lines += ["", *_comment(section.text)]
        lines += [f"{section.group}:"] if section.group else []
        for entry in entries:
            lines += _setting(entry, "  " if section.group else "")
    return "\n".join(lines) + "\n"


def _setting(entry: Option, indent: str) -> Iterator[str]:
    yield from _comment(entry.help, indent)
    key = entry.path[-1]
    value = entry.example or json.dumps(entry.default)
    if entry.default and not isinstance(entry.default, bool):
        value = str(entry.default)
    mark = "" if entry.name == _OPEN else "#"
    first, *rest = f"{key}: {value}".split("\n")
    yield f"{indent}{mark}{first.rstrip()}"
    yield from (f"{indent}{mark}{line}" for line in rest)


def _comment(text: str, indent: str = "") -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(
        text, 100, initial_indent=start, subsequent_indent=start, break_on_hyphens=False
    )
