"""Weights that sharing would harm stay dense, and every shared one is compared with its rival."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp.errors import UsageError
from onnxcomp.passes.report.report import SiteReport

ROWS, LENGTH, DIMENSIONS = 96, 128, 8


def inputs(count: int, seed: int) -> np.ndarray[Any, Any]:
    """Rows near a space of few dimensions."""
    space = np.random.default_rng(0).standard_normal((DIMENSIONS, LENGTH))
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((count, DIMENSIONS)) @ space
    return (rows + 0.02 * rng.standard_normal(rows.shape)).astype(np.float32)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """One product with normal weights."""
    weight = np.random.default_rng(1).standard_normal((LENGTH, ROWS), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", LENGTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", ROWS])],
        [numpy_helper.from_array(weight, "w")],
    )
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=inputs(2000, 2))
    return tmp_path / "m.onnx"


def compiled(model: Path, settings: str, *, fitted: bool = False) -> SiteReport:
    """What became of the weight."""
    result = onnxcomp.optimize(
        model,
        model.with_name("out.onnx"),
        method="hash",
        set_=f".*:{settings}",
        data=model.with_name("x.npz") if fitted else None,
    )
    assert result.verify is not None and result.verify.passed
    (site,) = result.report.sites
    return site


def test_a_weight_that_sharing_would_harm_stays_dense(model: Path) -> None:
    site = compiled(model, "method=hash,map=fold,compression=4,memory=float16")
    assert site.method == "dense"
    assert "hash has error 0.86" in site.reason
    assert "hyper 0.1" in site.reason and "0.5 is the limit" in site.reason
    assert {node.op_type for node in onnx.load(model.with_name("out.onnx")).graph.node} == {
        "MatMul"
    }


def test_who_insists_gets_it_and_is_told_what_the_rival_does(model: Path) -> None:
    site = compiled(model, "method=hash,map=fold,compression=4,memory=float16,limit=1")
    assert site.method == "hash"
    assert site.note.startswith("hash has error 0.86") and "hyper 0.1" in site.note


def test_a_loss_is_warned_of_with_the_way_to_have_none(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled(model, "method=hash,map=fold,compression=4,memory=float16")
    assert "lose up to" not in caplog.text  # it stayed dense
    compiled(model, "method=hash,map=fold,compression=4,memory=float16,limit=1")
    assert "hash loses up to 86 % (1.3 dB) of 1 weight without training for it" in caplog.text
    assert "torch.onnx.export" in caplog.text


def test_inputs_of_few_dimensions_make_sharing_harmless(model: Path) -> None:
    site = compiled(model, "method=hash,map=fold,compression=4,memory=float16", fitted=True)
    assert site.method == "hash"
    assert site.output_error is not None and site.output_error < 0.2
    assert "hash has error 0." in site.note


def test_a_limit_that_is_not_positive_is_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="limit"):
        compiled(model, "method=hash,limit=0")
