"""The option tables of cli.md, made from the options that the commands have.

Run ``python docs/option_tables.py --write`` after a change of `passes/config/options.py`; without
``--write`` it says whether the page is up to date. A table stands between the comments
``<!-- options: COMMAND SECTION -->`` and ``<!-- end of options -->``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from onnxcomp.cli import main
from onnxcomp.cli.options import SectionedOption
from onnxcomp.passes.config.presets import PRESETS

PAGE = Path(__file__).with_name("cli.md")
PLACE = re.compile(r"(<!-- options: (\w+) (\w+) -->\n).*?(<!-- end of options -->)", re.DOTALL)


def up_to_date(text: str) -> str:
    """The page with its tables written anew."""
    return PLACE.sub(lambda match: match[1] + table(match[2], match[3]) + match[4], text)


def table(command: str, section: str) -> str:
    """The options of a section of a command, as a table in Markdown; or what presets mean."""
    if section == "presets":
        rows = [(f"`{name}`", preset.meaning, preset.measured) for name, preset in PRESETS.items()]
        lines = ["| preset | | measured |", "|---|---|---|"]
        return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)]) + "\n"
    context = click.Context(main)
    found = main.get_command(context, command)
    assert found is not None, command
    options = [
        option
        for option in found.params
        if isinstance(option, SectionedOption) and option.section == section
    ]
    assert options, f"{command} has no section {section}"
    lines = ["| option | |", "|---|---|", *(row(option) for option in options)]
    return "\n".join(lines) + "\n"


def row(option: SectionedOption) -> str:
    """One option: its spellings, a value, and what it does."""
    *others, last = option.opts
    names = [*others, " ".join(filter(None, [last, value(option)])), *option.secondary_opts]
    known = f"One of {', '.join(f'`{word}`' for word in option.words)}." if option.words else ""
    text = " ".join(filter(None, [option.manual or option.help, option.details, known]))
    return " | ".join([f"| {', '.join(f'`{name}`' for name in names)}", escaped(text)]) + " |"


def value(option: SectionedOption) -> str:
    """A value to show: the default, an example, or what stands for one."""
    if option.is_flag:
        return ""
    if option.show_default and option.default:
        return str(option.default[0] if isinstance(option.default, tuple) else option.default)
    example = "" if any(sign in option.example for sign in "\n{*") else option.example
    return example or escaped(option.metavar or "")


def escaped(text: str) -> str:
    """Text for a cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    before = PAGE.read_text(encoding="utf-8")
    after = up_to_date(before)
    if "--write" in sys.argv:
        PAGE.write_text(after, encoding="utf-8")
    elif after != before:
        sys.exit("cli.md is out of date: run python docs/option_tables.py --write")
