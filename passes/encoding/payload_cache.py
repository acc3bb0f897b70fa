"""Payloads of earlier runs, by content: an interrupted or repeated run encodes nothing twice.

One file for each weight, named by a hash of everything the payload follows from. Files are written
beside their place and renamed, so a killed run leaves only whole ones; a file whose checksum or
layout is wrong is encoded again and replaced.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
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
from onnxcomp.passes.weight import Array, Attribute, WeightSite

__all__ = ["PayloadCache", "code_version", "payload_of"]

log = logging.getLogger(__name__)

# Changes whenever the files do; what is in them also follows from the code of the encoders.
FORMAT = 2

_ATTRIBUTES = "__attributes__"

# Bytes of the checksum in front of a file.
_DIGEST = hashlib.sha256().digest_size


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
        make: False to use a folder as it is, and fail to write where there is none.
    """

    def __init__(self, folder: str | os.PathLike[str], *, make: bool = True) -> None:
        self.folder = Path(folder)
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
            weight: Canonical matrix, float32 ``(rows, length)``.
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
        digest.update(np.ascontiguousarray(weight).data)
        return digest.hexdigest()

    def path(self, key: str) -> Path:
        """The file of a payload."""
        return self.folder / f"{key}.payload"

    def get(self, key: str, site: WeightSite, codec: Codec, params: Params) -> Payload | None:
        """The payload, or None when there is none that is whole and fits the codec's layout."""
        tensors = self._read(key)
        if tensors is None:
            return None
        stored: dict[str, Any] = json.loads(tensors.pop(_ATTRIBUTES).tobytes())
        attributes = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        if not _fits(tensors, codec, site, params):
            return None
        return payload_of(tensors, attributes, site, codec, params)

    def _read(self, key: str) -> dict[str, Array] | None:
        try:
            stored = self.path(key).read_bytes()
        except OSError:
            return None
        if hashlib.sha256(stored[_DIGEST:]).digest() != stored[:_DIGEST]:
            return None
        with np.load(io.BytesIO(stored[_DIGEST:]), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def put(self, key: str, payload: Payload) -> bool:
        """Store a payload under its key, replacing what is there; whether that could be done."""
        return self.put_tensors(key, payload.tensors, payload.attributes)

    def put_tensors(
        self, key: str, tensors: Mapping[str, Array], attributes: Mapping[str, Attribute]
    ) -> bool:
        """The same for the parts of a payload."""
        text = json.dumps(_plain(attributes)).encode()
        body = io.BytesIO()
        arrays = {**tensors, _ATTRIBUTES: np.frombuffer(text, np.uint8)}
        np.savez(body, allow_pickle=False, **arrays)
        writer = f"{os.getpid()}.{threading.get_ident()}.{platform.node()}"
        part = self.folder / f"{key}.{writer}.part"
        try:
            with part.open("wb") as file:
                file.write(hashlib.sha256(body.getbuffer()).digest())
                file.write(body.getbuffer())
            part.replace(self.path(key))
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


def _plain(attributes: Mapping[str, Attribute]) -> dict[str, object]:
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
