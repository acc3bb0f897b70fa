"""How much memory this process takes, and how much it may still take."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from onnxcomp.errors import UsageError

__all__ = ["LIMIT", "available_memory", "peak_rss"]

# The environment variable that says how much memory may be taken, such as 2GB.
LIMIT = "ONNXCOMP_MEMORY"

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


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


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take; None where the system does not say.

    The least of what `LIMIT` says, what the machine has left, what each control group around this
    process has left (both versions), and what is left of the limit of its address space. Cached
    files that a group counts can go and are not counted.

    Args:
        root: Where the system's files are.

    Raises:
        UsageError: `LIMIT` holds no size.
    """
    found = [_given(), _of_machine(root), *_of_groups(root), _of_address_space(root)]
    return min((number for number in found if number is not None), default=None)


def _given() -> int | None:
    text = os.environ.get(LIMIT)
    if not text:
        return None
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]?B?)\s*", text.upper())
    with contextlib.suppress(ValueError):
        if match is not None:
            return int(float(match[1]) * _UNITS[match[2] if match[2] in _UNITS else match[2] + "B"])
    raise UsageError(f"{LIMIT} is {text!r}", hint="it must be a size such as 500MB or 4GB")


def _of_machine(root: Path) -> int | None:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _of_groups(root: Path) -> Iterator[int]:
    """What is left in the control groups of this process, and in those around them."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, place = line.split(":", 2)
        if not controllers:
            base, files = root / "sys/fs/cgroup", _UNIFIED
        elif "memory" in controllers.split(","):
            base, files = root / "sys/fs/cgroup/memory", _FIRST
        else:
            continue
        folder = base / place.strip().lstrip("/")
        # Inside a container the path may be that of the host, and its own group the root.
        folders = [base] if not folder.is_dir() else [folder, *folder.parents]
        for group in folders:
            yield from _of_group(group, *files)
            if group == base:
                break


# Files of a group: its limits, what it takes, and the entry of memory.stat for cached files.
_Files = tuple[tuple[str, ...], str, str]
_UNIFIED: _Files = (("memory.max", "memory.high"), "memory.current", "inactive_file")
_FIRST: _Files = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")


def _of_group(group: Path, limits: tuple[str, ...], usage: str, cached: str) -> Iterator[int]:
    taken = _number(group / usage)
    if taken is None:
        return
    for line in _lines(group / "memory.stat"):
        if line.split()[0] == cached:
            taken -= int(line.split()[1])
    for name in limits:
        limit = _number(group / name)
        if limit is not None:
            yield max(0, limit - taken)


def _of_address_space(root: Path) -> int | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = _lines(root / "proc/self/statm")
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return max(0, limit - int(pages[0].split()[0]) * resource.getpagesize())


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, or where it stands for no limit."""
    text = "".join(_lines(path))
    return int(text) if text.isdigit() and int(text) < math.ldexp(1, 62) else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
