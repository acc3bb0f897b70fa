"""What runs on the workers of a cluster: read some weights, encode them, give back the payloads.

A worker reads a weight from the model's file, which it sees in a shared folder. Payloads go back
through a folder that the client shares as well, or through the network where it does not.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import secrets
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import CompressionError, ModelError, UsageError
from onnxcomp.passes.calibration.blas_threads import use_blas_threads
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.encoding.by_values import encode_matrix
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.encoding.parcels import Parcel
from onnxcomp.passes.encoding.payload_cache import PayloadCache, code_version, payload_of
from onnxcomp.passes.ir.tensors import MappedTensor, shape_of
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.weight import Array, Attribute, Shift, WeightSite
from onnxcomp.runtime.session import import_runtime
from onnxcomp.version import __version__

__all__ = [
    "SMALL",
    "Answer",
    "Batch",
    "FilePart",
    "Item",
    "Place",
    "answer_of",
    "begun",
    "cache_of",
    "dask_setup",
    "differences",
    "encode_batch",
    "look_around",
    "versions",
]

log = logging.getLogger(__name__)

_RUNTIME = "ONNX Runtime"

# Characters of a hash that are shown, and compared.
_SHOWN = 12

# Payload bytes up to which a result goes through the network in any case.
SMALL = 1 << 16


def versions(codecs: Iterable[str] = (), *, runtime: bool = False) -> dict[str, str]:
    """What bytes follow from besides weights and settings, by name.

    Args:
        codecs: Names of codecs that may come from other packages.
        runtime: Whether they follow from what ONNX Runtime computes, too.
    """
    names = [name for name in codecs if name not in CODECS or _foreign(name)]
    major, minor, _ = platform.python_version_tuple()
    return {
        "onnxcomp": __version__,
        "code": code_version(CODECS["dense"])[:_SHOWN],
        "Python": f"{major}.{minor}",
        "numpy": np.__version__,
        **{f"codec {name}": _code_of(name) for name in sorted(names)},
        **({_RUNTIME: str(import_runtime().__version__)} if runtime else {}),
    }


def _foreign(name: str) -> bool:
    return not type(CODECS[name]).__module__.startswith("onnxcomp.")


def _code_of(name: str) -> str:
    return code_version(CODECS[name]).rpartition(".")[2][:_SHOWN] if name in CODECS else "missing"


def differences(worker: Mapping[str, str], client: Mapping[str, str]) -> str:
    """In what a worker differs from the client, with both; empty where it does not."""
    return ", ".join(
        f"{name} {worker.get(name, 'missing')} there and {own} here"
        for name, own in client.items()
        if worker.get(name) != own
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """A folder of the client, and a file in it that tells whether somebody else sees the same one.

    Attributes:
        folder: Its absolute path.
        mark: Name of the file.
    """

    folder: str
    mark: str

    @classmethod
    def marked(cls, folder: Path) -> Place:
        """Put a mark into a folder that exists."""
        mark = f"{secrets.token_hex(8)}.{os.getpid()}.0.{platform.node()}.part"
        (folder / mark).touch()
        return cls(os.path.realpath(folder), mark)

    def unmark(self) -> None:
        """Take the mark away."""
        Path(self.folder, self.mark).unlink(missing_ok=True)

    @property
    def seen(self) -> bool:
        """Whether this process sees the folder."""
        return os.path.exists(os.path.join(self.folder, self.mark))


def look_around(places: Iterable[Place]) -> tuple[dict[str, str], list[bool]]:
    """The versions of this process, and which places it sees."""
    return versions(), [place.seen for place in places]


@dataclasses.dataclass(frozen=True, slots=True)
class FilePart:
    """Where a tensor lies.

    Attributes:
        path: The file.
        offset: First byte.
        length: Bytes.
        dtype: Number of its element type in ONNX.
        shape: Its shape.
        size: Bytes of the file.
        modified: When the file was changed last, in nanoseconds.
    """

    path: str
    offset: int
    length: int
    dtype: int
    shape: tuple[int, ...]
    size: int
    modified: int

    @classmethod
    def of(cls, tensor: MappedTensor, status: os.stat_result) -> FilePart:
        """The place of a mapped tensor in a file of this status."""
        return cls(
            os.path.abspath(tensor.path), tensor.offset, tensor.length, tensor.dtype.value,
            shape_of(tensor), status.st_size, status.st_mtime_ns,
        )  # fmt: skip

    def read(self) -> Array:
        """The tensor, mapped.

        Raises:
            ModelError: There is no such file here, or it is another one.
        """
        try:
            status = os.stat(self.path)
        except OSError as error:
            raise ModelError(
                f"the worker on {platform.node()} cannot read {self.path}: {error.strerror}",
                hint="put the model into a folder that all workers see under the same path",
            ) from error
        if (status.st_size, status.st_mtime_ns) != (self.size, self.modified):
            raise ModelError(
                f"the worker on {platform.node()} sees another file at {self.path}: "
                f"{status.st_size} bytes there and {self.size} here, or of another time",
                hint="let all machines see the same folder; leave the model alone during a run",
            )
        dtype, shape = ir.DataType(self.dtype), ir.Shape(self.shape)
        return np.asarray(MappedTensor(self.path, self.offset, self.length, dtype, shape).numpy())


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One weight to encode.

    Attributes:
        site: The weight.
        choice: What the plan says about it.
        stored: The stored tensor, or where it lies.
    """

    site: WeightSite
    choice: Choice
    stored: FilePart | Array

    def read(self) -> Array:
        """The canonical matrix ``(rows, length)`` in float32."""
        return self.matrix().astype(np.float32, copy=False)

    def matrix(self) -> Array:
        """The same in the type it is stored in."""
        stored = self.stored.read() if isinstance(self.stored, FilePart) else self.stored
        return self.site.matrix(stored)


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """Weights that one task encodes.

    Attributes:
        items: The weights.
        client: Versions of the client.
        exchange: Takes payloads on their way back.
        cache: Payloads of earlier runs; None without.
        compare: Whether codecs are compared with their baselines.
        blas: Threads of linear algebra of the client; None where they are not known.
    """

    items: tuple[Item, ...]
    client: Mapping[str, str]
    exchange: Place
    cache: Place | None = None
    compare: bool = True
    blas: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What became of one weight.

    Attributes:
        name: The weight.
        error: As in `EncodedWeight`.
        reason: As there.
        note: As there.
        tensors: Tensors of the payload, or the file in the exchange that has them; None where there
            is no payload.
        attributes: Attributes of the payload.
        output_error: As in `EncodedWeight`.
        shift: As there.
    """

    name: str
    error: float
    reason: str
    note: str
    tensors: Mapping[str, Array] | Parcel | None = None
    attributes: Mapping[str, Attribute] = dataclasses.field(default_factory=dict)
    output_error: float | None = None
    shift: Shift | None = None

    def encoded(self, site: WeightSite, choice: Choice) -> EncodedWeight:
        """The weight on the client's side; its file in the exchange is removed.

        Raises:
            OSError: That file is not there, or not whole.
        """
        payload = None
        if self.tensors is not None:
            tensors = opened(self.tensors) if isinstance(self.tensors, Parcel) else self.tensors
            codec = CODECS[choice.codec]
            payload = payload_of(tensors, self.attributes, site, codec, choice.params)
        return EncodedWeight(
            site, choice, payload, self.error, self.reason, self.output_error, self.note, self.shift
        )

    def packed(self, folder: str) -> Answer:
        """The same with a large payload in a file.

        Args:
            folder: Takes the file.

        Raises:
            OSError: It cannot be written.
        """
        tensors = self.tensors
        if not isinstance(tensors, Mapping):
            return self
        if sum(tensor.nbytes for tensor in tensors.values()) <= SMALL:
            return self
        path = Path(folder, f"{secrets.token_hex(16)}.payload")
        return dataclasses.replace(self, tensors=Parcel.packed(path, [tensors]))


def opened(parcel: Parcel) -> dict[str, Array]:
    """The tensors in a file of the exchange, mapped; it goes away with them."""
    (tensors,) = parcel.opened()
    parcel.remove()
    found: dict[str, Array] = tensors
    return found


def encode_batch(batch: Batch) -> list[Answer] | CompressionError:
    """Encode the weights of a task, on one thread.

    Returns:
        An answer for each weight, or what makes them impossible wherever they are encoded: errors
        that are raised are those that another worker may not have.
    """
    wrong = begun(batch)
    if wrong is not None:
        return wrong
    cache = cache_of(batch)
    try:
        return [
            answer_of(
                encode_matrix(item.matrix, item.site, item.choice, cache, 1, compare=batch.compare),
                batch.exchange,
            )
            for item in batch.items
        ]
    except ModelError as error:
        return error


def begun(batch: Batch) -> UsageError | None:
    """Make this process ready for a task; why it cannot be, where its versions are others."""
    names = (item.choice.codec for item in batch.items)
    own = versions(names, runtime=_RUNTIME in batch.client)
    wrong = differences(own, batch.client)
    if wrong:
        return UsageError(
            f"the worker on {platform.node()} has other versions: {wrong}",
            hint="install the same onnxcomp, Python and numpy on all machines",
        )
    if batch.blas is not None:
        # Never set back: tasks on other threads of this worker ask for the same number.
        use_blas_threads(batch.blas)
    return None


def cache_of(batch: Batch) -> PayloadCache | None:
    """Payloads of earlier runs, where this process sees them."""
    if batch.cache is None or not batch.cache.seen:
        return None
    return PayloadCache(batch.cache.folder, make=False)


def answer_of(encoded: EncodedWeight, exchange: Place) -> Answer:
    """An answer; a large payload goes to the exchange, where this process sees it."""
    answer = Answer(
        encoded.site.name, encoded.error, encoded.reason, encoded.note,
        output_error=encoded.output_error, shift=encoded.shift,
    )  # fmt: skip
    payload = encoded.payload
    if payload is None:
        return answer
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in payload.tensors.items()}
    answer = dataclasses.replace(answer, tensors=tensors, attributes=dict(payload.attributes))
    if not exchange.seen:
        return answer
    try:
        return answer.packed(exchange.folder)
    except OSError as error:  # a full disk, say: the network may do
        log.warning("%s cannot be written: %s", exchange.folder, error)
        return answer


def dask_setup(worker: Any) -> None:
    """What a worker on this machine does first: leave Ctrl-C to the client."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
