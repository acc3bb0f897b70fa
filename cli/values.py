"""Option values. Sizes and rules are read by the compiler itself; only the shell forms are here.

Click shows a function's name as the kind of value it reads.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from onnxcomp.passes.config.settings import Rule

__all__ = ["ratio", "rule", "shape", "size"]


def size(text: str) -> int:
    """Bytes: ``120MB`` and ``16KB`` are decimal, ``16KiB`` is binary, a bare number is bytes."""
    from onnxcomp.passes.config.settings import parse_size

    return parse_size(text)


def rule(text: str) -> Rule:
    """Settings for some weights: ``REGEX:bits=3,mode=folded``."""
    from onnxcomp.passes.config.settings import parse_rule

    return parse_rule(text)


def ratio(text: str) -> float:
    """How many times smaller: ``8`` or ``8x``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*[xX]?", text.strip())
    if match is None:
        raise click.BadParameter(f"'{text}' is not a ratio; write 8 or 8x")
    if float(match[1]) <= 1:
        raise click.BadParameter(f"'{text}' would not make anything smaller; write 8 or 8x")
    return float(match[1])


def shape(text: str) -> tuple[str, tuple[int, ...]]:
    """The shape of one input: ``name:1,128``; names may hold colons, the last one separates."""
    name, _, dims = text.rpartition(":")
    if not name or re.fullmatch(r"\d+([,x]\d+)*", dims) is None:
        raise click.BadParameter(f"'{text}' is not a shape; write input_ids:1,128")
    return name, tuple(int(dim) for dim in re.split("[,x]", dims))
