"""Base of the parameter schemas of codecs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from onnxcomp.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on

__all__ = ["Params"]


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
