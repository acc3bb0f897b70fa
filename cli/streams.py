"""Standard streams as they are found: closed ones, and those of a locale that is not UTF-8."""

from __future__ import annotations

import io
import os
import sys

__all__ = ["prepare_streams"]


def prepare_streams() -> None:
    r"""Make stdout and stderr safe to write to.

    A closed one (``>&-``) becomes one that takes everything and keeps nothing; its number would go
    to the next file that is opened, and what native code prints into that file. Characters that the
    encoding of a stream lacks are spelt out, as in ``\xe4``.
    """
    _occupy()
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the whole process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - for the whole process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _occupy() -> None:
    """Open the first three descriptors where they are closed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        continue
    os.close(descriptor)
