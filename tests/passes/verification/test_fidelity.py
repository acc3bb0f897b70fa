"""The fidelity gate accepts what is right and says what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp.errors import ModelError, RuntimeMissingError, UsageError, VerifyError
from onnxcomp.ops import library_path
from onnxcomp.passes.codecs.hyper import bodies as hyper_bodies
from onnxcomp.passes.codecs.hyper import format as hyper_format
from onnxcomp.passes.verification.fidelity import verify
from onnxcomp.passes.weight import DOMAIN

Change = Callable[[onnx.ModelProto], None]
ROWS, LENGTH, GROUP = 24, 64, 32


def save(
    path: Path, node: onnx.NodeProto, tensors: dict[str, Any], functions: list[onnx.FunctionProto]
) -> Path:
    nodes = [node, helper.make_node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0)]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", LENGTH])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", ROWS]),
            helper.make_tensor_value_info("best", TensorProto.INT64, ["n"]),
        ],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=8)
    onnx.save(model, path)
    return path


@pytest.fixture
def twins(tmp_path: Path) -> tuple[Path, Path]:
    """One product and its arg-max, with dense weights and with the same weights in codes."""
    rng = np.random.default_rng(0)
    geometry = hyper_format.GroupLayout(4, 7, GROUP, ROWS, LENGTH)
    codes = {
        "codes": rng.integers(0, 256, geometry.codes_shape, dtype=np.uint8),
        "scales": rng.uniform(0.01, 0.03, geometry.scales_shape).astype(np.float16),
    }
    shared = dict(hyper_format.shared_tensors(4, 7, GROUP, ROWS, LENGTH))
    table = next(iter(shared.values()))
    dense = hyper_format.decode(*codes.values(), table, (ROWS, LENGTH), GROUP)
    product = helper.make_node(
        "HyperMatMul",
        ["x", *codes, *shared],
        ["logits"],
        domain=DOMAIN,
        extent=[ROWS, LENGTH],
        group=GROUP,
        dtype=TensorProto.FLOAT,
        precision=0,
    )
    plain = helper.make_node("MatMul", ["x", "w"], ["logits"])
    return (
        save(tmp_path / "dense.onnx", plain, {"w": np.ascontiguousarray(dense.T)}, []),
        save(tmp_path / "small.onnx", product, codes | shared, list(hyper_bodies.functions(17))),
    )


@pytest.fixture
def library() -> None:
    try:
        library_path()
    except RuntimeMissingError as error:
        pytest.skip(f"the operator library is not built: {error}")


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both forms run the definitions, so that tests do not need the library."""
    monkeypatch.setattr("onnxcomp.runtime.session.register", lambda options: None)


def changed(path: Path, change: Change) -> Path:
    model = onnx.load(path)
    change(model)
    result = path.with_name(f"changed-{path.name}")
    onnx.save(model, result)
    return result


def set_tensor(name: str, value: np.ndarray) -> Change:
    def change(model: onnx.ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(value, name))

    return change


def test_two_correct_forms_pass(twins: tuple[Path, Path], library: None) -> None:
    result = verify(*twins)
    assert result.passed
    assert result.portable.passed
    assert result.agreement.passed
    assert result.samples == 4
    for outputs in (result.outputs, result.portable.outputs, result.agreement.outputs):
        assert set(outputs) == {"logits", "best"}
        assert outputs["logits"].rel_l2 < 1e-6
        assert outputs["best"].agreement == 1.0
    result.raise_if_failed()


def test_the_json_object_has_the_agreed_names(twins: tuple[Path, Path], no_kernels: None) -> None:
    document = json.loads(json.dumps(verify(*twins).to_json(), allow_nan=False))
    assert document["passed"] is True
    for part in (document, document["portable"], document["agreement"]):
        for found in part["outputs"].values():
            assert {"rel_l2", "max_abs", "cosine", "snr_db"} <= set(found)
    assert document["outputs"]["logits"]["label_agreement"] == 1.0
    assert document["failures"] == []


def test_a_kernel_that_differs_from_its_definition_fails(
    twins: tuple[Path, Path], library: None
) -> None:
    def change(model: onnx.ModelProto) -> None:
        (body,) = (f for f in model.functions if f.name == "HyperMatMul")
        result = body.output[0]
        body.node.append(helper.make_node("Add", [result, result], ["twice"]))
        body.output[0] = "twice"

    result = verify(twins[0], changed(twins[1], change))
    assert not result.passed
    assert not result.portable.passed
    assert result.agreement.outputs["logits"].rel_l2 == pytest.approx(1.0)
    assert "with and without the library, output 'logits'" in result.failures[0]
    with pytest.raises(VerifyError, match="with and without") as caught:
        result.raise_if_failed()
    assert caught.value.exit_code == 4


def test_a_loss_is_reported_and_judged_only_by_a_tolerance(
    twins: tuple[Path, Path], no_kernels: None
) -> None:
    dense = np.asarray(numpy_helper.to_array(onnx.load(twins[0]).graph.initializer[0]))
    noise = np.random.default_rng(1).standard_normal(dense.shape).astype(np.float32)
    noise *= 0.1 * np.linalg.norm(dense) / np.linalg.norm(noise)
    reference = changed(twins[0], set_tensor("w", dense + noise))
    assert verify(reference, twins[1]).passed
    found = verify(reference, twins[1]).outputs["logits"].rel_l2
    assert 0.05 < found < 0.2
    strict = verify(reference, twins[1], tolerance=0.01)
    assert not strict.passed
    assert not strict.portable.passed
    assert strict.agreement.passed
    assert strict.failures[0].startswith("output 'logits': relative difference")


def test_inputs_of_nan_alone_are_refused(twins: tuple[Path, Path]) -> None:
    data = {"x": np.full((3, LENGTH), np.nan, np.float32)}
    with pytest.raises(UsageError, match="NaN or infinite throughout"):
        verify(*twins, data=data)
    data["x"][1] = 1.0
    assert verify(*twins, data=data).passed


def test_nan_where_the_original_has_none_fails(twins: tuple[Path, Path], no_kernels: None) -> None:
    scales = np.full((2, 2, 16, 1), np.nan, np.float16)
    result = verify(twins[0], changed(twins[1], set_tensor("scales", scales)))
    assert not result.passed
    assert "NaN" in result.failures[0]
    assert result.to_json()["outputs"]["logits"]["rel_l2"] is None


def test_a_model_that_does_not_load_fails_and_says_why(
    twins: tuple[Path, Path], no_kernels: None
) -> None:
    result = verify(twins[0], changed(twins[1], lambda model: model.ClearField("functions")))
    assert not result.passed
    assert not result.portable.passed
    assert "the compressed model does not run" in result.failures[0]
    assert result.outputs == {}


def test_a_missing_output_fails(twins: tuple[Path, Path], no_kernels: None) -> None:
    result = verify(twins[0], changed(twins[1], lambda model: model.graph.output.pop()))
    assert not result.passed
    assert result.failures == ("output 'best': is missing",)


def test_a_missing_library_is_no_verdict(
    twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ONNXCOMP_OPS_LIBRARY", str(tmp_path / "absent.so"))
    with pytest.raises(RuntimeMissingError):
        verify(*twins)


def test_models_without_own_operators_have_one_form(twins: tuple[Path, Path]) -> None:
    result = verify(twins[0], twins[0])
    assert result.passed
    assert result.fidelity_tolerance == 0.0
    assert result.outputs["logits"].snr_db is None
    assert result.portable.outputs == result.outputs


def test_inputs_come_from_the_caller(twins: tuple[Path, Path], no_kernels: None) -> None:
    x = np.ones((3, 5, LENGTH), np.float32)
    assert verify(*twins, data={"x": x}).samples == 3
    assert verify(*twins, samples=2, shapes={"x": (7, LENGTH)}).samples == 2
    with pytest.raises(UsageError, match="no input 'z'"):
        verify(*twins, data={"z": x})


def test_the_same_seed_gives_the_same_numbers(twins: tuple[Path, Path], no_kernels: None) -> None:
    assert verify(*twins, seed=3).to_json() == verify(*twins, seed=3).to_json()


def test_an_original_that_does_not_load_is_an_error(twins: tuple[Path, Path]) -> None:
    broken = changed(twins[0], lambda model: setattr(model.graph.node[0], "op_type", "Nothing"))
    with pytest.raises(ModelError, match="Nothing"):
        verify(broken, twins[1])


def test_outputs_that_are_no_tensors_are_compared(data_folder: Path) -> None:
    forest = data_folder / "models" / "sklearn_randomforest.onnx"
    result = verify(forest, forest)
    assert result.passed
    assert result.outputs["output_label"].agreement == 1.0
    assert result.outputs["output_probability.0"].rel_l2 == 0.0


def test_what_int8_adds_is_told_and_not_judged(twins: tuple[Path, Path], library: None) -> None:
    """A difference of large numbers makes much of the rounding of activations."""
    x = np.random.default_rng(3).standard_normal((5, LENGTH)).astype(np.float32)
    dense = numpy_helper.to_array(onnx.load(twins[0]).graph.initializer[0])
    offset = (0.97 * x @ dense).astype(np.float32)

    def close(model: onnx.ModelProto) -> None:
        model.graph.node[0].output[0] = "product"
        for attribute in model.graph.node[0].attribute:
            if attribute.name == "precision":
                attribute.i = 1
        model.graph.initializer.append(numpy_helper.from_array(offset, "offset"))
        model.graph.node.insert(1, helper.make_node("Sub", ["product", "offset"], ["logits"]))

    reference, small = (changed(path, close) for path in twins)
    found = verify(reference, small, data={"x": x})
    assert found.passed, found.failures
    assert found.int8 is not None
    assert found.int8.outputs["logits"].rel_l2 > 0.1
    assert found.agreement.outputs["logits"].rel_l2 < 1e-5
    assert found.outputs["logits"].rel_l2 == pytest.approx(
        found.int8.outputs["logits"].rel_l2, 0.01
    )
    assert found.to_json()["int8"]["outputs"]["logits"]["rel_l2"] > 0.1
    assert not verify(reference, small, data={"x": x}, tolerance=0.05).passed


def test_of_large_outputs_some_samples_are_kept(
    twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxcomp.passes.verification import fidelity

    rng = np.random.default_rng(5)
    samples = rng.standard_normal((7, 3, LENGTH)).astype(np.float32)
    whole = verify(*twins, data={"x": samples})
    assert whole.samples == 7
    one = 3 * (ROWS * 4 + 8)  # logits in float32 and a class for each of three rows
    monkeypatch.setattr(fidelity, "_KEPT", 3 * one)
    some = verify(*twins, data={"x": samples})
    # The samples are spread over all of them.
    chosen = verify(*twins, data={"x": samples[[0, 2, 4]]})
    assert some.samples == 3 and some.outputs == chosen.outputs != whole.outputs
    monkeypatch.setattr(fidelity, "_KEPT", 1)
    assert verify(*twins, data={"x": samples}).samples == 1


@pytest.mark.parametrize(("last", "grows"), [("Reciprocal", True), ("Tanh", False)])
def test_rounding_that_a_model_makes_larger_is_no_failure(
    last: str, grows: bool, tmp_path: Path
) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32) / 8
    names = {"x": ["b", 64], "y": ["b", 64]}
    x, y = (helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, s) for n, s in names.items())
    nodes = [helper.make_node("MatMul", ["x", "w"], ["s"]), helper.make_node(last, ["s"], ["y"])]
    graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(weight, "w")])
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), tmp_path / "m.onnx")
    found = onnxcomp.optimize(tmp_path / "m.onnx", tmp_path / "s.onnx", bits=2, min_size=0).verify
    assert found is not None and found.passed, found
    assert found.fidelity_tolerance <= 1e-2
    assert grows or found.fidelity_tolerance < 1e-5
