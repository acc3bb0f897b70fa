"""Read inputs of a model from the user's files.

An .npz holds arrays by input name; a folder holds .npz files, taken in the order of their names;
``name=file.npy`` gives one input, ``file.npy`` that of a model with a single one. An array with as
many axes as its input is one sample. An array with one axis more holds one sample for each entry of
its first axis. Samples of several arrays go together one by one; an array of a single sample goes
with all of them.

A text, ``file.txt``, is inputs of a language model: windows of its tokens, which the tokenizer
beside the model makes.

Samples of different shapes are sets in one .npz: ``onnxcomp.sets`` holds their number, and set 0 is
the arrays ``0/NAME``, each with one axis more for its samples. `onnxcomp record` writes such files.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import UsageError
from onnxcomp.runtime.signature import InputSpec, expected, fits, read_signature

__all__ = ["SETS", "Data", "load_inputs"]

Array = npt.NDArray[Any]
Feed = dict[str, Array]
PathLike = str | os.PathLike[str]

# Name of the array that says how many sets of arrays a file holds.
SETS = "onnxcomp.sets"

_TEXT = ".txt"

# Files as `--data` names them, or arrays: one sample or many.
Data = PathLike | Mapping[str, Array] | Sequence[PathLike | Mapping[str, Array]]


def load_inputs(data: Data, model: PathLike) -> list[Feed]:
    """Inputs from files or arrays, checked against the model.

    Args:
        data: An .npz, a folder of them, ``name=file.npy``, a text ``file.txt`` for a language
            model, arrays by input name, or several of these. All ``name=file.npy`` together make
            one set of arrays.
        model: The model that will run them.

    Raises:
        UsageError: A file cannot be read, or a name, shape or type does not fit the model.
        ModelError: The model cannot be read.
    """
    specs = read_signature(model)
    feeds: list[Feed] = []
    for source, arrays, stacked in _sources(data, model, specs):
        if SETS in arrays and SETS not in {spec.name for spec in specs}:
            for name, part in _sets(source, arrays):
                feeds += _samples(name, part, specs, stacked=True)
        else:
            feeds += _samples(source, arrays, specs, stacked=stacked)
    if not feeds:
        raise UsageError(f"there are no inputs in {data!r}", hint=expected(specs))
    return feeds


def _sources(
    data: Data, model: PathLike, specs: Sequence[InputSpec]
) -> Iterator[tuple[str, Mapping[str, Array], bool]]:
    """Sets of arrays, each with the words to name it in errors, and whether they hold samples.

    A plain .npy file belongs to the model's only input.
    """
    only = specs[0].name if len(specs) == 1 else None
    items: list[Any] = [data] if isinstance(data, (str, os.PathLike, Mapping)) else list(data)
    named: dict[str, Array] = {}
    for item in items:
        if isinstance(item, Mapping):
            yield "the given arrays", item, False
            continue
        name, mark, file = os.fspath(item).partition("=")
        if mark and not Path(item).exists():
            if name in named:
                raise UsageError(f"input {name!r} is given twice")
            named[name] = _array(Path(file))
        elif Path(item).suffix == _TEXT:
            from onnxcomp.runtime.language.windows import text_inputs

            yield str(item), text_inputs(Path(item), model, specs), True
        elif only is not None and Path(item).suffix == ".npy":
            yield str(item), {only: _array(Path(item))}, False
        else:
            for path in _files(Path(item)):
                yield str(path), _read(path), False
    if named:
        yield "the given files", named, False


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(path.glob("*.npz"))
        if not found:
            raise UsageError(f"{path} contains no .npz files")
        return found
    if path.suffix == ".npy":
        raise UsageError(f"{path} does not say which input it is for", hint=f"write NAME={path}")
    return [path]


def _array(path: Path) -> Array:
    loaded = _read(path)
    if not isinstance(loaded, np.ndarray):
        raise UsageError(f"{path} holds several arrays", hint="NAME=FILE takes an .npy file")
    return loaded


def _read(path: Path) -> Any:
    """An array (.npy) or a dictionary of arrays (.npz)."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            return dict(loaded)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"cannot read {path}: {error}", hint="arrays are .npy or .npz files without objects"
        ) from error


def _sets(source: str, arrays: Mapping[str, Array]) -> Iterator[tuple[str, Mapping[str, Array]]]:
    """The sets of arrays of one file, with words to name them in errors."""
    if arrays[SETS].shape != () or arrays[SETS].dtype.kind not in "iu":
        raise UsageError(f"{source}: {SETS} is no number")
    for number in range(int(arrays[SETS])):
        mark = f"{number}/"
        part = {name[len(mark) :]: a for name, a in arrays.items() if name.startswith(mark)}
        yield f"{source}, set {number}", part


def _samples(
    source: str,
    arrays: Mapping[str, Array],
    specs: Sequence[InputSpec],
    *,
    stacked: bool,
) -> Iterator[Feed]:
    """The samples of one set of arrays; `stacked` ones have an axis for samples in any case."""
    wanted = {spec.name for spec in specs}
    unknown, missing = sorted(set(arrays) - wanted), sorted(wanted - set(arrays))
    if unknown:
        raise UsageError(f"{source}: the model has no input {unknown[0]!r}", hint=expected(specs))
    if missing:
        raise UsageError(f"{source}: input {missing[0]!r} is missing", hint=expected(specs))
    stacks = {
        spec.name: _stack(source, np.asarray(arrays[spec.name]), spec, stacked) for spec in specs
    }
    counts = {name: len(stack) for name, stack in stacks.items() if len(stack) != 1}
    if len(set(counts.values())) > 1:
        raise UsageError(f"{source}: inputs have different numbers of samples: {counts}")
    for index in range(next(iter(counts.values()), 1)):
        sample = {name: stack[index % len(stack)] for name, stack in stacks.items()}
        _refuse_empty(source, sample, specs)
        yield sample


def _refuse_empty(source: str, sample: Feed, specs: Sequence[InputSpec]) -> None:
    """Refuse a sample that says nothing: without rows, or without a single element.

    Other sizes may be 0: a cache of no past positions is an input like any other.
    """
    empty = [name for name, array in sample.items() if array.ndim and array.shape[0] == 0]
    if empty or not any(array.size for array in sample.values()):
        name = next(iter(empty), next(iter(sample), ""))
        raise UsageError(
            f"{source}: input {name!r} has no rows: its shape is {list(sample[name].shape)}",
            hint=f"nothing can be learnt or compared from it; {expected(specs)}",
        )


def _stack(source: str, array: Array, spec: InputSpec, stacked: bool) -> Sequence[Array]:
    """The samples of one array, of the input's type."""
    if not stacked and fits(spec, array.shape):
        samples: Sequence[Array] = [array]
    elif array.ndim and fits(spec, array.shape[1:]):
        samples = list(array)
    else:
        raise UsageError(
            f"{source}: input {spec.name!r} is {spec.text}, not of shape {list(array.shape)}",
            hint="add an axis in front to give several samples",
        )
    return [_converted(source, np.asarray(sample), spec) for sample in samples]


def _converted(source: str, array: Array, spec: InputSpec) -> Array:
    """The array in the input's type, if that changes no more than a rounding."""
    if array.dtype == spec.dtype:
        return np.asarray(array, order="C")  # np.ascontiguousarray would give scalars an axis
    if spec.dtype.kind == "O" and array.dtype.kind in "US":
        return array.astype(object)
    integers = array.dtype.kind in "iu" and spec.dtype.kind in "iu"
    if integers:
        with_limits = np.iinfo(spec.dtype)
        fitting = array.size == 0 or (
            int(array.min()) >= with_limits.min and int(array.max()) <= with_limits.max
        )
    # Types of ml_dtypes (bfloat16) have the kind V.
    floats = array.dtype.kind == "f" and spec.dtype.kind in "fV"
    if floats or (integers and fitting):
        return np.asarray(array, spec.dtype, order="C")
    raise UsageError(f"{source}: input {spec.name!r} is {spec.text}, not {array.dtype.name}")
