"""What an input of a decoder means, by its name and rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

__all__ = ["Role", "role_of", "sized", "words_of"]

Role = Literal["ids", "mask", "positions", "branch", "cache", ""]


def words_of(name: str) -> set[str]:
    """Words of a name in lower case."""
    return set(re.findall(r"[a-z]+", name.lower()))


def role_of(name: str, rank: int) -> Role:
    """The meaning of an input; empty where decoders have no such input.

    Args:
        name: Its name, as exporters write it: ``input_ids``, ``past_key_values.0.key``.
        rank: How many axes it has.
    """
    words = words_of(name)
    if rank >= 3 and words & {"past", "cache"}:
        return "cache"
    if "branch" in words:
        return "branch"
    if "mask" in words:
        return "mask"
    if words & {"position", "positions"}:
        return "positions"
    return "ids" if words & {"ids", "tokens", "token", "input"} else ""


def sized(shape: Sequence[int | str | None], batch: int, positions: int) -> tuple[int, ...]:
    """Shape of a cache: its last free axis holds positions, those before it the batch."""
    free = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    sizes = dict.fromkeys(free[:-1], batch) | dict.fromkeys(free[-1:], positions)
    return tuple(
        sizes[axis] if axis in sizes else int(size or 0) for axis, size in enumerate(shape)
    )
