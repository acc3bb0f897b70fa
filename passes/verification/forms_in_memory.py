"""How a form of a model is run: in one session where that fits into memory, else in pieces."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from onnxcomp.errors import ModelError
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.lowering.session_memory import session_bytes
from onnxcomp.passes.verification.clock import Clock
from onnxcomp.passes.verification.copies import Copy
from onnxcomp.passes.verification.forms import Signature
from onnxcomp.passes.verification.pieces import Pieces
from onnxcomp.runtime.activity import activity
from onnxcomp.runtime.memory import available_memory

if TYPE_CHECKING:
    from onnxcomp.runtime.evaluate import Feed, Outputs

__all__ = ["Memory", "Runnable"]

log = logging.getLogger(__name__)

# What a session takes beyond its weights, as a share of them: activations and the allocator's.
_MARGIN = 0.25

# The part of the memory that one piece may take, where there is little.
_PIECE = 1 / 8


class Runnable(Protocol):
    """A form of a model that can be run."""

    @property
    def signature(self) -> Signature:
        """What it declares of its inputs and outputs, without taps."""

    def outputs(self, feeds: Sequence[Feed], clock: Clock) -> list[Outputs]:
        """What comes out of each input, taps by their keys; times runs that can be compared."""


class _Whole:
    """A form in one session."""

    def __init__(self, copy: Copy, *, library: bool) -> None:
        self._session, self._added = copy.session(library=library)

    @property
    def signature(self) -> Signature:
        """See `Runnable`."""
        return Signature.of(self._session, self._added)

    def outputs(self, feeds: Sequence[Feed], clock: Clock) -> list[Outputs]:
        """See `Runnable`."""
        from onnxcomp.runtime.evaluate import run_session

        results = []
        for feed in feeds:
            with clock.running():
                found = run_session(self._session, feed)
            results.append({self._added.get(name, name): a for name, a in found.items()})
        return results


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """What forms may take.

    Attributes:
        limit: Bytes; None for what is available when a form is opened.
        split: Forms that were run in pieces so far, in words.
    """

    limit: int | None = None
    split: list[str] = dataclasses.field(default_factory=list)

    def open(self, copy: Copy, what: str, *, library: bool) -> Runnable:
        """A form in one session, or, with a notice, in pieces.

        Args:
            copy: The model.
            what: Which form it is, in words.
            library: Whether the operator library is used where the model calls it.

        Raises:
            ModelError: ONNX Runtime cannot load it.
        """
        activity("verifying", item=what)
        available = available_memory() if self.limit is None else self.limit
        needed = 0 if available is None else _needed(copy, library=library)
        if available is None or needed <= available:
            return _Whole(copy, library=library)
        pieces = Pieces(copy, library=library, available=int(available * _PIECE))
        if what not in self.split:
            self.split.append(what)
            log.warning(
                "%s needs about %.3g GB in one session, and %.3g GB are available: it runs layer "
                "by layer, in %d piece%s",
                what, needed / 1e9, available / 1e9, len(pieces), "s"[: len(pieces) != 1],
            )  # fmt: skip
        return pieces


def _needed(copy: Copy, *, library: bool) -> int:
    """Memory of a session; 0 for a model that is not understood, which a session will refuse."""
    try:
        model = load(copy.path)
    except ModelError:
        return 0
    return int((1 + _MARGIN) * session_bytes(Path(copy.path), model, library=library))
