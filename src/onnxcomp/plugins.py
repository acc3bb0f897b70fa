"""Objects that other packages add by entry points: found by name, imported when they are wanted.

A package lists them in its metadata::

    [project.entry-points."onnxcomp.passes"]
    mine = "my_package.passes:MyPass"

The object is an instance or a class without arguments, and its `name` is that of the entry point.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from typing import Any

from onnxcomp.errors import UsageError

__all__ = ["find", "load", "members", "origin"]


def origin(point: importlib.metadata.EntryPoint) -> str:
    """The package of an entry point, for messages."""
    if point.dist is None:
        return f"the module {point.value.partition(':')[0]!r}"
    return f"the package {point.dist.metadata['Name']} {point.dist.version}"


def find(group: str) -> list[importlib.metadata.EntryPoint]:
    """The entry points of a group, by name and package; nothing is imported."""
    points = set(importlib.metadata.entry_points(group=group))
    return sorted(points, key=lambda point: (point.name, origin(point)))


def members(protocol: type) -> frozenset[str]:
    """Names of what an object of a protocol must have."""
    names = {*dir(protocol), *protocol.__annotations__}
    return frozenset(name for name in names if not name.startswith("_"))


def load(point: importlib.metadata.EntryPoint, what: str, needed: Iterable[str]) -> Any:
    """The object of an entry point.

    Args:
        point: The entry point.
        what: What the object is to be, for messages: "codec", "pass".
        needed: Names of what it must have.

    Raises:
        UsageError: It cannot be imported or made, lacks something, or has another name.
    """
    here = f"the {what} {point.name!r} of {origin(point)}"
    hint = f"update or uninstall {origin(point)}"
    try:
        found = point.load()
        made = found() if isinstance(found, type) else found
    except Exception as error:  # whatever the code of others raises
        raise UsageError(
            f"{here} does not load: {type(error).__name__}: {error}", hint=hint
        ) from error
    missing = sorted(name for name in needed if not hasattr(made, name))
    if missing:
        raise UsageError(f"{here} has no {', '.join(missing)}", hint=hint)
    if made.name != point.name:
        raise UsageError(
            f"the entry point {point.name!r} of {origin(point)} is the {what} {made.name!r}",
            hint=hint,
        )
    return made
