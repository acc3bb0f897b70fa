"""Fits of convolutions in groups and transposed ones, and statistics of normalisations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp.passes.analysis.prune_report import PruneReport
from onnxcomp.passes.ir.model import load, save
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.prune.axes import analyse
from onnxcomp.passes.transforms.prune.consumers import Consumer, find_consumers
from onnxcomp.passes.transforms.prune.feeds import probe_feeds
from onnxcomp.passes.transforms.prune.options import PruneOptions
from onnxcomp.passes.transforms.prune.prepare import prepare
from onnxcomp.passes.transforms.prune.pruning import prune
from onnxcomp.runtime.evaluate import run_model

from .graphs import Draft

IMAGES = {"x": ["n", 4, 6, 6]}


def images(seed: int, count: int = 24) -> list[dict[str, Any]]:
    """Inputs with correlated channels."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((4, 4))
    noise = rng.standard_normal((count, 4, 4, 6, 6))
    return [{"x": np.einsum("cd,ndhw->nchw", mixing, x).astype(np.float32)} for x in noise]


def grouped(seed: int) -> onnx.ModelProto:
    """A convolution in two groups that reads 16 channels, and one that joins them."""
    d = Draft(seed=seed)
    a = d.add("Relu", d.add("Conv", "x", d.weight(16, 4, 1, 1), d.weight(16)))
    a = d.add("Conv", a, d.weight(8, 8, 3, 3, scale=0.1), d.weight(8), group=2)
    y = d.add("Conv", d.add("Relu", a), d.weight(3, 8, 1, 1))
    return d.model(IMAGES, {y: ["n", 3, 4, 4]})


def transposed(seed: int) -> onnx.ModelProto:
    """A transposed convolution whose windows overlap."""
    d = Draft(seed=seed)
    a = d.add("Relu", d.add("Conv", "x", d.weight(16, 4, 1, 1), d.weight(16)))
    y = d.add("ConvTranspose", a, d.weight(16, 3, 3, 3), d.weight(3), strides=[2, 2])
    return d.model(IMAGES, {y: ["n", 3, 13, 13]})


def fused(seed: int) -> onnx.ModelProto:
    """A convolution with its activation, as ONNX Runtime writes it."""
    d = Draft(seed=seed, **{"com.microsoft": 1})
    a = d.add("Relu", d.add("Conv", "x", d.weight(16, 4, 1, 1), d.weight(16)))
    a = d.add("FusedConv", a, d.weight(8, 16, 1, 1), d.weight(8), domain="com.microsoft",
              activation="Relu")  # fmt: skip
    y = d.add("Conv", a, d.weight(3, 8, 1, 1))
    return d.model(IMAGES, {y: ["n", 3, 6, 6]})


def normalised(seed: int) -> onnx.ModelProto:
    """Convolutions without biases before normalisations that know their statistics."""
    d = Draft(seed=seed)
    rng = np.random.default_rng(seed)

    def norm(x: str, channels: int) -> str:
        mean, variance = d.weight(channels), d.constant(rng.random(channels).astype("f") + 0.5)
        return str(d.add("BatchNormalization", x, d.weight(channels), d.weight(channels), mean,
                         variance))  # fmt: skip

    a = d.add("Relu", norm(d.add("Conv", "x", d.weight(24, 4, 1, 1)), 24))
    a = d.add("Relu", norm(d.add("Conv", a, d.weight(8, 24, 1, 1)), 8))
    y = d.add("Conv", a, d.weight(3, 8, 1, 1))
    return d.model(IMAGES, {y: ["n", 3, 6, 6]})


def pruned(
    proto: onnx.ModelProto, folder: Path, how: str = "fit", ratio: float = 0.3, **more: Any
) -> tuple[PruneReport, float]:
    """The report, and the relative squared error on inputs that pruning has not seen."""
    model = load(proto)
    canonicalize(model)
    options = PruneOptions(ratio=ratio, compensate=how, **more)  # type: ignore[arg-type]
    report = prune(model, options, feeds=images(0))
    onnx.save(proto, folder / "before.onnx")
    save(model, folder / "after.onnx")
    held = images(0, 40)[24:]
    exact, own = (
        np.concatenate([next(iter(run.values())) for run in run_model(folder / name, held)])
        for name in ("before.onnx", "after.onnx")
    )
    return report, float(np.square(exact - own).sum() / np.square(exact).sum())


@pytest.mark.parametrize("make", [grouped, transposed, fused, normalised])
def test_fits_help(make: Any, tmp_path: Path) -> None:
    errors = [
        [pruned(make(seed), tmp_path, how)[1] for seed in range(3)] for how in ("fit", "none")
    ]
    assert np.mean(errors[0]) < 0.7 * np.mean(errors[1])


def consumers(proto: onnx.ModelProto) -> list[Consumer]:
    model = load(proto)
    canonicalize(model)
    prepare(model)
    return find_consumers(analyse(model, probe_feeds(model)))


def test_each_group_of_a_convolution_is_a_product() -> None:
    parts = [c for c in consumers(grouped(0)) if c.groups == 2]
    assert [part.name[-3:] for part in parts] == ["[0]", "[1]"]
    tensor = parts[0].weight.const_value
    assert tensor is not None
    array = tensor.numpy()
    whole = array
    for part in parts:
        matrix = part.matrix(array)
        assert matrix.shape == (4, 8 * 9)
        np.testing.assert_array_equal(part.stored(array, matrix), array)
        whole = part.stored(whole, np.zeros_like(matrix))
    assert not whole.any()
    x = np.arange(2 * 16 * 9, dtype=np.float32).reshape(2, 16, 3, 3)
    np.testing.assert_array_equal(parts[1].vectors(x)[:, 0], x[:, 8, 0, 0])


@pytest.mark.parametrize("make", [grouped, transposed, fused])
def test_products_of_vectors_are_what_convolutions_compute(make: Any, tmp_path: Path) -> None:
    """Without overlap the outputs of all parts are those of the node."""
    proto = make(1)
    own = consumers(proto)
    one = next(c for c in own if c.groups == 2 or c.node.op_type in ("ConvTranspose", "FusedConv"))
    parts = [c for c in own if c.node is one.node]
    x = np.random.default_rng(0).standard_normal((1, 16, 3, 3)).astype(np.float32)
    tensor = one.weight.const_value
    assert tensor is not None
    made = [part.vectors(x) @ part.matrix(tensor.numpy()).T for part in parts]
    name = one.node.op_type
    if name == "ConvTranspose":
        expected = np.einsum("nchw,cokl->nhwokl", x, tensor.numpy()).reshape(9, -1)
    elif name == "FusedConv":
        expected = np.einsum("nchw,oc->nhwo", x, tensor.numpy()[:, :, 0, 0]).reshape(9, -1)
    else:
        halves = zip(np.split(x, 2, axis=1), np.split(tensor.numpy(), 2), strict=True)
        expected = np.concatenate([np.einsum("nchw,ochw->no", *half) for half in halves], axis=1)
    np.testing.assert_allclose(np.concatenate(made, axis=1), expected, rtol=1e-4, atol=1e-4)


def test_statistics_follow_what_normalisations_read(tmp_path: Path) -> None:
    report, _ = pruned(normalised(0), tmp_path, ratio=0.5)
    assert report.norms
    assert all(norm.after <= norm.before for norm in report.norms)
    assert any(norm.used != "stored" for norm in report.norms)
    without, _ = pruned(normalised(0), tmp_path, "none", ratio=0.5)
    assert without.norms == () and without.fits == ()


def test_means_alone_follow_where_only_biases_may_change(tmp_path: Path) -> None:
    report, _ = pruned(normalised(0), tmp_path, "bias", ratio=0.5, score="flap")
    assert {norm.used for norm in report.norms} <= {"means", "stored"}


def test_statistics_before_what_is_pruned_stay(tmp_path: Path) -> None:
    proto = normalised(0)
    report, _ = pruned(proto, tmp_path, ratio=0.3)
    first = proto.graph.node[1].input[3]
    assert first not in [norm.name for norm in report.norms]
