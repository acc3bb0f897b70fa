"""Option types. Sizes and rules are read by the compiler itself; only the shell forms are here."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from onnxcomp.passes.settings import Rule

__all__ = ["RATIO", "RULE", "SHAPE", "SIZE"]


class Size(click.ParamType):
    """Bytes: ``120MB`` and ``16KB`` are decimal, ``16KiB`` is binary, a bare number is bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse a size."""
        from onnxcomp.passes.settings import parse_size

        return parse_size(value)


class RuleType(click.ParamType):
    """Settings for some weights: ``REGEX:bits=3,mode=folded``."""

    name = "re:key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Rule:
        """Parse the expression and its settings."""
        from onnxcomp.passes.settings import parse_rule

        return parse_rule(value)


class Ratio(click.ParamType):
    """How many times smaller: ``8`` or ``8x``."""

    name = "ratio"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse a ratio above 1."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[xX]?", str(value).strip())
        if match is None:
            self.fail(f"'{value}' is not a ratio; write 8 or 8x", param, ctx)
        if float(match[1]) <= 1:
            self.fail(f"'{value}' would not make anything smaller; write 8 or 8x", param, ctx)
        return float(match[1])


class Shape(click.ParamType):
    """The shape of one input: ``name:1,128``."""

    name = "name:dims"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, ...]]:
        """Parse a name and its dimensions; names may hold colons, the last one separates."""
        if isinstance(value, tuple):
            return value
        name, _, dims = value.rpartition(":")
        if not name or re.fullmatch(r"\d+([,x]\d+)*", dims) is None:
            self.fail(f"'{value}' is not a shape; write input_ids:1,128", param, ctx)
        return name, tuple(int(dim) for dim in re.split("[,x]", dims))


SIZE, RULE, RATIO, SHAPE = Size(), RuleType(), Ratio(), Shape()
