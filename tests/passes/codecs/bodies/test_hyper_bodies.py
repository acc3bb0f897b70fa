"""The portable bodies compute what the numpy reference computes, in every opset and runtime."""

import dataclasses
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import onnx.reference
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxcomp.passes.codecs.hyper import bodies as hyper_bodies
from onnxcomp.passes.codecs.hyper import format as hyper_format
from onnxcomp.passes.codecs.hyper.tables import WINDINGS
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.weight import DOMAIN, Array, Kind, WeightSite

OperatorModel = Callable[..., onnx.ModelProto]
RunModel = Callable[..., Array]

OPSETS = (7, 8, 9, 10, 11, 13, 17, 21, 22, 23)
KINDS: tuple[Kind, ...] = ("weight", "decode", "gather", "matmul")

# Runs every model of a folder in another version of ONNX Runtime and stores its first output.
OTHER_RUNTIME = """
import pathlib, sys
import numpy as np, onnxruntime as ort
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.onnx")):
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        with np.load(path.with_suffix(".npz")) as feeds:
            result = session.run([session.get_outputs()[0].name], dict(feeds))[0]
        np.save(path.with_suffix(f".{level}.npy"), result)
print(ort.__version__)
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """Parameters and extent of one random weight."""

    bits: int
    state_bits: int
    group: int
    rows: int
    length: int
    dtype: str = "float32"

    @property
    def site(self) -> WeightSite:
        shape = (self.rows, self.length)
        return WeightSite("w", shape, self.dtype, (), "", *shape, transposed=False)

    def payload(self) -> Payload:
        sizes = (self.bits, self.state_bits, self.group, self.rows, self.length)
        geometry = hyper_format.GroupLayout(*sizes)
        rng = np.random.default_rng(sum(sizes))
        tensors = {
            "codes": rng.integers(0, 256, geometry.codes_shape, dtype=np.uint8),
            "scales": rng.uniform(0.001, 0.03, geometry.scales_shape).astype(np.float16),
        }
        return Payload(tensors, hyper_format.shared_tensors(*sizes), {"group": self.group})

    def decoded(self, payload: Payload) -> Array:
        """The weight by the numpy reference, float32 (rows, length)."""
        table = next(iter(payload.shared.values()))
        codes, scales = payload.tensors["codes"], payload.tensors["scales"]
        return hyper_format.decode(codes, scales, table, (self.rows, self.length), self.group)


@pytest.fixture(scope="session")
def operator_model(emitted_model: Callable[..., onnx.ModelProto]) -> OperatorModel:
    """operator_model(case, kind, opset, x): a model of one operator, without the codec's class."""

    def make(case: Case, kind: Kind, opset: int, x: Array | None) -> onnx.ModelProto:
        return emitted_model(hyper_bodies, case.site, case.payload(), kind, opset, x)

    return make


def feeds_of(x: Array | None) -> dict[str, Array]:
    return {"d": np.zeros(1, np.float32)} if x is None else {"x": x}


def input_of(case: Case, kind: Kind) -> Array | None:
    rng = np.random.default_rng(1)
    if kind == "gather":
        indices = np.array([[0, -1], [case.rows - 1, -case.rows], [case.rows // 2, -1]])
        return indices.astype(np.int64)
    if kind == "matmul":
        return rng.standard_normal((2, 3, case.length)).astype(np.float32)
    return None


def expected(case: Case, kind: Kind, x: Array | None) -> Array:
    weight = case.decoded(case.payload())
    if x is None:
        return weight
    return weight[x] if kind == "gather" else x.astype(np.float32) @ weight.T


def assert_same(found: Array, wanted: Array, kind: Kind, length: int) -> None:
    """Decoded weights to the bit; products within the rounding of float32 sums."""
    assert found.shape == wanted.shape
    if kind == "matmul":
        bound = length * np.finfo(np.float32).eps * np.abs(wanted).max(initial=1.0)
        assert np.abs(found - wanted).max(initial=0.0) <= bound
    else:
        assert np.array_equal(found, wanted)


ODD = Case(4, 7, 128, 37, 200)
CASES = (ODD, Case(1, 12, 32, 16, 32), Case(6, 12, 256, 5, 300), Case(3, 10, 64, 48, 128))


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_body_equals_the_reference_in_every_opset(
    operator_model: OperatorModel, run_model: RunModel, opset: int, kind: Kind
) -> None:
    for case in CASES:
        x = input_of(case, kind)
        model = operator_model(case, kind, opset, x)
        for optimize in (False, True):
            found = run_model(model, x, optimize=optimize)
            assert_same(found, expected(case, kind, x), kind, case.length)


@pytest.mark.parametrize(("bits", "state_bits"), sorted(WINDINGS))
@pytest.mark.parametrize("group", hyper_format.GROUPS)
def test_a_body_equals_the_reference_for_all_parameters(
    operator_model: OperatorModel, run_model: RunModel, bits: int, state_bits: int, group: int
) -> None:
    case = Case(bits, state_bits, group, 19, group + 13)
    for kind in ("weight", "gather"):
        x = input_of(case, kind)
        found = run_model(operator_model(case, kind, 17, x), x)
        assert_same(found, expected(case, kind, x), kind, case.length)


@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 70),
    length=st.integers(1, 300),
    group=st.sampled_from(hyper_format.GROUPS),
    bits=st.integers(1, 5),
)
@settings(max_examples=40, deadline=None)
def test_a_body_equals_the_reference_for_all_sizes(
    operator_model: OperatorModel,
    run_model: RunModel,
    kind: Kind,
    rows: int,
    length: int,
    group: int,
    bits: int,
) -> None:
    case = Case(bits, 7, group, rows, length)
    x = input_of(case, kind)
    found = run_model(operator_model(case, kind, 13, x), x)
    assert_same(found, expected(case, kind, x), kind, length)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 4), (2, 0), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_gather_takes_indices_of_any_shape(
    operator_model: OperatorModel, run_model: RunModel, shape: tuple[int, ...], index: type
) -> None:
    x = np.random.default_rng(0).integers(-ODD.rows, ODD.rows, shape).astype(index)
    for opset in (9, 17):
        found = run_model(operator_model(ODD, "gather", opset, x), x)
        assert_same(found, expected(ODD, "gather", x), "gather", ODD.length)


@pytest.mark.parametrize("shape", [(200,), (1, 200), (0, 200), (2, 0, 200), (5, 3, 200)], ids=str)
def test_matmul_takes_activations_of_any_rank(
    operator_model: OperatorModel, run_model: RunModel, shape: tuple[int, ...]
) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = run_model(operator_model(ODD, "matmul", 17, x), x)
    assert_same(found, expected(ODD, "matmul", x), "matmul", ODD.length)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opset", [9, 17])
def test_half_precision_models_get_float16_results(
    operator_model: OperatorModel, run_model: RunModel, kind: Kind, opset: int
) -> None:
    case = dataclasses.replace(ODD, dtype="float16")
    x = input_of(case, kind)
    x = x.astype(np.float16) if x is not None and kind == "matmul" else x
    found = run_model(operator_model(case, kind, opset, x), x)
    wanted = expected(case, kind, x)
    assert found.dtype == np.float16
    if kind == "matmul":  # one rounding to half precision, of a sum in float32
        assert np.allclose(found, wanted, rtol=2**-10, atol=1e-5)
    else:
        assert np.array_equal(found, wanted.astype(np.float16))


@pytest.mark.parametrize("kind", ["matmul", "gather"])
def test_bfloat16_models_get_bfloat16_results(
    operator_model: OperatorModel, run_model: RunModel, kind: Kind
) -> None:
    case = dataclasses.replace(ODD, dtype="bfloat16")
    x = input_of(case, kind)
    assert x is not None
    narrow = x.astype(ml_dtypes.bfloat16) if kind == "matmul" else x
    model = operator_model(case, kind, 17, narrow)
    onnx.checker.check_model(model, full_check=True)
    found = np.asarray(onnx.reference.ReferenceEvaluator(model).run(None, {"x": narrow})[0])
    assert found.dtype == ml_dtypes.bfloat16
    wide = run_model(with_float_ends(model), x)
    wanted = expected(case, kind, narrow)
    for result in (found.astype(np.float32), wide):
        assert np.allclose(result, wanted, rtol=2**-8, atol=1e-5)


def with_float_ends(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model between casts: Python cannot hand bfloat16 arrays to ONNX Runtime."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    if graph.input[0].type.tensor_type.elem_type == TensorProto.BFLOAT16:
        graph.node[0].input[0] = "narrow"
        cast = helper.make_node("Cast", ["x"], ["narrow"], to=TensorProto.BFLOAT16)
        graph.node.insert(0, cast)
        graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
    graph.node.append(
        helper.make_node("Cast", [graph.output[0].name], ["wide"], to=TensorProto.FLOAT)
    )
    graph.output[0].name = "wide"
    graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    return result


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("kind", KINDS)
def test_models_pass_the_checker_and_strict_shape_inference(
    operator_model: OperatorModel, opset: int, kind: Kind
) -> None:
    model = operator_model(ODD, kind, opset, input_of(ODD, kind))
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert len(inferred.graph.node) == len(model.graph.node)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_evaluator_agrees(
    operator_model: OperatorModel, opset: int, kind: Kind
) -> None:
    x = input_of(ODD, kind)
    model = operator_model(ODD, kind, opset, x)
    if opset < 10:  # the evaluator does not resolve an attribute of the function in Slice-1
        model = onnx.inliner.inline_local_functions(model)
    found = np.asarray(onnx.reference.ReferenceEvaluator(model).run(None, feeds_of(x))[0])
    assert_same(found, expected(ODD, kind, x), kind, ODD.length)


def test_bodies_stay_small(operator_model: OperatorModel) -> None:
    """Every inlined node costs load time, every byte is in every compressed model."""
    for opset in (7, 17):
        sizes = {body.name: body.ByteSize() for body in hyper_bodies.functions(opset)}
        assert sizes.pop("HyperExperts") < 2900  # in models with stacks of matrices only
        assert sum(sizes.values()) < 4500
        for kind in KINDS:
            model = operator_model(ODD, kind, opset, input_of(ODD, kind))
            inlined = onnx.inliner.inline_local_functions(model)
            assert len(inlined.graph.node) <= (46 if kind == "gather" else 34)  # one is Identity


def test_functions_come_after_those_they_call() -> None:
    known: set[str] = set()
    for body in hyper_bodies.functions(17):
        assert {node.op_type for node in body.node if node.domain == DOMAIN} <= known
        known.add(body.name)
    names = ("Rows", "Weight", "Decode", "Gather", "MatMul", "Experts")
    assert known == {f"Hyper{name}" for name in names}


def test_bodies_before_opset_7_are_refused() -> None:
    with pytest.raises(ValueError, match="opset 7 or later, not 6"):
        hyper_bodies.functions(6)


def test_other_runtime_versions_agree_to_the_bit(
    operator_model: OperatorModel, tmp_path: Path
) -> None:
    interpreters = os.environ.get("ONNXCOMP_ORT_PYTHONS", "")
    if not interpreters:
        pytest.skip("set ONNXCOMP_ORT_PYTHONS to interpreters with other ONNX Runtime versions")
    wanted: dict[str, tuple[Case, Kind, Array]] = {}
    for opset in (7, 9, 11, 13, 17, 21):
        for kind in KINDS:
            for number, case in enumerate(CASES):
                name, x = f"{opset}-{kind}-{number}", input_of(case, kind)
                onnx.save(operator_model(case, kind, opset, x), tmp_path / f"{name}.onnx")
                np.savez(tmp_path / f"{name}.npz", **feeds_of(x))
                wanted[name] = case, kind, expected(case, kind, x)
    for interpreter in interpreters.split(os.pathsep):
        command = [interpreter, "-c", OTHER_RUNTIME, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        for name, (case, kind, result) in wanted.items():
            for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
                found = np.load(tmp_path / f"{name}.{level}.npy")
                assert_same(found, result, kind, case.length)
