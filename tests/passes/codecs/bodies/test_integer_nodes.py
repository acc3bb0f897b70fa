"""What the integer codec emits computes what its decoder says, in every opset and runtime."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.passes.codecs.integer.codec import IntegerCodec, IntegerParams
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.weight import Array, Kind, Use, WeightSite

EmittedModel = Callable[..., onnx.ModelProto]
RunModel = Callable[..., Array]

CODEC = IntegerCodec()
OPSETS = (7, 9, 10, 11, 13, 17, 21)
KINDS: tuple[Kind, ...] = ("weight", "decode", "gather", "matmul")
PARAMS = [IntegerParams(b, g, z) for b in (4, 8) for g, z in ((32, 1), (128, 0))]

# Runs every model of a folder and stores its output.
RUNTIME = """
import pathlib, sys
import numpy as np, onnxruntime as ort
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.onnx")):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    with np.load(path.with_suffix(".npz")) as feeds:
        np.save(path.with_suffix(".npy"), session.run(None, dict(feeds))[0])
print(ort.__version__)
"""


def site_of(rows: int, length: int, kind: Kind, dtype: str = "float32") -> WeightSite:
    """A weight with a product beside whatever else it is used for."""
    uses = [Use("n", "MatMul", 1, "matmul")]
    if kind in ("weight", "decode"):
        uses = [Use("n", "Conv", 1, "dense")]
    if kind == "gather":
        uses.append(Use("m", "Gather", 0, "gather"))
    return WeightSite("w", (rows, length), dtype, tuple(uses), "", rows, length, False)


def payload_of(site: WeightSite, params: IntegerParams) -> Payload:
    weight = np.random.default_rng(7).standard_normal((site.rows, site.length), np.float32)
    return CODEC.encode(site, weight, params)


def input_of(site: WeightSite, kind: Kind) -> Array | None:
    if kind == "gather":
        return np.array([[0, -1], [site.rows - 1, -site.rows]], np.int64)
    if kind == "matmul":
        x = np.random.default_rng(1).standard_normal((2, 3, site.length), np.float32)
        return x if site.dtype == "float32" else x.astype(np.float16)
    return None


def expected(site: WeightSite, payload: Payload, kind: Kind, x: Array | None) -> Array:
    weight = CODEC.decode(site, payload)
    if x is None:
        return weight
    return weight[x] if kind == "gather" else x.astype(np.float64) @ weight.T.astype(np.float64)


def assert_same(found: Array, wanted: Array, kind: Kind, length: int) -> None:
    """Weights to the bit; products within the rounding of float32 sums."""
    assert found.shape == wanted.shape
    if kind != "matmul":
        assert np.array_equal(found, wanted.astype(found.dtype))
        return
    step = np.finfo(np.float32).eps if found.dtype == np.float32 else np.finfo(found.dtype).eps
    bound = (length if found.dtype == np.float32 else 4) * step
    assert np.linalg.norm(found - wanted) <= bound * np.linalg.norm(wanted)


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_emitted_nodes_equal_the_decoder_in_every_opset(
    kind: Kind, params: IntegerParams, emitted_model: EmittedModel, run_model: RunModel
) -> None:
    for rows, length in ((37, 200), (16, 64), (3, 31)):
        site = site_of(rows, length, kind)
        payload, x = payload_of(site, params), input_of(site, kind)
        wanted = expected(site, payload, kind, x)
        for opset in OPSETS:
            model = emitted_model(CODEC, site, payload, kind, opset, x)
            onnx.checker.check_model(model)
            for optimize in (False, True):
                assert_same(run_model(model, x, optimize=optimize), wanted, kind, length)


@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 60),
    length=st.integers(1, 200),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([16, 32, 128]),
    zero_points=st.integers(0, 1),
)
@settings(max_examples=40, deadline=None)
def test_emitted_nodes_equal_the_decoder_for_all_sizes(
    emitted_model: EmittedModel,
    run_model: RunModel,
    kind: Kind,
    rows: int,
    length: int,
    bits: int,
    block: int,
    zero_points: int,
) -> None:
    site = site_of(rows, length, kind)
    payload = payload_of(site, IntegerParams(bits, block, zero_points))
    x = input_of(site, kind)
    found = run_model(emitted_model(CODEC, site, payload, kind, 13, x), x)
    assert_same(found, expected(site, payload, kind, x), kind, length)


@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_models_get_float16_results(
    kind: Kind, params: IntegerParams, emitted_model: EmittedModel, run_model: RunModel
) -> None:
    site = site_of(20, 96, kind, "float16")
    payload, x = payload_of(site, params), input_of(site, kind)
    found = run_model(emitted_model(CODEC, site, payload, kind, 17, x), x)
    assert found.dtype == np.float16
    assert_same(found, expected(site, payload, kind, x), kind, 96)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 4), (2, 1, 3)], ids=str)
def test_look_ups_take_indices_of_any_shape(
    shape: tuple[int, ...], emitted_model: EmittedModel, run_model: RunModel
) -> None:
    x = np.random.default_rng(0).integers(-37, 37, shape).astype(np.int32)
    site = site_of(37, 100, "gather")
    payload = payload_of(site, IntegerParams())
    for opset in (9, 17):
        found = run_model(emitted_model(CODEC, site, payload, "gather", opset, x), x)
        assert_same(found, expected(site, payload, "gather", x), "gather", 100)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_activations_stay_within_the_error_that_is_stated(
    bits: int, emitted_model: EmittedModel, run_model: RunModel
) -> None:
    site = site_of(64, 512, "matmul")
    plain = payload_of(site, IntegerParams(bits))
    payload = Payload(plain.tensors, plain.shared, {**plain.attributes, "precision": 1})
    x = input_of(site, "matmul")
    model = emitted_model(CODEC, site, payload, "matmul", 17, x)
    found, wanted = run_model(model, x), expected(site, payload, "matmul", x)
    assert 1e-5 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 8e-3


def operators_left(model: onnx.ModelProto, folder: Path) -> list[str]:
    """Operators of a session after ONNX Runtime has optimised the graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


def test_whole_weights_are_folded_and_decoded_ones_are_not(
    emitted_model: EmittedModel, tmp_path: Path
) -> None:
    for params in PARAMS:
        site = site_of(32, 128, "weight")
        payload = payload_of(site, params)
        folded = emitted_model(CODEC, site, payload, "weight", 17, None)
        assert operators_left(folded, tmp_path) == []
        decoded = emitted_model(CODEC, site, payload, "decode", 17, None)
        assert "DequantizeLinear" in operators_left(decoded, tmp_path)
        assert operators_left(decoded, tmp_path).count("Cast") == 0


@pytest.mark.parametrize(
    "python", [p for p in os.environ.get("ONNXCOMP_ORT_PYTHONS", "").split(":") if p] or [None]
)
def test_other_versions_of_onnx_runtime_agree(
    python: Any, emitted_model: EmittedModel, tmp_path: Path
) -> None:
    if python is None:
        pytest.skip("no other ONNX Runtime: set ONNXCOMP_ORT_PYTHONS")
    cases = {}
    for kind in KINDS:
        for number, params in enumerate(PARAMS):
            site = site_of(37, 200, kind)
            payload, x = payload_of(site, params), input_of(site, kind)
            path = tmp_path / f"{kind}{number}.onnx"
            onnx.save(emitted_model(CODEC, site, payload, kind, 13, x), path)
            feed = {"d": np.zeros(1, np.float32)} if x is None else {"x": x}
            np.savez(path.with_suffix(".npz"), **feed)
            cases[path] = (kind, expected(site, payload, kind, x))
    done = subprocess.run(
        [python, "-c", RUNTIME, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for path, (kind, wanted) in cases.items():
        assert_same(np.load(path.with_suffix(".npy")), wanted, kind, 200)
