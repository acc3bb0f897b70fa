"""Values with large arrays in files that other processes map: no copy is made of what they read.

A file holds the arrays and nothing else. What they belong to is pickled beside them, and goes to
the other process in its task.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import pickle
import platform
import secrets
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Parcel"]

# Arrays start at multiples of it.
_ALIGNMENT = 64

# How often a file that another machine has written is looked for, and seconds between looks.
_TRIES, _PAUSE = 20, 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Parcel:
    """Values on their way.

    Attributes:
        path: The file.
        heads: The values without their arrays, pickled.
        places: First byte and size of the arrays of each in the file.
    """

    path: str
    heads: Sequence[bytes]
    places: Sequence[Sequence[tuple[int, int]]]

    @classmethod
    def packed(cls, path: Path, values: Iterable[object]) -> Parcel:
        """Write the arrays of some values; whoever sees the file sees all of it.

        Args:
            path: The file; it is replaced where it is there.
            values: Anything that can be pickled, one held at a time. Arrays that are contiguous go
                to the file.

        Raises:
            OSError: It cannot be written.
        """
        heads: list[bytes] = []
        places: list[list[tuple[int, int]]] = []
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        with part.open("wb") as file:
            for value in values:
                buffers: list[pickle.PickleBuffer] = []
                heads.append(pickle.dumps(value, protocol=5, buffer_callback=buffers.append))
                places.append([])
                for buffer in buffers:
                    file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
                    data = buffer.raw()
                    places[-1].append((file.tell(), data.nbytes))
                    file.write(data)
        part.replace(path)
        return cls(os.path.realpath(path), heads, places)

    def opened(self) -> list[Any]:
        """The values; their arrays are mapped, and cannot be written.

        Raises:
            OSError: The file is not there, or not whole.
        """
        least = max((start + size for ones in self.places for start, size in ones), default=0)
        data = self._mapped(least) if least else memoryview(b"")
        return [
            pickle.loads(head, buffers=[data[start : start + size] for start, size in ones])
            for head, ones in zip(self.heads, self.places, strict=True)
        ]

    def _mapped(self, least: int) -> memoryview:
        for _ in range(_TRIES):
            try:
                with open(self.path, "rb") as file:
                    if os.fstat(file.fileno()).st_size >= least:
                        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            except FileNotFoundError:
                if not os.path.isdir(os.path.dirname(self.path)):
                    break  # the run has ended
            time.sleep(_PAUSE)  # folders of networks may lag behind
        raise OSError(f"{self.path} is not there on {platform.node()}, or not whole")

    def remove(self) -> None:
        """Remove the file; whoever has mapped it may go on reading."""
        Path(self.path).unlink(missing_ok=True)
