"""Kinds of values that options take. Each kind is checked here, once.

A kind reads text of the command line, checks a value wherever it comes from (command line, file,
Python), and describes it in JSON Schema. Messages name the option as the user wrote it.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from onnxcomp.errors import UsageError
from onnxcomp.passes.config.values import MODES, check_pattern, one_of, parse_size

__all__ = [
    "Callback",
    "Choice",
    "Data",
    "File",
    "Flag",
    "Function",
    "Kind",
    "Names",
    "Number",
    "Patterns",
    "PlanFile",
    "Rules",
    "Shapes",
    "Size",
    "Sparsity",
]


def _wrong(name: str, value: Any, wanted: str) -> UsageError:
    shown = str(value) if isinstance(value, numbers.Number) else repr(value)
    return UsageError(f"{name} is {shown}", hint=f"it must be {wanted}")


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """Any value; other kinds are stricter.

    Attributes:
        metavar: What stands for the value in help.
        repeats: Whether the option may be given several times on the command line.
    """

    metavar: str = dataclasses.field(default="", kw_only=True)
    repeats: bool = dataclasses.field(default=False, kw_only=True)

    def read(self, text: str, name: str) -> Any:
        """The value that a text on the command line stands for.

        Raises:
            UsageError: It stands for none.
        """
        return self.checked(text, name)

    def gathered(self, values: Sequence[Any]) -> Any:
        """One value from those of an option that was repeated."""
        return tuple(values)

    def checked(self, value: Any, name: str) -> Any:
        """The value in the form that the compiler works with.

        Raises:
            UsageError: It is of another kind, or out of range.
        """
        return value

    def schema(self) -> dict[str, Any]:
        """What a configuration file may say, as JSON Schema."""
        return {}

    def located(self, value: Any, folder: Path) -> Any:
        """A value of a configuration file, its paths taken from the folder of that file.

        Raises:
            UsageError: A pattern matches no file.
        """
        return tuple(value) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True, slots=True)
class Number(Kind):
    """A finite number in a range.

    Attributes:
        whole: Whether it must be an integer.
        least: Smallest value; None for no such bound.
        above: All values are larger.
        below: All values are smaller.
        suffix: May follow the number on the command line.
    """

    whole: bool = False
    least: float | None = None
    above: float | None = None
    below: float | None = None
    suffix: str = ""
    metavar: str = dataclasses.field(default="NUMBER", kw_only=True)

    def read(self, text: str, name: str) -> Any:
        """The number that a text says."""
        plain = text.strip()
        if self.suffix and plain.lower().endswith(self.suffix):
            plain = plain[: -len(self.suffix)]
        try:
            value = int(plain) if self.whole else float(plain)
        except ValueError:
            raise _wrong(name, text, self._range) from None
        return self.checked(value, name)

    def checked(self, value: Any, name: str) -> Any:
        """The number as `int` or `float`; those of numpy are taken, too."""
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            raise _wrong(name, value, self._range)
        plain = int(value) if isinstance(value, numbers.Integral) else float(value)
        inside = (
            math.isfinite(plain)
            and (self.least is None or plain >= self.least)
            and (self.above is None or plain > self.above)
            and (self.below is None or plain < self.below)
        )
        if not inside:
            raise _wrong(name, value, self._range)
        return plain

    @property
    def _range(self) -> str:
        bounds = [
            f"{word} {bound}"
            for word, bound in (
                ("of at least", self.least),
                ("above", self.above),
                ("below", self.below),
            )
            if bound is not None
        ]
        return " ".join(["a whole number" if self.whole else "a number", " and ".join(bounds)])

    def schema(self) -> dict[str, Any]:
        """Type and bounds."""
        bounds = {
            "minimum": self.least,
            "exclusiveMinimum": self.above,
            "exclusiveMaximum": self.below,
        }
        given = {key: bound for key, bound in bounds.items() if bound is not None}
        return {"type": "integer" if self.whole else "number", **given}


@dataclasses.dataclass(frozen=True, slots=True)
class Size(Kind):
    """Bytes: a number, or text with a unit.

    Attributes:
        least: Smallest number of bytes.
    """

    least: int = 0
    metavar: str = dataclasses.field(default="SIZE", kw_only=True)

    def checked(self, value: Any, name: str) -> int:
        """The number of bytes."""
        wanted = f"a number of bytes of at least {self.least}, or a size such as 120MB"
        if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
            raise _wrong(name, value, wanted)
        if not isinstance(value, str) and not math.isfinite(value):
            raise _wrong(name, value, wanted)
        size = parse_size(value if isinstance(value, str) else float(value))
        if isinstance(value, numbers.Integral):
            size = int(value)
        if size < self.least:
            raise _wrong(name, value, wanted)
        return size

    def schema(self) -> dict[str, Any]:
        """Text or bytes."""
        return {"type": ["string", "integer"], "minimum": self.least}


# Elements of a group of which some are kept: columns are gone through in blocks of 128.
_GROUPS = (2, 4, 8, 16, 32)


@dataclasses.dataclass(frozen=True, slots=True)
class Sparsity(Kind):
    """A share of elements, or n of every m that are kept, as text."""

    metavar: str = dataclasses.field(default="SHARE|N:M", kw_only=True)

    def checked(self, value: Any, name: str) -> str:
        """``"0.5"`` or ``"2:4"``."""
        wanted = "a share above 0 and below 1, or a pattern such as '2:4' (n of every 2 to 32)"
        if isinstance(value, int) and value >= 60:  # YAML reads 2:4 as 2 * 60 + 4
            wanted += ", which needs its quotes in YAML"
        if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
            raise _wrong(name, value, wanted)
        text = str(value).strip()
        kept, colon, group = text.partition(":")
        if colon:
            if not (kept.isdecimal() and group.isdecimal() and int(group) in _GROUPS):
                raise _wrong(name, value, wanted)
            if not 0 < int(kept) < int(group):
                raise _wrong(name, value, wanted)
            return f"{int(kept)}:{int(group)}"
        try:
            share = float(text)
        except ValueError:
            raise _wrong(name, value, wanted) from None
        if not 0 < share < 1:
            raise _wrong(name, value, wanted)
        return repr(share)

    def schema(self) -> dict[str, Any]:
        """Text or a number."""
        return {"type": ["string", "number"]}


@dataclasses.dataclass(frozen=True, slots=True)
class Choice(Kind):
    """One of several words.

    Attributes:
        words: A `Literal` of them.
    """

    words: Any = None

    @property
    def known(self) -> tuple[str, ...]:
        """The words."""
        return get_args(self.words)

    def checked(self, value: Any, name: str) -> Any:
        """The word."""
        one_of(name, value, self.known)
        return value

    def schema(self) -> dict[str, Any]:
        """The words."""
        return {"enum": list(self.known)}


@dataclasses.dataclass(frozen=True, slots=True)
class Flag(Kind):
    """Yes or no."""

    def checked(self, value: Any, name: str) -> bool:
        """True or false; those of numpy are taken, too."""
        if isinstance(value, bool):
            return value
        if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
            return bool(value)
        raise _wrong(name, value, "true or false")

    def schema(self) -> dict[str, Any]:
        """A boolean."""
        return {"type": "boolean"}


@dataclasses.dataclass(frozen=True, slots=True)
class Names(Kind):
    """One name or several."""

    metavar: str = dataclasses.field(default="NAME", kw_only=True)
    repeats: bool = dataclasses.field(default=True, kw_only=True)

    def checked(self, value: Any, name: str) -> tuple[str, ...]:
        """All of them."""
        found = (value,) if isinstance(value, str) else value
        if not isinstance(found, Iterable) or isinstance(found, Mapping):
            raise _wrong(name, value, "text or a list of texts")
        found = tuple(found)
        for item in found:
            if not isinstance(item, str):
                raise _wrong(name, item, "text or a list of texts")
        return found

    def read(self, text: str, name: str) -> str:
        """One of them."""
        (one,) = self.checked(text, name)
        return str(one)

    def schema(self) -> dict[str, Any]:
        """Text, or a list that is not empty."""
        return {"type": ["string", "array"], "items": {"type": "string"}, "minItems": 1}


@dataclasses.dataclass(frozen=True, slots=True)
class Patterns(Names):
    """Regular expressions."""

    metavar: str = dataclasses.field(default="RE", kw_only=True)

    def checked(self, value: Any, name: str) -> tuple[str, ...]:
        """All of them."""
        found = Names.checked(self, value, name)
        for pattern in found:
            check_pattern(pattern)
        return found

    def schema(self) -> dict[str, Any]:
        """Text, or a list."""
        return {"type": ["string", "array"], "items": {"type": "string"}}


@dataclasses.dataclass(frozen=True, slots=True)
class Rules(Kind):
    """Settings for some weights."""

    metavar: str = dataclasses.field(default="RE:KEY=VALUE,...", kw_only=True)
    repeats: bool = dataclasses.field(default=True, kw_only=True)

    def read(self, text: str, name: str) -> Any:
        """One rule."""
        from onnxcomp.passes.config.rules import parse_rule  # imports the codecs

        return parse_rule(text)

    def checked(self, value: Any, name: str) -> tuple[Any, ...]:
        """All rules, read."""
        from onnxcomp.passes.config.rules import Rule, parse_rule

        given = [value] if isinstance(value, str | Rule) else value
        if not isinstance(given, Iterable) or isinstance(given, Mapping):
            raise _wrong(name, value, "a rule such as 'encoder.*:bits=3', or a list of rules")
        rules = []
        for item in given:
            if not isinstance(item, str | Rule):
                raise _wrong(name, item, "a rule such as 'encoder.*:bits=3'")
            rules.append(item if isinstance(item, Rule) else parse_rule(item))
        return tuple(rules)

    def schema(self) -> dict[str, Any]:
        """A list of mappings."""
        parts: dict[str, dict[str, Any]] = {
            "match": {
                "description": "Regular expression, searched for in the names of the weight and of "
                "the nodes that use it.",
                "type": "string",
            },
            "op": {"description": "Operator that has to use the weight: Conv.", "type": "string"},
            "keep": {
                "description": "true: leave these weights as they are.",
                "type": "boolean",
            },
            "method": {"description": "Codecs to choose from.", **Names().schema()},
            "mode": {"description": "As above, for these weights.", "enum": list(MODES)},
            "params": {
                "description": "Parameters of the codec: {bits: 5}.",
                "type": "object",
                "additionalProperties": {"type": ["integer", "number", "string"]},
            },
        }
        rule = {
            "type": "object",
            "anyOf": [{"required": ["match"]}, {"required": ["op"]}],
            "additionalProperties": False,
            "properties": parts,
        }
        return {"type": "array", "items": rule}


@dataclasses.dataclass(frozen=True, slots=True)
class Shapes(Kind):
    """Shapes by name of an input."""

    metavar: str = dataclasses.field(default="NAME:N,N", kw_only=True)
    repeats: bool = dataclasses.field(default=True, kw_only=True)

    def read(self, text: str, name: str) -> tuple[str, tuple[int, ...]]:
        """One shape, ``name:1,128``; names may hold colons, the last one separates."""
        owner, _, sizes = text.rpartition(":")
        words = sizes.replace("x", ",").split(",")
        if not owner or not all(word.isascii() and word.isdigit() for word in words):
            raise UsageError(f"{name} is {text!r}", hint="write for example input_ids:1,128")
        return owner, tuple(int(word) for word in words)

    def gathered(self, values: Sequence[Any]) -> Any:
        """All shapes by name."""
        return dict(values)

    def checked(self, value: Any, name: str) -> Any:
        """The mapping as it is."""
        wanted = "a mapping of input names to sizes, such as {'input_ids': [1, 128]}"
        if not isinstance(value, Mapping):
            raise _wrong(name, value, wanted)
        for owner, sizes in value.items():
            whole = isinstance(sizes, Iterable) and all(
                isinstance(size, numbers.Integral) and int(size) >= 0 for size in sizes
            )
            if isinstance(sizes, str) or not whole:
                raise _wrong(f"{name} of {owner!r}", sizes, "a list of sizes of at least 0")
        return value

    def schema(self) -> dict[str, Any]:
        """A mapping of lists."""
        sizes = {"type": "array", "items": {"type": "integer", "minimum": 0}}
        return {"type": "object", "additionalProperties": sizes}


@dataclasses.dataclass(frozen=True, slots=True)
class File(Kind):
    """A path.

    Attributes:
        folder: Whether it is that of a folder.
    """

    folder: bool = False
    metavar: str = dataclasses.field(default="PATH", kw_only=True)

    def checked(self, value: Any, name: str) -> Any:
        """The path as it is."""
        if not isinstance(value, str | os.PathLike):
            raise _wrong(name, value, "a path")
        return value

    def schema(self) -> dict[str, Any]:
        """Text."""
        return {"type": "string"}

    def located(self, value: Any, folder: Path) -> str:
        """The path, from the folder on."""
        return str(folder / value)


@dataclasses.dataclass(frozen=True, slots=True)
class PlanFile(Kind):
    """A plan, or the path of its file."""

    metavar: str = dataclasses.field(default="PLAN.json", kw_only=True)


@dataclasses.dataclass(frozen=True, slots=True)
class Data(Kind):
    """Inputs of a model: paths, or arrays."""

    metavar: str = dataclasses.field(default="PATH", kw_only=True)
    repeats: bool = dataclasses.field(default=True, kw_only=True)

    def schema(self) -> dict[str, Any]:
        """One path or several."""
        return {"type": ["string", "array"], "items": {"type": "string"}}

    def located(self, value: Any, folder: Path) -> tuple[str, ...]:
        """Paths from the folder on, patterns expanded; ``name=`` stays in front."""
        found: list[str] = []
        for item in [value] if isinstance(value, str) else value:
            owner, sign, rest = item.rpartition("=")
            pattern = str(folder / rest)
            matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
            if not matches:
                raise UsageError(f"no file matches {item!r}", hint="paths start at this file")
            found += [f"{owner}{sign}{match}" for match in matches]
        return tuple(found)


@dataclasses.dataclass(frozen=True, slots=True)
class Function(Kind):
    """A function, or ``script.py:function``."""

    metavar: str = dataclasses.field(default="FILE:FUNCTION", kw_only=True)

    def checked(self, value: Any, name: str) -> Any:
        """The function or its place as it is; the script is loaded by who needs it."""
        if not (isinstance(value, str) or callable(value)):
            raise _wrong(name, value, "a function, or text such as mine.py:accuracy")
        return value

    def schema(self) -> dict[str, Any]:
        """Text."""
        return {"type": "string"}

    def located(self, value: Any, folder: Path) -> str:
        """The script from the folder on."""
        return str(folder / value)


@dataclasses.dataclass(frozen=True, slots=True)
class Callback(Kind):
    """A function, from Python only."""

    def checked(self, value: Any, name: str) -> Any:
        """The function as it is."""
        if not callable(value):
            raise _wrong(name, value, "a function")
        return value
