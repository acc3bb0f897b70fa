"""Kernels of sparse integers, their bodies and numpy give one weight, and products as defined."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import onnxcomp
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.codecs.sparse import integers
from onnxcomp.passes.codecs.sparse.bodies import int_functions
from onnxcomp.passes.codecs.sparse.int_codec import SparseIntCodec, SparseIntParams
from onnxcomp.passes.weight import DOMAIN, Use, WeightSite

Array = npt.NDArray[Any]
CODEC = SparseIntCodec()
DTYPES = {1: np.float32, 10: np.float16}


def pruned(rows: int, length: int, zeros: float, paired: int) -> Array:
    """A weight with zeros: some share of it, or at least two of every four elements."""
    rng = np.random.default_rng(rows * 1000 + length)
    weight = rng.standard_normal((rows, length)).astype(np.float32)
    weight[rng.random((rows, length)) < zeros] = 0
    if not paired:
        return weight
    wide = np.pad(weight, ((0, 0), (0, -length % 4))).reshape(rows, -1, 4)
    np.put_along_axis(wide, np.argsort(np.abs(wide), axis=-1)[..., :2], 0, axis=-1)
    return np.ascontiguousarray(wide.reshape(rows, -1)[:, :length])


def stored(weight: Array, bits: int, group: int, paired: int) -> tuple[Payload, Array]:
    """A payload and the weight that it means."""
    use = (Use("n", "MatMul", 1, "matmul"),)
    site = WeightSite("w", weight.shape, "float32", use, "", *weight.shape, False)
    params = SparseIntParams(bits, group, paired, int(np.count_nonzero(weight)))
    payload = CODEC.encode(site, weight, params)
    assert payload.nbytes == CODEC.size(site, params)
    return payload, CODEC.decode(site, payload)


def tensors_of(payload: Payload) -> dict[str, Array]:
    return {**payload.tensors, **{k.split(".")[1]: v for k, v in payload.shared.items()}}


def model_of(
    payload: Payload, extent: tuple[int, int], opset: int = 17, **more: Any
) -> onnx.ModelProto:
    """One node with its portable body: a product where `dtype` is given, else SparseIntDecode."""
    fed = more.pop("fed", ())
    attributes = {**payload.attributes, "extent": list(extent), **more}
    names = list(integers.INT_INPUTS)
    x = ["x"] if "dtype" in more else []
    operator = "SparseIntMatMul" if x else "SparseIntDecode"
    node = helper.make_node(operator, [*x, *names], ["y"], domain=DOMAIN, **attributes)
    tensors = {name: numpy_helper.from_array(array, name)
               for name, array in tensors_of(payload).items()}  # fmt: skip
    value = helper.make_tensor_value_info
    inputs = [value("x", more["dtype"], None)] if x else []
    inputs += [value(name, tensors[name].data_type, tensors[name].dims) for name in fed]
    graph = helper.make_graph(
        *([node], "g", inputs, [value("y", more.get("dtype", 1), None)]),
        [tensors[name] for name in names if name not in fed],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(
        graph, opset_imports=imports, functions=list(int_functions(opset)), ir_version=8
    )


def run(model: onnx.ModelProto, *, library: bool = True, **feeds: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library:
        onnxcomp.register(options)
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feeds)[0])


@pytest.fixture(params=["plain", "avx2", "avx512", "neon"])
def isa(request: pytest.FixtureRequest, isas: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction set that this machine can run."""
    if request.param not in isas:
        pytest.skip(f"this machine cannot run {request.param}")
    monkeypatch.setenv("ONNXCOMP_ISA", request.param)
    return str(request.param)


def rounded(x: Array, group: int) -> tuple[Array, Array]:
    """x in int8 with a scale for each group, as spec.md of the hyper operators defines it."""
    parts = np.pad(x, ((0, 0), (0, -x.shape[1] % group))).reshape(len(x), -1, group)
    largest = np.abs(parts).max(axis=2, keepdims=True)
    codes = np.rint(parts * (np.float32(127) / largest)).astype(np.int64)
    return codes, (largest[..., 0] / np.float32(127)).astype(np.float32)


def product_int8(payload: Payload, weight: Array, x: Array, group: int) -> Array:
    """The product of precision 1 of spec.md section 6, in its order of sums."""
    scales = payload.tensors["scales"].astype(np.float32)[..., 0]
    wide = np.pad(weight, ((0, 0), (0, -weight.shape[1] % group)))
    parts = wide.reshape(len(weight), -1, group)
    codes = np.divide(parts, scales[..., None], out=np.zeros_like(parts),
                      where=scales[..., None] != 0)  # fmt: skip
    q = np.rint(codes).astype(np.int64)
    a, s = rounded(x, group)
    lanes = (np.arange(group) % 64) // 4
    total = np.zeros((len(x), len(weight), 16), np.float32)
    for g in range(q.shape[1]):
        terms = q[None, :, g] * a[:, None, g]
        sums = np.stack([terms[..., lanes == i].sum(axis=-1) for i in range(16)], axis=-1)
        factor = scales[None, :, g] * s[:, None, g]
        total = total + sums.astype(np.float32) * factor[..., None]
    for half in (8, 4, 2, 1):
        total = total[..., :half] + total[..., half : 2 * half]
    return np.asarray(total[..., 0])


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 18, 21, 23])
@pytest.mark.parametrize(("bits", "paired"), [(8, 0), (4, 1)])
def test_all_forms_agree_in_every_opset(opset: int, bits: int, paired: int) -> None:
    payload, wanted = stored(pruned(7, 150, 0.5, paired), bits, 64, paired)
    for library in (False, True):
        found = run(model_of(payload, (7, 150), opset), library=library)
        np.testing.assert_array_equal(found, wanted)


@settings(max_examples=25, deadline=None)
@given(
    extent=st.tuples(st.integers(1, 24), st.integers(1, 300)),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([64, 128, 256]),
    paired=st.integers(0, 1),
    zeros=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
def test_kernel_and_body_equal_numpy(
    extent: tuple[int, int], bits: int, group: int, paired: int, zeros: float
) -> None:
    payload, wanted = stored(pruned(*extent, zeros, paired), bits, group, paired)
    model = model_of(payload, extent)
    for library in (False, True):
        np.testing.assert_array_equal(run(model, library=library), wanted)


@pytest.mark.parametrize(("bits", "paired"), [(8, 0), (8, 1), (4, 0), (4, 1)])
def test_products_are_those_of_the_definition(isa: str, bits: int, paired: int) -> None:
    for rows, length, group in ((37, 300, 128), (5, 64, 64), (130, 515, 256), (1, 7, 64)):
        payload, weight = stored(pruned(rows, length, 0.5, paired), bits, group, paired)
        for batch in (1, 3, 4, 70):
            x = np.random.default_rng(batch).standard_normal((batch, length)).astype(np.float32)
            exact = run(model_of(payload, (rows, length), dtype=1, precision=0), x=x)
            bound = (group + 16) * 2.0**-23 * np.abs(x) @ np.abs(weight.T) + 1e-30
            assert (np.abs(exact - x.astype(np.float64) @ weight.T) <= bound).all()
            found = run(model_of(payload, (rows, length), dtype=1, precision=1), x=x)
            np.testing.assert_array_equal(found, product_int8(payload, weight, x, group))


@pytest.mark.parametrize("dtype", [1, 10])
def test_products_of_any_rank_with_and_without_the_library(dtype: int) -> None:
    payload, weight = stored(pruned(40, 200, 0.6, 0), 8, 128, 0)
    model = model_of(payload, (40, 200), dtype=dtype, precision=0)
    for shape in ((200,), (2, 3, 200), (0, 200)):
        x = np.random.default_rng(1).standard_normal(shape).astype(DTYPES[dtype])
        wanted = x.astype(np.float32) @ weight.T
        for library in (False, True):
            found = run(model, library=library, x=x)
            assert found.dtype == DTYPES[dtype]
            np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("paired", [0, 1])
def test_tensors_that_another_node_makes(paired: int) -> None:
    payload, wanted = stored(pruned(13, 150, 0.5, paired), 4, 64, paired)
    model = model_of(payload, (13, 150), fed=("mask", "codes", "scales"))
    found = run(model, **payload.tensors)
    np.testing.assert_array_equal(found, wanted)


def changed(array: Array, place: int, value: int) -> Array:
    found = array.copy()
    found.reshape(-1)[place] = value
    return found


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize(
    ("paired", "name", "change", "said"),
    [
        (0, "mask", lambda mask: mask[:, :-1], "mask has shape"),
        (0, "mask", lambda mask: changed(mask, 23, 0x80), "behind"),
        (0, "mask", np.zeros_like, "codes have shape"),
        (1, "mask", lambda mask: changed(mask, 3, 216), "pattern 216"),
        (1, "mask", lambda mask: mask[:-1], "mask has shape"),
        (0, "codes", lambda codes: codes[:-1], "codes have shape"),
        (0, "codes", lambda codes: codes[None], "codes have shape"),
        (1, "codes", lambda codes: changed(codes, 0, 1), "first code"),
        (0, "codes", lambda codes: changed(codes, 5, 0x80), "-128"),
        (0, "scales", lambda scales: scales[:, :1], "scales have shape"),
        (1, "scales", lambda scales: scales[..., 0], "scales have shape"),
    ],
)
def test_malformed_tensors_are_an_error_status(
    paired: int, name: str, change: Any, said: str, constant: bool
) -> None:
    payload, _ = stored(pruned(13, 150, 0.5, paired), 8, 64, paired)
    tensors = {**payload.tensors}
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    wrong = Payload(tensors, payload.shared, payload.attributes)
    fed = () if constant else (name,)
    with pytest.raises(Exception, match=said) as caught:
        run(model_of(wrong, (13, 150), fed=fed), **{n: tensors[n] for n in fed})
    assert type(caught.value).__module__.startswith("onnxruntime")


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("group", 32), ("bits", 5), ("pattern", [1, 4]), ("precision", 2), ("extent", [13, 0])],
)
def test_attributes_out_of_range_are_an_error_status(attribute: str, value: Any) -> None:
    payload, _ = stored(pruned(13, 150, 0.5, 0), 8, 64, 0)
    more = {"dtype": 1, "precision": 0, attribute: value}
    with pytest.raises(Exception, match=attribute):
        run(model_of(payload, (13, 150), **more), x=np.zeros((1, 150), np.float32))
