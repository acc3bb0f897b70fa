"""What an option is. `options.py` lists them all; everything else about them is derived.

A table is a class whose fields are options, as those of a dataclass. Its constructor checks every
value; type checkers see its fields with their types, and so do the functions that take them.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

from onnxcomp.passes.config.kinds import Kind

if TYPE_CHECKING:
    from typing import overload

    from typing_extensions import Self, dataclass_transform

__all__ = [
    "SECTIONS",
    "Option",
    "Options",
    "Section",
    "option",
    "options_of",
    "table",
]

GivenT = TypeVar("GivenT")
KeptT = TypeVar("KeptT")
ClassT = TypeVar("ClassT")


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """Options that decide about the same thing.

    Attributes:
        title: Heading of help and manual.
        text: What they decide, for configuration files.
        group: The mapping they are in, in configuration files; empty: the top.
    """

    title: str
    text: str
    group: str = ""


SECTIONS: Mapping[str, Section] = {
    "source": Section("Settings made elsewhere", "Settings with a name, or from a file."),
    "target": Section(
        "How small",
        "How small the output is to be. Give bits, ratio or size, or none of them for 4 bits; "
        "max_error and max_slowdown go with each of them, or alone.",
        "target",
    ),
    "method": Section("What and how", "Which weights are stored how."),
    "prune": Section(
        "What to prune first",
        'Channels, neurons and heads to take out before weights are encoded. With "prune" among '
        "the methods, a target for the size and data, but no share here, pruning and the other "
        "methods divide the size.",
        "prune",
    ),
    "data": Section(
        "Inputs",
        "Samples of real inputs, for calibration and for the check of the result.",
        "data",
    ),
    "output": Section("The output", "How the output is written.", "output"),
    "gate": Section("The check at the end", "The check of the result at the end.", "verify"),
    "run": Section(
        "The run", "How the work is done. None of it changes the bytes, but the seed.", "run"
    ),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Attributes:
        default: The value where none is given, as a user would write it.
        kind: What values it takes.
        section: What it decides about, a key of `SECTIONS`.
        help: One sentence, for the command line, configuration files and docstrings.
        details: More sentences, for the manual and docstrings.
        cli: Spelling on the command line, as click reads it; empty: that of its name.
        key: Name in configuration files; empty: its name.
        example: A value for the manual and, as YAML, the template of configuration files.
        on_cli: Whether it can be given on the command line.
        in_file: Whether it can be given in a configuration file.
        name: Of the argument in Python.
        type: Of the argument in Python, as text.
    """

    default: Any
    kind: Kind
    section: str
    help: str
    details: str = ""
    cli: tuple[str, ...] = ()
    key: str = ""
    example: str = ""
    on_cli: bool = True
    in_file: bool = True
    name: str = ""
    type: str = ""

    @property
    def spelling(self) -> tuple[str, ...]:
        """Names on the command line, the longest one last."""
        return self.cli or (f"--{self.name.replace('_', '-')}",)

    @property
    def path(self) -> tuple[str, ...]:
        """Where it is in a configuration file."""
        group = SECTIONS[self.section].group
        return (*filter(None, [group]), self.key or self.name)

    def checked(self, value: Any, name: str = "") -> Any:
        """A value in the form that the compiler works with.

        Args:
            value: From anywhere; None where the option may be left open.
            name: What the user calls the option; empty: its name in Python.

        Raises:
            UsageError: It is of another kind, or out of range.
        """
        if value is None and self.default is None:
            return None
        return self.kind.checked(value, name or self.name)


def option(
    default: Any,
    kind: Kind,
    section: str,
    help: str,
    details: str = "",
    *,
    cli: tuple[str, ...] = (),
    key: str = "",
    example: str = "",
    on_cli: bool = True,
    in_file: bool = True,
) -> Any:
    """A field of a table; the arguments are the attributes of `Option`."""
    assert section in SECTIONS, section
    entry = Option(default, kind, section, help, details, cli, key, example, on_cli, in_file)
    return dataclasses.field(default=default, metadata={"option": entry})


if TYPE_CHECKING:

    class Converted(Generic[GivenT, KeptT]):
        """Type of a field that may be given more loosely than it is kept."""

        @overload
        def __get__(self, instance: None, owner: Any) -> Self: ...
        @overload
        def __get__(self, instance: object, owner: Any) -> KeptT: ...
        def __get__(self, instance: Any, owner: Any) -> Any: ...
        def __set__(self, instance: Any, value: GivenT) -> None: ...

    # No field specifiers: every field has a default. Not `frozen_default`: mypy would then take a
    # `Converted` field for what is given, not for what is kept.
    @dataclass_transform(kw_only_default=True, field_specifiers=())
    def table(cls: type[ClassT]) -> type[ClassT]:
        """Make a class a table of options: a frozen dataclass that is built by names."""

else:
    table = functools.partial(dataclasses.dataclass, frozen=True, slots=True, kw_only=True)


class Options:
    """Base of tables. Building one checks and converts all its options."""

    __slots__ = ()

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __post_init__(self) -> None:
        for entry in options_of(type(self)):
            object.__setattr__(self, entry.name, entry.checked(getattr(self, entry.name)))


def options_of(cls: type[Options]) -> tuple[Option, ...]:
    """The options of a table, in the order of its fields."""
    return _read(cast("Any", cls))  # mypy asks the class, not its type, for a hash


@functools.cache
def _read(cls: Any) -> tuple[Option, ...]:
    return tuple(
        dataclasses.replace(
            field.metadata["option"], name=field.name, type=_given_type(str(field.type))
        )
        for field in dataclasses.fields(cls)
        if "option" in field.metadata
    )


def _given_type(annotation: str) -> str:
    """What an argument may be: the first of the two types of a `Converted` field."""
    tree = ast.parse(annotation, mode="eval").body
    if isinstance(tree, ast.Subscript) and ast.unparse(tree.value) == "Converted":
        assert isinstance(tree.slice, ast.Tuple)
        return ast.unparse(tree.slice.elts[0])
    return annotation
