"""One copy of the weights for all sessions of a process.

ONNX Runtime maps external data anew for each session. Their pages are in memory once, but each
mapping counts them, and weights inside the .onnx file are copied. `AddInitializer` of its C
interface takes tensors that several sessions use in place.
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcomp.errors import ModelError
from onnxcomp.runtime.session import import_runtime
from onnxcomp.runtime.structure import read_structure

if TYPE_CHECKING:
    import onnx
    import onnxruntime

__all__ = ["share_weights"]

# TensorProto's element types that numpy has, too. Others stay with ONNX Runtime.
_TYPES = {
    1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64,
    9: np.bool_, 10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64,
}  # fmt: skip
_EXTERNAL = 1

_lock = threading.Lock()
# Maps and tensors by file and state. Sessions read them to their end, so they stay.
_maps: dict[tuple[str, int, int, int], np.ndarray[Any, np.dtype[np.uint8]]] = {}
_values: dict[tuple[Any, ...], Any] = {}


def share_weights(
    session_options: onnxruntime.SessionOptions, model: str | os.PathLike[str]
) -> int:
    """Let sessions that are made with these options use one mapping of the model's external data.

    Call it for the options of each session, which may be the same object. The data file must not be
    overwritten while the process runs; to replace it, write a new file and rename it.

    Args:
        session_options: Options of sessions of `model`, and of no other.
        model: The .onnx file. Its weights have to be external data: `--external-data always`.

    Returns:
        Bytes of weights that are shared.

    Raises:
        ModelError: The model cannot be read, or has no external data to share.
    """
    path = Path(model)
    runtime = import_runtime()
    shared = 0
    with _lock:
        for tensor in read_structure(path).graph.initializer:
            if tensor.data_location == _EXTERNAL and tensor.data_type in _TYPES:
                shared += _share(session_options, runtime, path, tensor)
    if not shared:
        raise ModelError(
            f"{path} has no external data to share",
            hint="compress it with --external-data always",
        )
    return shared


def _share(options: Any, runtime: Any, model: Path, tensor: onnx.TensorProto) -> int:
    """Add one tensor to the options and return its bytes."""
    fields = {entry.key: entry.value for entry in tensor.external_data}
    name, begin = fields["location"], int(fields.get("offset", 0))
    state, file = _mapped(model, name)
    kind, dims = np.dtype(_TYPES[tensor.data_type]), tuple(tensor.dims)
    size = kind.itemsize * int(np.prod(dims, dtype=np.int64))
    if int(fields.get("length", size)) != size or begin + size > file.size or begin < 0:
        raise ModelError(f"{name} ends before the tensor {tensor.name!r} of {model} does")
    if not size:
        return 0
    key = (state, begin, tensor.data_type, dims)
    if key not in _values:
        array = file[begin : begin + size].view(kind).reshape(dims)
        _values[key] = runtime.OrtValue.ortvalue_from_numpy(array)
    options.add_initializer(tensor.name, _values[key])
    return size


def _mapped(
    model: Path, name: str
) -> tuple[tuple[str, int, int, int], np.ndarray[Any, np.dtype[np.uint8]]]:
    """The mapping of a data file, one for each state of the file."""
    normal = os.path.normpath(name)
    if os.path.isabs(name) or normal.startswith(".."):
        raise ModelError(f"{model} names data outside its folder: {name!r}")
    path = model.parent / normal
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            state = (str(about.st_dev), about.st_ino, about.st_size, about.st_mtime_ns)
            if state not in _maps:
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                _maps[state] = np.frombuffer(view, np.uint8)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise ModelError(
            f"external data of {model} cannot be read: {error}",
            hint="keep the model and its data files together in one folder",
        ) from error
    return state, _maps[state]
