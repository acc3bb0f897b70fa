"""What the library tells the runtime about shapes has to let the rest of a graph load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper


def with_reshape_by_shape(hyper: Any, dims: Sequence[int | str | None]) -> onnx.ModelProto:
    """HyperMatMul, then Reshape to (first, second, -1) with both cut from the product's shape."""
    model = hyper.make_model(
        "HyperMatMul", hyper.random_weight(16, 32, group=32), (TensorProto.FLOAT, dims)
    )
    graph = model.graph
    graph.initializer.extend(
        numpy_helper.from_array(np.array(value, np.int64), name)
        for name, value in {"zero": [0], "one": [1], "rest": [-1]}.items()
    )
    graph.node.extend(
        [
            helper.make_node("Shape", ["y"], ["shape"]),
            helper.make_node("Gather", ["shape", "zero"], ["first"]),
            helper.make_node("Gather", ["shape", "one"], ["second"]),
            helper.make_node("Concat", ["first", "second", "rest"], ["target"], axis=0),
            helper.make_node("Reshape", ["y", "target"], ["z"]),
        ]
    )
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    return model


@pytest.mark.parametrize("dims", [(None, None, 32), ("batch", None, 32), ("batch", "time", 32)])
def test_unknown_dims_do_not_become_values_of_a_reshape(
    hyper: Any, open_session: Callable[..., Any], dims: Sequence[int | str | None]
) -> None:
    session = open_session(with_reshape_by_shape(hyper, dims))
    x = np.ones((2, 3, 32), np.float32)
    assert session.run(None, {"x": x})[0].shape == (2, 3, 16)
