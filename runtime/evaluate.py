"""Run a model on inputs and return what comes out, as plain arrays by output name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import ModelError
from onnxcomp.runtime.session import open_session

if TYPE_CHECKING:
    import onnxruntime

__all__ = [
    "Feed",
    "Outputs",
    "cannot_run",
    "iterate_model",
    "named_arrays",
    "run_model",
    "run_session",
    "runner",
    "to_array",
    "to_runtime_value",
]

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]
Outputs = dict[str, Array]

PathLike = str | os.PathLike[str]


def run_session(session: onnxruntime.InferenceSession, feed: Feed) -> Outputs:
    """Run a session once.

    Args:
        session: The session.
        feed: Arrays by input name; types of ml_dtypes (bfloat16) included.

    Returns:
        Arrays by output name. An output that is not a tensor becomes one array for each part:
        ``name[0]`` for the items of a sequence, ``name.key`` for the values of a map (in a
        sequence of maps: one array over the sequence for each key).

    Raises:
        ModelError: ONNX Runtime refuses the input or fails.
    """
    names = [output.name for output in session.get_outputs()]
    return named_arrays(zip(names, runner(session)(feed), strict=True))


def named_arrays(values: Iterable[tuple[str, Any]]) -> Outputs:
    """Outputs by name as arrays, see `run_session`."""
    result: Outputs = {}
    for name, value in values:
        result.update(_arrays(name, value))
    return result


def runner(session: onnxruntime.InferenceSession) -> Callable[[Feed], list[Any]]:
    """A function that runs a session on arrays and returns its outputs as they come.

    Models with inputs or outputs of a type that numpy does not have go through ONNX Runtime's own
    values. The function raises `ModelError` where ONNX Runtime refuses the input or fails.
    """
    names = [output.name for output in session.get_outputs()]
    kinds = [value.type for value in (*session.get_inputs(), *session.get_outputs())]
    foreign = any("bfloat16" in kind for kind in kinds)

    def run(feed: Feed) -> list[Any]:
        """All outputs, in the model's order."""
        try:
            if not foreign:
                return list(session.run(names, feed))
            given = {name: to_runtime_value(np.asarray(array)) for name, array in feed.items()}
            return [to_array(value) for value in session.run_with_ort_values(names, given)]
        except Exception as error:  # the classes differ between versions and share no base
            raise cannot_run(error) from error

    return run


def cannot_run(error: Exception) -> ModelError:
    """What ONNX Runtime raised in a run as an error of ours."""
    return ModelError(f"ONNX Runtime cannot run the model: {error}")


def to_runtime_value(array: Array) -> Any:
    """An array as a value of ONNX Runtime; bfloat16 through its bytes."""
    import onnx
    from onnxruntime import OrtValue

    if array.dtype.name != "bfloat16":
        return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    return OrtValue.ortvalue_from_numpy_with_onnx_type(
        np.ascontiguousarray(array).view(np.uint16), onnx.TensorProto.BFLOAT16
    )


def to_array(value: Any) -> Any:
    """A runtime value as an array; bfloat16 through its bytes."""
    if "bfloat16" not in value.data_type():
        return value.numpy()
    import ctypes

    import ml_dtypes

    shape = tuple(value.shape())
    size = int(np.prod(shape, dtype=np.int64))
    if size == 0:
        return np.empty(shape, ml_dtypes.bfloat16)
    pointer = ctypes.cast(value.data_ptr(), ctypes.POINTER(ctypes.c_uint16))
    return np.ctypeslib.as_array(pointer, (size,)).view(ml_dtypes.bfloat16).reshape(shape).copy()


def _arrays(name: str, value: Any) -> Iterator[tuple[str, Array]]:
    """The tensors of an output."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _arrays(f"{name}.{key}", item)
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for key in value[0]:
            column = [item[key] for item in value if key in item]
            yield f"{name}.{key}", np.asarray(column)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _arrays(f"{name}[{index}]", item)
    elif value is not None:  # None: an optional output without a value
        yield name, np.asarray(value)


def iterate_model(
    model: PathLike, feeds: Iterable[Feed], *, library: bool = True, threads: int | None = None
) -> Iterator[Outputs]:
    """Run a model on one input after the other; the session lives as long as the iteration.

    Args:
        model: The model.
        feeds: Its inputs.
        library: Whether the operator library is used where the model needs it.
        threads: Threads of one operator.

    Raises:
        RuntimeMissingError: ONNX Runtime or the library is missing.
        ModelError: ONNX Runtime cannot load or run the model.
    """
    session = open_session(model, library=None if library else False, threads=threads)
    for feed in feeds:
        yield run_session(session, feed)


def run_model(
    model: PathLike, feeds: Iterable[Feed], *, library: bool = True, threads: int | None = None
) -> list[Outputs]:
    """`iterate_model` as a list."""
    return list(iterate_model(model, feeds, library=library, threads=threads))
