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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["Parcel"]

# Arrays start at multiples of it.
_ALIGNMENT = 64

# How often a file that another machine has written is looked for, and seconds between looks.
_TRIES, _PAUSE = 20, 0.5


@dataclasses.dataclass(frozen=True, slots=True)
class Parcel:
    """A value on its way.

    Attributes:
        path: The file.
        head: The value without its arrays, pickled.
        places: First byte and size of each array in the file.
    """

    path: str
    head: bytes
    places: Sequence[tuple[int, int]]

    @classmethod
    def packed(cls, path: Path, value: object) -> Parcel:
        """Write the arrays of a value; whoever sees the file sees all of it.

        Args:
            path: The file; it is replaced where it is there.
            value: Anything that can be pickled. Arrays that are contiguous go to the file.

        Raises:
            OSError: It cannot be written.
        """
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        places: list[tuple[int, int]] = []
        with part.open("wb") as file:
            for buffer in buffers:
                file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
                data = buffer.raw()
                places.append((file.tell(), data.nbytes))
                file.write(data)
        part.replace(path)
        return cls(os.path.realpath(path), head, places)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(size for _, size in self.places)

    def opened(self) -> Any:
        """The value; its arrays are mapped, and cannot be written.

        Raises:
            OSError: The file is not there, or not whole.
        """
        if not self.nbytes:
            return pickle.loads(self.head, buffers=[b""] * len(self.places))
        least = max(start + size for start, size in self.places)
        for _ in range(_TRIES):
            try:
                with open(self.path, "rb") as file:
                    if os.fstat(file.fileno()).st_size >= least:
                        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                        arrays = [data[start : start + size] for start, size in self.places]
                        return pickle.loads(self.head, buffers=arrays)
            except FileNotFoundError:
                if not os.path.isdir(os.path.dirname(self.path)):
                    break  # the run has ended
            time.sleep(_PAUSE)  # folders of networks may lag behind
        raise OSError(f"{self.path} is not there on {platform.node()}, or not whole")

    def remove(self) -> None:
        """Remove the file; whoever has mapped it may go on reading."""
        Path(self.path).unlink(missing_ok=True)
