"""Payloads of earlier runs, by content: an interrupted or repeated run encodes nothing twice.

One file for each weight, named by a hash of everything the payload follows from. Files are written
beside their place and renamed, so a killed run leaves only whole ones; a file whose checksum or
layout is wrong is encoded again and replaced.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec, Payload
from onnxcomp.passes.encoding.stored_arrays import read_arrays, write_arrays
from onnxcomp.passes.weight import Array, Attribute, WeightSite

__all__ = [
    "PayloadCache",
    "code_version",
    "payload_of",
    "plain_attributes",
    "stored_payload_of",
]

log = logging.getLogger(__name__)

# Changes whenever the files do; what is in them also follows from the code of the encoders.
FORMAT = 4

# Elements of a weight that are hashed at a time.
_HASHED = 1 << 20


@functools.cache
def _own_code() -> str:
    """A hash of all codecs of this package and of the native encoders."""
    from onnxcomp.passes import codecs
    from onnxcomp.passes.codecs.hyper import native

    digest = hashlib.sha256()
    files = sorted(Path(codecs.__file__).parent.rglob("*.py"))
    library = native.library_path()
    for file in [*files, *([] if library is None else [library])]:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def code_version(codec: Codec) -> str:
    """A hash of the code that payloads follow from: all our codecs and the native encoders.

    A codec of another package adds the file that defines it.
    """
    name = type(codec).__module__
    file = getattr(sys.modules.get(name), "__file__", None)
    if name.startswith("onnxcomp.") or file is None:
        return _own_code()
    return f"{_own_code()}.{hashlib.sha256(Path(file).read_bytes()).hexdigest()}"


def _running(process: int) -> bool:
    """Whether there is such a process."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to somebody else
        return True
    return True


def _abandoned(part: Path) -> bool:
    """Whether a file was begun by a process of this machine that runs no more."""
    _, owner, _, rest = (*part.name.split(".", 3), "", "", "")[:4]
    host = rest.removesuffix("part").removesuffix(".")
    return host in ("", platform.node()) and not (owner.isdecimal() and _running(int(owner)))


class PayloadCache:
    """A folder of payloads. Files that a killed run has begun are removed when it is opened.

    Args:
        folder: Made when it does not exist.
        lasting: Whether it is there for other runs; if not, nothing is kept for one that is killed.
        make: False to use a folder as it is, and fail to write where there is none.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, lasting: bool = True, make: bool = True
    ) -> None:
        self.folder = Path(folder)
        self.lasting = lasting
        if not make:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"the cache folder {str(self.folder)!r} cannot be created: {error.strerror}",
                hint="give another folder with --cache, or leave it out",
            ) from error
        for part in self.folder.glob("*.part"):
            if _abandoned(part):
                with contextlib.suppress(OSError):
                    part.unlink()

    def key(self, site: WeightSite, weight: Array, codec: Codec, params: Params) -> str:
        """Name of the payload: a hash of weight, codec, parameters and the encoders' code.

        Args:
            site: Where the weight lives; its name does not matter, its element type does.
            weight: Canonical matrix ``(rows, length)``; float32 values count.
            codec: The codec.
            params: Its settings.
        """
        facts = [
            FORMAT,
            code_version(codec),
            codec.name,
            params.to_json(),
            list(weight.shape),
            site.dtype,
        ]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        step = max(1, _HASHED // max(1, weight.shape[1]))
        for row in range(0, len(weight), step):
            digest.update(np.ascontiguousarray(weight[row : row + step], np.float32).data)
        return digest.hexdigest()

    def path(self, key: str) -> Path:
        """The file of a payload."""
        return self.folder / f"{key}.payload"

    def get(self, key: str, site: WeightSite, codec: Codec, params: Params) -> Payload | None:
        """The payload, or None when there is none that is whole and fits the codec's layout."""
        return self.measured(key, site, codec, params)[0]

    def measured(
        self, key: str, site: WeightSite, codec: Codec, params: Params
    ) -> tuple[Payload | None, float | None]:
        """The payload as `get` gives it, and its error where that was stored with it."""
        found = read_arrays(self.path(key))
        if found is None:
            return None, None
        head, tensors = found
        return stored_payload_of(tensors, head["attributes"], site, codec, params), head["error"]

    def put(self, key: str, payload: Payload, error: float | None = None) -> bool:
        """Store a payload under its key, replacing what is there; whether that could be done.

        Args:
            key: Its name.
            payload: The payload.
            error: Relative error of the decoded weight, where that is known.
        """
        return self.put_tensors(key, payload.tensors, payload.attributes, error)

    def put_tensors(
        self,
        key: str,
        tensors: Mapping[str, Array],
        attributes: Mapping[str, Attribute],
        error: float | None = None,
    ) -> bool:
        """The same for the parts of a payload."""
        head = {"attributes": plain_attributes(attributes), "error": error}
        return self.write(self.path(key), head, tensors)

    def write(self, path: Path, head: Mapping[str, Any], arrays: Mapping[str, Array]) -> bool:
        """Write a file of the folder beside its place, then rename it.

        Returns:
            Whether it is there; where it is not, the log says why.
        """
        writer = f"{os.getpid()}.{threading.get_ident()}.{platform.node()}"
        part = self.folder / f"{path.stem}.{writer}.part"
        try:
            write_arrays(part, head, arrays)
            part.replace(path)
        except OSError as error:  # a full disk, say: the run itself does not need the file
            log.warning("the cache cannot be written: %s", error)
            return False
        finally:
            with contextlib.suppress(OSError):
                part.unlink()
        return True


def payload_of(
    tensors: Mapping[str, Array],
    attributes: Mapping[str, Attribute],
    site: WeightSite,
    codec: Codec,
    params: Params,
) -> Payload:
    """A payload from what is its own; what it shares with others follows from its settings."""
    return Payload(tensors, codec.shared(site, params), attributes)


def stored_payload_of(
    tensors: Mapping[str, Array],
    stored: Mapping[str, Any],
    site: WeightSite,
    codec: Codec,
    params: Params,
) -> Payload | None:
    """A payload of what lay in a file; None where it does not fit the codec's layout.

    Args:
        tensors: Its own tensors.
        stored: Its attributes as `plain_attributes` gives them.
        site: Where the weight lives.
        codec: The codec.
        params: Its settings.
    """
    if not _fits(tensors, codec, site, params):
        return None
    attributes = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    return payload_of(tensors, attributes, site, codec, params)


def plain_attributes(attributes: Mapping[str, Attribute]) -> dict[str, object]:
    """Attributes of a payload as JSON holds them."""
    return {
        key: value if isinstance(value, int | float | str) else [int(item) for item in value]
        for key, value in attributes.items()
    }


def _fits(tensors: Mapping[str, Array], codec: Codec, site: WeightSite, params: Params) -> bool:
    layout = codec.layout(site, params)
    return tensors.keys() == layout.keys() and all(
        tensors[name].shape == want.shape and tensors[name].dtype == want.dtype
        for name, want in layout.items()
    )
