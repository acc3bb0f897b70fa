"""Corrupted compressed models: an error or finite garbage, never a crash or a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

import onnxcomp as oc
from onnxcomp.errors import CompressionError, ModelError

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def compressed(small: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A model with one fused and one folded weight."""
    path = tmp_path_factory.mktemp("compressed") / "model.onnx"
    oc.optimize(small, path, set_=["^v$:mode=folded"], verify=False)
    return path.read_bytes()


def _tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name.endswith(name))


def _replace(model: onnx.ModelProto, name: str, array: Array) -> None:
    tensor = _tensor(model, name)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _array(model: onnx.ModelProto, name: str) -> Array:
    return numpy_helper.to_array(_tensor(model, name)).copy()


def _flip_codes(model: onnx.ModelProto) -> None:
    for name in ("w::codes", "v::codes"):
        codes = _array(model, name)
        _replace(model, name, codes ^ np.random.default_rng(1).integers(0, 256, codes.shape, "u1"))


def _scales(value: float) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        scales = _array(model, "w::scales")
        scales[0, 0, 3] = value
        _replace(model, "w::scales", scales)

    return change


def _table(entry: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        name = next(t.name for t in model.graph.initializer if ".table." in t.name)
        table = _array(model, name)
        table[5] = entry
        _replace(model, name, table)

    return change


def _reshape(name: str, *shape: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        _replace(model, name, _array(model, name).reshape(shape))

    return change


def _cut(name: str, axis: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        array = _array(model, name)
        _replace(model, name, np.ascontiguousarray(np.delete(array, -1, axis)))

    return change


def _cast(name: str, dtype: Any) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        _replace(model, name, _array(model, name).astype(dtype))

    return change


def _dim(name: str, axis: int, size: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        _tensor(model, name).dims[axis] = size

    return change


def _drop(name: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer.remove(_tensor(model, name))

    return change


def _attribute(name: str, value: Any) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            for attribute in list(node.attribute):
                if node.domain == "com.onnxcomp" and attribute.name == name:
                    node.attribute.remove(attribute)
                    if value is not None:
                        node.attribute.append(onnx.helper.make_attribute(name, value))

    return change


def _record(change: Callable[[Any], Any]) -> Callable[[onnx.ModelProto], None]:
    def apply(model: onnx.ModelProto) -> None:
        for entry in model.metadata_props:
            if entry.key == "onnxcomp":
                document = json.loads(entry.value)
                entry.value = json.dumps(change(document) or document)

    return apply


def _site(index: int, value: Any) -> Callable[[onnx.ModelProto], None]:
    def change(document: Any) -> None:
        document["sites"]["w"][index] = value

    return _record(change)


def _recipe(key: str, value: Any) -> Callable[[onnx.ModelProto], None]:
    def change(document: Any) -> None:
        for recipe in document["recipes"]:
            recipe[key] = value

    return _record(change)


def _not_json(model: onnx.ModelProto) -> None:
    for entry in model.metadata_props:
        if entry.key == "onnxcomp":
            entry.value = "{" * 100_000


def _no_functions(model: onnx.ModelProto) -> None:
    del model.functions[:]


DAMAGES: dict[str, Callable[[onnx.ModelProto], None]] = {
    "codes": _flip_codes,
    "scale NaN": _scales(np.nan),
    "scale infinite": _scales(np.inf),
    "scale largest": _scales(65504.0),
    "table -128": _table(-128),
    "table 127": _table(127),
    "codes flat": _reshape("w::codes", -1),
    "codes transposed": _reshape("w::codes", -1, 4, 16),
    "codes without a panel": _cut("w::codes", 0),
    "codes without a dword": _cut("w::codes", 2),
    "scales without a group": _cut("w::scales", 1),
    "scales without a panel": _cut("v::scales", 0),
    "table cut": _cut(".table.k4.L7", 0),
    "codes as int8": _cast("w::codes", np.int8),
    "scales as float32": _cast("w::scales", np.float32),
    "table as int64": _cast(".table.k4.L7", np.int64),
    "codes dim 2^31": _dim("w::codes", 0, 2**31),
    "codes dim -1": _dim("w::codes", 0, -1),
    "scales dim 0": _dim("w::scales", 1, 0),
    "no codes": _drop("w::codes"),
    "no table": _drop(".table.k4.L7"),
    "extent huge": _attribute("extent", [2**40, 2**40]),
    "extent larger": _attribute("extent", [257, 65]),
    "extent negative": _attribute("extent", [-1, -1]),
    "extent single": _attribute("extent", [256]),
    "extent absent": _attribute("extent", None),
    "group 64": _attribute("group", 64),
    "group 0": _attribute("group", 0),
    "group text": _attribute("group", "many"),
    "group huge": _attribute("group", 2**62),
    "precision 7": _attribute("precision", 7),
    "dtype 10": _attribute("dtype", 10),
    "no functions": _no_functions,
    "record no JSON": _not_json,
    "record a list": _record(lambda document: [1, 2, 3]),
    "record text": _record(lambda document: "text"),
    "record version": _record(lambda document: {**document, "version": 99}),
    "record no sites": _record(lambda document: {**document, "sites": {}}),
    "record sites a list": _record(lambda document: {**document, "sites": [1]}),
    "record recipe -1": _site(0, -7),
    "record recipe text": _site(0, "x"),
    "record shape text": _site(1, "abc"),
    "record shape huge": _site(1, [2**40, 2**40]),
    "record shape negative": _site(1, [-64, 256]),
    "record shape other": _site(1, [64, 255]),
    "record dtype": _site(2, "float77"),
    "record dtype none": _site(2, None),
    "record rows": _site(3, 10**12),
    "record rows text": _site(3, "64"),
    "record length": _site(4, -5),
    "record transposed": _site(5, "perhaps"),
    "record codec": _recipe("codec", "zip"),
    "record codec none": _recipe("codec", None),
    "record attributes": _recipe("attributes", {"group": "x", "extent": [1]}),
    "record attributes none": _recipe("attributes", None),
    "record group": _recipe("attributes", {"extent": [256, 64], "group": 3}),
    "record tensors": _recipe("tensors", ["codes"]),
    "record tensors none": _recipe("tensors", None),
    "record tensors number": _recipe("tensors", [1, 2]),
    "record shared": _recipe("shared", []),
    "record shared other": _recipe("shared", ["nothing"]),
    "record params": _recipe("params", [1]),
    "record mode": _recipe("mode", {"a": 1}),
}


def _run(path: Path, *, library: bool) -> None:
    """Load and run; errors are those of ONNX Runtime or ours, both are fine."""
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        if library:
            session = oc.InferenceSession(path)
        else:
            session = onnxruntime.InferenceSession(str(path), options)
        session.run(None, {"x": x})
    except CompressionError:
        pass
    except Exception as error:
        assert type(error).__module__.startswith("onnxruntime"), error


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_corrupted_model_is_an_error_or_garbage(
    compressed: bytes, tmp_path: Path, damage: str
) -> None:
    model = onnx.ModelProto.FromString(compressed)
    DAMAGES[damage](model)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert path.read_bytes() != compressed or damage in ("precision 7", "no table")
    for library in (True, False):
        _run(path, library=library)
    output = tmp_path / "out.onnx"
    for work in (
        lambda: oc.inspect(path),
        lambda: oc.expand(path, output),
        lambda: oc.verify(path, path),
        lambda: oc.optimize(path, output, verify=False),
    ):
        try:
            work()
        except ModelError as error:
            assert error.message and "\n" not in error.message
            assert error.hint


def test_truncated_external_codes_are_refused(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    oc.optimize(small, path, external_data="always", verify=False)
    data = path.with_name("model.onnx.data")
    data.write_bytes(data.read_bytes()[:-100])
    for work in (
        lambda: oc.inspect(path),
        lambda: oc.expand(path, tmp_path / "out.onnx"),
        lambda: oc.verify(small, path).raise_if_failed(),
        lambda: oc.InferenceSession(path),
    ):
        with pytest.raises(CompressionError):
            work()
    _run(path, library=False)
