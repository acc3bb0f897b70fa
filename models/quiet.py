"""Keep what torch says about its own work from the user's terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

__all__ = ["ASKED", "quiet"]

log = logging.getLogger(__name__)

# Packages whose messages are held back: whether a graph is right is found by running it.
_PACKAGES = ("torch", "onnxscript", "onnx_ir", "transformers")

# The variable by which users ask torch for its messages.
ASKED = "TORCH_LOGS"


class _Held(logging.Filter):
    """Lets messages of the packages not through, but to our log at the level of debugging."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a message may pass."""
        if record.name.split(".")[0] not in _PACKAGES:
            return True
        log.debug("%s: %s", record.name, record.getMessage())
        return False


@contextlib.contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Hold back messages, prints and warnings of exporters unless the variable TORCH_LOGS is set.

    Yields:
        The warnings, filled in as they come. All that was held back is in the log of this module,
        at the level of debugging.
    """
    if os.environ.get(ASKED):
        yield []
        return
    held, printed = _Held(), io.StringIO()
    known = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in _PACKAGES]
    owners = [logging.root, *map(logging.getLogger, known)]
    # What no handler takes goes to that of last resort.
    handlers = [handler for owner in owners for handler in (*owner.handlers, logging.lastResort)]
    places = [handler for handler in dict.fromkeys(handlers) if handler is not None]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for handler in places:
            handler.addFilter(held)
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                yield found
        finally:
            for handler in places:
                handler.removeFilter(held)
            for text in [*(str(warning.message) for warning in found), printed.getvalue()]:
                log.debug("%s", text)
