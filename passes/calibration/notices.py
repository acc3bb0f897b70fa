"""What is said of a weight's inputs, once for each weight where a model is looked at repeatedly."""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterator

from onnxcomp.passes.codecs.moments import ENOUGH

__all__ = ["once_per_weight", "warn_of_few_vectors"]

log = logging.getLogger(__name__)

# Names that were spoken of; None where everything is said each time.
_Spoken = set[tuple[str, str]]
_spoken: contextvars.ContextVar[_Spoken | None] = contextvars.ContextVar("_spoken", default=None)


@contextlib.contextmanager
def once_per_weight() -> Iterator[None]:
    """Within the block, say the same of the same weight only once."""
    token = _spoken.set(set())
    try:
        yield
    finally:
        _spoken.reset(token)


def warn_of_few_vectors(name: str, vectors: int, columns: int, use: str) -> None:
    """Warn where a product has seen fewer input vectors than its second moments need.

    Args:
        name: The weight.
        vectors: How many input vectors it has seen.
        columns: Length of a vector.
        use: What more of them are needed for.
    """
    if vectors >= ENOUGH * columns:
        return
    spoken = _spoken.get()
    if spoken is not None:
        if (name, use) in spoken:
            return
        spoken.add((name, use))
    log.warning(
        "%s: %d input vectors for %d columns; %d or more are needed for %s",
        *(name, vectors, columns, ENOUGH * columns, use),
    )
