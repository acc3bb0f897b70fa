"""Memory that expanding a weight takes while a session is created."""

from __future__ import annotations

import dataclasses

__all__ = ["LoadMemory"]


@dataclasses.dataclass(frozen=True, slots=True)
class LoadMemory:
    """Memory in bytes that a session without the operator library takes to expand one use.

    Attributes:
        kept: Intermediate results that stay until a pass over the model is over.
        working: What is needed on top while this use is expanded.
        result: What of `kept` the session needs from then on.
    """

    kept: int
    working: int
    result: int = 0

    def share(self, parts: int) -> LoadMemory:
        """That of one of several equal parts."""
        return LoadMemory(self.kept // parts, self.working // parts, self.result // parts)
