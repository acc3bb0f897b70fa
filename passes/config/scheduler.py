"""Where weights are encoded on many machines: workers of this one, or the address of a cluster."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.passes.config.kinds import Kind

__all__ = ["Scheduler", "local_workers"]

_LOCAL = re.compile(r"local(?::(\d+))?")
_ADDRESS = re.compile(r"(?:[a-z]+://)?[^\s/]+:\d{1,5}/?|wss?://\S+")


def local_workers(scheduler: str) -> int | None:
    """Workers to start on this machine: 0 for one of each processor, None for an address."""
    found = _LOCAL.fullmatch(scheduler)
    return None if found is None else int(found[1] or 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Scheduler(Kind):
    """``local``, ``local:N``, or the address of a scheduler of Dask."""

    metavar: str = dataclasses.field(default="local[:N]|ADDRESS", kw_only=True)

    def checked(self, value: Any, name: str) -> str:
        """The text as it is."""
        known = isinstance(value, str) and (_LOCAL.fullmatch(value) or _ADDRESS.fullmatch(value))
        if not known or value == "local:0":
            raise UsageError(
                f"{name} is {value!r}",
                hint="it must be local, local:N with N workers, or an address such as "
                "tcp://10.0.0.5:8786",
            )
        return str(value)

    def schema(self) -> dict[str, Any]:
        """Text."""
        return {"type": "string"}
