"""Means of convolutions stay where they were, with data and without."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp.passes.calibration.made_up_pictures import made_up_pictures
from onnxcomp.passes.codecs.hyper import native
from onnxcomp.passes.driver.mend import mend
from onnxcomp.passes.driver.retarget import retarget
from onnxcomp.passes.ir.model import load

Array = npt.NDArray[Any]
WIDTH, SIDE = 192, 16


@pytest.fixture(scope="module", autouse=True)
def encoder() -> None:
    if not native.available():
        pytest.skip("the encoder library is not built: set ONNXCOMP_ENCODERS_LIBRARY")


def _conv(number: int, *, relu: bool, group: int = 1) -> list[Any]:
    names = [f"h{number - 1}", f"w{number}", f"b{number}"]
    nodes = [helper.make_node("Conv", names, [f"c{number}"], group=group, pads=[1, 1, 1, 1])]
    if relu:
        nodes.append(helper.make_node("Relu", [f"c{number}"], [f"h{number}"]))
    return nodes


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three convolutions, the second one depthwise, with activations above zero."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (WIDTH, 3, 3, 3), "w2": (WIDTH, 1, 3, 3), "w3": (32, WIDTH, 3, 3)}
    tensors = {n: rng.standard_normal(s) / np.sqrt(np.prod(s[1:])) for n, s in shapes.items()}
    tensors |= {f"b{n + 1}": rng.uniform(0, 1, len(w)) for n, w in enumerate(tensors.values())}
    nodes = [
        *_conv(1, relu=True),
        *_conv(2, relu=True, group=WIDTH),
        *_conv(3, relu=False),
        helper.make_node("GlobalAveragePool", ["c3"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a.astype(np.float32), name) for name, a in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path_factory.mktemp("means") / "network.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def pictures(network: Path) -> list[dict[str, Array]]:
    found = made_up_pictures(load(network), seed=7)
    assert found is not None
    return [dict(feed) for feed in found]


def means(path: Path, feeds: list[dict[str, Array]]) -> Array:
    session = onnxcomp.InferenceSession(path)
    return np.mean(np.concatenate([session.run(None, feed)[0] for feed in feeds]), axis=0).ravel()


def without_shifts(compressed: Path, original: Path) -> Path:
    """The same codes with the biases of the original."""
    model, dense = onnx.load(compressed), onnx.load(original)
    biases = {t.name: t for t in dense.graph.initializer if t.name.startswith("b")}
    for tensor in model.graph.initializer:
        if tensor.name in biases:
            tensor.CopyFrom(biases[tensor.name])
    path = compressed.with_name("unshifted.onnx")
    onnx.save(model, path)
    return path


def change(path: Path, network: Path, feeds: list[dict[str, Array]]) -> float:
    return float(np.linalg.norm(means(path, feeds) - means(network, feeds)))


@pytest.mark.parametrize("with_data", [False, True])
def test_shifts_keep_means_of_outputs(
    tmp_path: Path, network: Path, pictures: list[dict[str, Array]], with_data: bool
) -> None:
    """On other pictures than those that were made up for the shifts, at equal bytes."""
    path, rng = tmp_path / "small.onnx", np.random.default_rng(3)
    noise = 0.5 * rng.standard_normal((20, 1, 3, SIDE, SIDE)).astype(np.float32)
    data = [{"h0": array} for array in noise]
    result = onnxcomp.optimize(
        network, path, bits=3, data=data if with_data else None, verify=False, tune=0, min_size=1024
    )
    plain = without_shifts(path, network)
    assert path.stat().st_size == plain.stat().st_size == result.report.output.bytes
    assert change(path, network, pictures) < 0.5 * change(plain, network, pictures)


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, network: Path) -> None:
    paths = [tmp_path / f"{number}.onnx" for number in range(2)]
    for path in paths:
        onnxcomp.optimize(network, path, bits=4, min_size=1024, verify=False)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_models_that_read_no_picture_are_encoded_as_before() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16, 9, 9])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    graph = helper.make_graph(nodes, "g", [x], [y])
    opset = [helper.make_opsetid("", 17)]
    assert made_up_pictures(load(helper.make_model(graph, opset_imports=opset))) is None


def test_made_up_pictures_are_smooth(pictures: list[dict[str, Array]]) -> None:
    for feed in pictures:
        x = feed["h0"]
        assert x.dtype == np.float32
        assert x.std() == pytest.approx(0.5, rel=0.05)
        steps = np.diff(x, axis=-1).std()
        assert steps < 1.1 * x.std()  # 1.41 for pixels that have nothing to do with each other


def test_shifts_outlive_other_codes_and_weights_made_dense(tmp_path: Path, network: Path) -> None:
    path, other = tmp_path / "small.onnx", tmp_path / "other.onnx"
    onnxcomp.optimize(network, path, bits=4, min_size=1024, verify=False)
    retarget(path, other, "avx2", original=network)
    for name in ("b1", "b2", "b3"):
        assert not np.array_equal(_tensor(path, name), _tensor(network, name))
        assert np.array_equal(_tensor(path, name), _tensor(other, name))
    mended = tmp_path / "mended.onnx"
    found = mend(network, path, mended, tolerance=0.006)
    assert found.path == mended
    for number in (1, 2, 3):
        wanted = network if f"w{number}" in found.blamed else path
        assert np.array_equal(_tensor(mended, f"b{number}"), _tensor(wanted, f"b{number}"))


def _tensor(path: Path, name: str) -> Array:
    tensors = {t.name: t for t in onnx.load(path).graph.initializer}
    return numpy_helper.to_array(tensors[name])
