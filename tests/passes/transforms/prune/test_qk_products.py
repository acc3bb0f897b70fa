"""Positions of queries and keys: what their removal is expected to change, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.passes.ir.model import load, save
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.prune.axes import Analysis, analyse
from onnxcomp.passes.transforms.prune.consumers import find_consumers
from onnxcomp.passes.transforms.prune.cost import Ledger
from onnxcomp.passes.transforms.prune.feeds import probe_feeds
from onnxcomp.passes.transforms.prune.groups import Groups, find_groups
from onnxcomp.passes.transforms.prune.options import PruneOptions
from onnxcomp.passes.transforms.prune.prepare import prepare
from onnxcomp.passes.transforms.prune.pruning import prune
from onnxcomp.passes.transforms.prune.qk_products import _observe, _pairs, qk_steps
from onnxcomp.passes.transforms.prune.walk import Side
from onnxcomp.runtime.evaluate import run_model

from .graphs import GRAPHS

NAMES = ["attention", "attention with shared keys", "MultiHeadAttention", "Attention of opset 23"]


def feeds(count: int = 12) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((10, 10))
    return [
        {"x": (rng.standard_normal((2, 7, 10)) @ mixing).astype(np.float32)} for _ in range(count)
    ]


def analysed(name: str) -> tuple[Analysis, Groups]:
    model = load(GRAPHS[name]())
    canonicalize(model)
    prepare(model)
    analysis = analyse(model, probe_feeds(model))
    return analysis, find_groups(analysis)


@pytest.mark.parametrize("name", NAMES)
def test_positions_of_queries_and_keys_have_steps(name: str) -> None:
    analysis, groups = analysed(name)
    steps = qk_steps(
        analysis, groups.groups, find_consumers(analysis), Ledger(analysis, groups), feeds(),
        least=0.3, round_to=8,
    )  # fmt: skip
    assert len(steps) == 1
    size = steps[0][0].group.size
    assert len(steps[0]) == size - max(1, int(np.ceil(0.3 * size)))
    assert all(step.loss >= 0.0 and step.cost > 0.0 for step in steps[0])
    assert steps[0][-1].loss > steps[0][0].loss


def test_the_expected_change_of_scores_is_that_of_all_queries_and_keys() -> None:
    """One sample, whose queries and keys are paired in all ways, as attention pairs them."""
    analysis, groups = analysed("MultiHeadAttention")
    one = [{"x": feeds(1)[0]["x"][:1]}]
    (pair,) = _pairs(analysis, groups.groups, find_consumers(analysis))
    _observe(analysis, [pair], one, None)
    q, k = _values(analysis, pair.product.wanted, one)
    slots = np.split(np.arange(len(pair.matrix)), len(pair.group.slots))
    chosen = np.concatenate([slot[:3] for slot in slots])
    classes = pair.classes(chosen.tolist())
    lost = np.isin(analysis.classes(pair.product.atoms), list(classes))
    total = 0.0
    for head in range(4):
        rows = slice(8 * head, 8 * head + 8)
        change = (q[:, rows] * lost[head]) @ k[:, rows].T
        total += float(np.square(change - change.mean(axis=1, keepdims=True)).mean())
    assert pair.matrix[np.ix_(chosen, chosen)].sum() == pytest.approx(total, rel=1e-4)


def _values(analysis: Analysis, names: Any, inputs: Any) -> list[Any]:
    from onnxcomp.passes.calibration.segmented_run import Chain

    chain = Chain(analysis.model, inputs, [names])
    (found,) = chain.advance(names)
    return [found[name][0].astype(np.float64) for name in names]


def test_vectors_of_both_layouts_are_equal() -> None:
    array = np.random.default_rng(0).standard_normal((2, 5, 12)).astype(np.float32)
    flat = Side("q", (1, 3), heads=3, times=2).vectors(array)
    split = array.reshape(2, 5, 3, 4).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(flat, Side("q", (1, 3), times=2).vectors(split))
    turned = Side("k", (1, 2), times=2).vectors(split.swapaxes(2, 3))
    np.testing.assert_array_equal(flat, turned)
    assert flat.shape == (6, 10, 4)
    np.testing.assert_array_equal(flat[0], flat[1])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "MultiHeadAttention"])
def test_queries_and_keys_lose_what_matters_least(name: str, tmp_path: Path) -> None:
    """Without the keys' weak positions the output hardly changes, and the default finds them."""
    proto = GRAPHS[name]()
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    queries = next(node for node in proto.graph.node if node.op_type == "MatMul").input[1]
    weak = onnx.numpy_helper.to_array(tensors[queries]).copy()
    size = weak.shape[1] // 4
    weak.reshape(10, 4, size)[:, :, ::2] *= 1e-3
    added = next(node for node in proto.graph.node if node.op_type == "Add").input[1]
    bias = onnx.numpy_helper.to_array(tensors[added]).copy()
    bias.reshape(4, size)[:, ::2] *= 1e-3
    for key, array in ((queries, weak), (added, bias)):
        tensors[key].CopyFrom(onnx.numpy_helper.from_array(array, key))
    model = load(proto)
    canonicalize(model)
    report = prune(model, PruneOptions(ratio=0.1), feeds=feeds())
    assert [(group.name, group.kind) for group in report.groups] == [(queries, "inner")]
    onnx.save(proto, tmp_path / "before.onnx")
    save(model, tmp_path / "after.onnx")
    one = feeds(3)
    exact, own = (
        next(iter(run_model(tmp_path / f, one)[0].values())) for f in ("before.onnx", "after.onnx")
    )
    assert np.abs(exact - own).max() < 0.05 * np.abs(exact).max()
