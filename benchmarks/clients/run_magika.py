"""magika: tells types of files, on the files of Python's own library."""

from __future__ import annotations

import collections
import sysconfig
from pathlib import Path
from typing import Any

from harness import measure, part_of


def files() -> list[Path]:
    """At most twelve for each ending, every second of which is for calibration."""
    chosen: dict[str, list[Path]] = collections.defaultdict(list)
    folders = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            if {"__pycache__", "magika"} & set(path.parts[-5:]):
                continue  # these come and go: byte code, and models that are swapped
            if path.is_file() and path.stat().st_size > 200 and len(chosen[path.suffix]) < 12:
                chosen[path.suffix].append(path)
    return [path for paths in chosen.values() for path in paths]


def load() -> Any:
    from magika import Magika

    return Magika()


def work(magika: Any, part: str) -> dict[str, Any]:
    """Labels."""
    paths = files()
    paths = part_of(paths[::4] + [p for i, p in enumerate(paths) if i % 4], part, len(paths[::4]))
    answers = [str(magika.identify_path(path).output.label) for path in paths]
    return {"answers": answers}


if __name__ == "__main__":
    measure(load, work)
