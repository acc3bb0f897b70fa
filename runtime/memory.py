"""How much memory this process takes."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["peak_rss"]


def peak_rss() -> int:
    """Largest resident size of this process so far, in bytes.

    The kernel's high-water mark of the running program where there is one: the number of
    getrusage also counts the program that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        status = ""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
