"""Base of the parameter schemas of codecs, and what codecs say of their parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

__all__ = ["DenseFallback", "Params", "Qualities"]


@dataclasses.dataclass(frozen=True, slots=True)
class Params:
    """Base of the parameter schemas of codecs: a frozen dataclass of ints, floats and strings."""

    @classmethod
    def of(cls, params: Params) -> Self:
        """The same parameters, known to be of this schema.

        Raises:
            UsageError: They belong to another codec.
        """
        if not isinstance(params, cls):
            raise UsageError(f"{type(params).__name__} were given, {cls.__name__} expected")
        return params

    def to_json(self) -> dict[str, Any]:
        """Parameters by name, in declaration order."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, slots=True)
class Qualities:
    """Named settings: more speed, or less error, at equal bytes.

    Attributes:
        names: What each quality stands for, by name.
        apply: The settings of a quality, as near to the given ones as they exist.
    """

    names: Mapping[str, str]
    apply: Callable[[Params, str], Params]


@dataclasses.dataclass(frozen=True, slots=True)
class DenseFallback:
    """When a weight stays dense, for a codec that few models are made for.

    Attributes:
        rival: Name of the baseline, usually better at equal bytes; the report compares the two.
        limit: Relative error of products, for the settings, above which a weight stays dense.
        advice: How models come to need no such loss; empty for nothing to be said.
    """

    rival: str
    limit: Callable[[Params], float]
    advice: str = ""
