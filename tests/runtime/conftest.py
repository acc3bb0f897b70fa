"""Small models: a dense one, its compressed twin, and whatever one node makes."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.errors import RuntimeMissingError
from onnxcomp.ops import library_path
from onnxcomp.passes.codecs.hyper import bodies as hyper_bodies
from onnxcomp.passes.codecs.hyper import format as hyper_format
from onnxcomp.passes.weight import DOMAIN

Array = np.ndarray[Any, Any]
SaveModel = Callable[..., Path]


@pytest.fixture
def save_model(tmp_path: Path) -> SaveModel:
    """Writes a model of the given nodes; values are ``name=(element type, shape)``."""

    def save(
        nodes: Sequence[onnx.NodeProto],
        inputs: Mapping[str, tuple[int, Sequence[Any]]],
        outputs: Mapping[str, tuple[int, Sequence[Any]]],
        initializers: Mapping[str, Array] | None = None,
        *,
        functions: Sequence[onnx.FunctionProto] = (),
        name: str = "model.onnx",
    ) -> Path:
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info(key, *value) for key, value in inputs.items()],
            [helper.make_tensor_value_info(key, *value) for key, value in outputs.items()],
            [numpy_helper.from_array(value, key) for key, value in (initializers or {}).items()],
        )
        imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
        model = helper.make_model(
            graph, opset_imports=imports, functions=list(functions), ir_version=8
        )
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def twins(save_model: SaveModel) -> tuple[Path, Path]:
    """A model (ids -> table look-up -> product) and the same model with weights in codes."""
    rng = np.random.default_rng(0)
    ids = {"ids": (TensorProto.INT64, ["batch", "seq"])}
    logits = {"logits": (TensorProto.FLOAT, ["batch", "seq", 40])}
    dense: dict[str, Array] = {}
    codes: dict[str, Array] = {}
    inputs: dict[str, list[str]] = {}
    for name, rows, length in (("table", 50, 64), ("head", 40, 64)):
        geometry = hyper_format.GroupLayout(4, 7, 32, rows, length)
        tensors = {
            f"{name}.codes": rng.integers(0, 256, geometry.codes_shape, dtype=np.uint8),
            f"{name}.scales": rng.uniform(0.01, 0.03, geometry.scales_shape).astype(np.float16),
        }
        shared = dict(hyper_format.shared_tensors(4, 7, 32, rows, length))
        inputs[name] = [*tensors, *shared]
        values = next(iter(shared.values()))
        dense[name] = hyper_format.decode(*tensors.values(), values, (rows, length), 32)
        codes |= tensors | shared
    dense["head"] = np.ascontiguousarray(dense["head"].T)
    plain = [
        helper.make_node("Gather", ["table", "ids"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"]),
    ]
    small = [
        helper.make_node(
            "HyperGather",
            ["ids", *inputs["table"]],
            ["hidden"],
            domain=DOMAIN,
            extent=[50, 64],
            group=32,
            rows=[50],
            columns=[64],
        ),
        helper.make_node(
            "HyperMatMul",
            ["hidden", *inputs["head"]],
            ["logits"],
            domain=DOMAIN,
            extent=[40, 64],
            group=32,
            dtype=TensorProto.FLOAT,
            precision=0,
        ),
    ]
    return (
        save_model(plain, ids, logits, dense, name="dense.onnx"),
        save_model(
            small, ids, logits, codes, functions=hyper_bodies.functions(17), name="small.onnx"
        ),
    )


@pytest.fixture
def library() -> Path:
    """The operator library; tests that need it skip where it is not built."""
    try:
        return library_path()
    except RuntimeMissingError as error:
        pytest.skip(f"the operator library is not built: {error}")


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONNXCOMP_OPS_LIBRARY", str(tmp_path / "absent.so"))
