"""Options of commands, made from the table that the compiler itself reads."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from onnxcomp.errors import UsageError
from onnxcomp.passes.config.kinds import Choice, File, Flag, PlanFile
from onnxcomp.passes.config.option import SECTIONS, Option, Options, options_of
from onnxcomp.passes.config.options import OptimizeOptions
from onnxcomp.passes.config.presets import PRESETS

__all__ = [
    "FILE",
    "OUTPUT",
    "SectionedCommand",
    "SectionedOption",
    "input_options",
    "option_of",
    "settings_in_effect",
    "table_options",
]

F = TypeVar("F", bound=Callable[..., Any])

# Whether a file exists is for the library to say: its error has the exit code of a bad model.
FILE = click.Path(path_type=Path)


class OutputFile(click.Path):
    """A file to write: a regular one, or none yet, in a folder that exists."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path; a pipe, a socket, a device, or a link to one, would be waited for for ever."""
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        try:
            regular = stat.S_ISREG(path.stat().st_mode)
        except FileNotFoundError:
            if not path.parent.is_dir():
                message = f"the folder {str(path.parent)!r} does not exist"
                raise UsageError(message, hint="create it first") from None
            return path
        except OSError as error:
            message = f"the output {str(path)!r} cannot be written: {error.strerror}"
            raise UsageError(message, hint="give another place") from error
        if not regular:
            message = f"the output {str(path)!r} is no regular file but a pipe or a device"
            raise UsageError(message, hint="give the path of a file")
        return path


OUTPUT = OutputFile(path_type=Path, dir_okay=False)


class SectionedOption(click.Option):
    """An option that knows its place in help and manual.

    Attributes:
        section: A key of `SECTIONS`.
        details: More sentences, for the manual.
        example: A value, for the manual.
        words: All values, where there are few.
        manual: What the manual says instead of the help.
    """

    def __init__(
        self,
        *args: Any,
        section: str,
        details: str = "",
        example: str = "",
        words: Sequence[str] = (),
        manual: str = "",
        **more: Any,
    ) -> None:
        super().__init__(*args, **more)
        self.words = words
        self.manual = manual
        self.section = section
        self.details = details
        self.example = example


class SectionedCommand(click.Command):
    """A command whose help has its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections in their order; options that belong to none come last."""
        rows: dict[str, list[tuple[str, str]]] = {name: [] for name in (*SECTIONS, "")}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                rows[getattr(parameter, "section", "")].append(record)
        for name, records in rows.items():
            if records:
                with formatter.section(SECTIONS[name].title if name else "Other options"):
                    formatter.write_dl(records)


def _made(entry: Option, **changes: Any) -> Callable[[F], F]:
    """One option of the table as an option of click; `changes` are further arguments."""
    spelling = entry.spelling
    names = [entry.name, *(name for name in spelling if name.startswith("-"))]
    settings: dict[str, Any] = {
        "cls": SectionedOption,
        "section": entry.section,
        "details": entry.details,
        "example": entry.example,
        "help": entry.help,
        "default": entry.default,
    }
    if isinstance(entry.kind, Flag):
        if not any("/" in name for name in names):
            settings["is_flag"] = True
        return click.option(*names, **settings | changes)
    settings |= _typed(entry, names[-1])
    settings["show_default"] = entry.default not in (None, ())
    settings["multiple"] = entry.kind.repeats
    if entry.kind.repeats:
        default = entry.default or ()
        settings["default"] = (default,) if isinstance(default, str) else default
    return click.option(*names, **settings | changes)


def _typed(entry: Option, flag: str) -> dict[str, Any]:
    """How click reads a value: as the table does, with its messages and hints."""
    kind = entry.kind
    if isinstance(kind, File | PlanFile):
        folder = isinstance(kind, File) and kind.folder
        place = click.Path(path_type=Path, file_okay=not folder)
        return {"type": place, "metavar": kind.metavar}

    def value(text: Any) -> Any:
        return kind.read(text, flag) if isinstance(text, str) else text

    if not isinstance(kind, Choice):
        return {"type": value, "metavar": kind.metavar}
    words = kind.known

    def complete(_: click.Context, __: click.Parameter, start: str) -> list[str]:
        return [word for word in words if word.startswith(start)]

    return {
        "type": value,
        "metavar": f"[{'|'.join(words)}]",
        "shell_complete": complete,
        "words": words,
    }


def table_options(table: type[Options]) -> Callable[[F], F]:
    """Preset, configuration file, and all options of a table."""

    def given(function: F) -> F:
        for entry in reversed([entry for entry in options_of(table) if entry.on_cli]):
            function = _made(entry)(function)
        return _PRESET(_CONFIG(function))

    return given


def option_of(name: str, **changes: Any) -> Callable[[F], F]:
    """One option of the table, for a command that means something like it.

    Args:
        name: Of the argument in Python.
        changes: Arguments of `click.option` that differ, such as `help`.
    """
    (entry,) = (entry for entry in options_of(OptimizeOptions) if entry.name == name)
    return _made(entry, **changes)


def input_options(function: F) -> F:
    """Options that say what a model is run on."""
    for name in ("shapes", "data"):
        function = option_of(name)(function)
    return function


_PRESET = click.option(
    "--preset",
    cls=SectionedOption,
    section="source",
    metavar="NAME",
    type=click.Choice(list(PRESETS)),
    manual="Settings with a name, see below; other options win.",
    help="Settings with a name; other options win. In brackets: times smaller, and inputs with "
    "another result, of models without --data. "
    + " ".join(
        f"{name.capitalize()}: {preset.meaning}{preset.measured and f' ({preset.measured})'}."
        for name, preset in PRESETS.items()
    ),
)
_CONFIG = click.option(
    "--config",
    cls=SectionedOption,
    section="source",
    type=FILE,
    metavar="FILE.yaml",
    help="Settings from a YAML file; other options win. onnxcomp config init writes one.",
)


def settings_in_effect(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `onnxcomp.optimize` that a command was given.

    They come from its options, its configuration and its preset, in this order. What none of them
    says is left out. Rules of the command line come before those of the file: the first match wins.

    Raises:
        UsageError: The configuration is wrong.
    """
    source = click.get_current_context().get_parameter_source
    explicit = {k: v for k, v in values.items() if source(k) is not ParameterSource.DEFAULT}
    preset, config = explicit.pop("preset", None), explicit.pop("config", None)
    for entry in options_of(OptimizeOptions):
        if entry.kind.repeats and entry.name in explicit:
            explicit[entry.name] = entry.kind.gathered(explicit[entry.name])
    if preset is None and config is None:
        return explicit
    from onnxcomp.passes.config.file import config_options, merged
    from onnxcomp.passes.config.presets import preset_options

    stock = bool(explicit.get("stock"))
    if config is None:
        base = preset_options(preset, stock=stock)
    else:
        base = config_options(config, preset=preset, stock=stock)
    rules = (*explicit.get("set_", ()), *base.get("set_", ()))
    chosen = merged(base, explicit) | {"set_": rules}
    return {name: value for name, value in chosen.items() if name in values}
