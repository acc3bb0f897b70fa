"""Definitions that take less to fold give the weights of the reference, bit for bit."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.hyper import byte_bodies, pair_bodies, part_bodies
from onnxcomp.passes.codecs.hyper import format as hyper_format
from onnxcomp.passes.codecs.hyper.bodies import functions
from onnxcomp.passes.codecs.hyper.codec import HyperParams
from onnxcomp.passes.codecs.hyper.tables import WINDINGS
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.weight import DOMAIN, WeightSite

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL")

# Bits, bits of a state, group, rows, length: with padding and without.
FOUR_BITS = [(4, 6, 32, 1, 30), (4, 7, 128, 37, 200), (4, 8, 64, 48, 128), (4, 12, 256, 33, 300)]
OTHERS = [(3, 7, 128, 50, 200), (6, 12, 256, 33, 256)]


def payload_of(*sizes):
    """Codes of no weight."""
    geometry = hyper_format.GroupLayout(*sizes)
    rng = np.random.default_rng(sum(sizes))
    tensors = {
        "codes": rng.integers(0, 256, geometry.codes_shape, dtype=np.uint8),
        "scales": rng.uniform(0.001, 0.03, geometry.scales_shape).astype(np.float16),
    }
    attributes = {"group": sizes[2], "extent": sizes[3:]}
    return Payload(tensors, hyper_format.shared_tensors(*sizes), attributes)


def model_of(function, sizes, opset):
    """A product with the unit matrix, or the weight itself times it; and the reference."""
    rows, length = sizes[3:]
    payload = payload_of(*sizes)
    codes, scales = payload.tensors["codes"], payload.tensors["scales"]
    shared = list(payload.shared.values())
    tensors = dict(zip(hyper_format.NODE_INPUTS, (codes, scales, *shared), strict=True))
    attributes = {"extent": [rows, length], "group": sizes[2]}
    if function.name == "HyperMatMul":
        attributes |= {"dtype": TensorProto.FLOAT, "precision": 0}
    inputs = [name for name in function.input if name != "x"]
    operands = ["x", *inputs] if "x" in function.input else inputs
    node = helper.make_node(function.name, operands, ["w"], domain=DOMAIN, **attributes)
    last = helper.make_node("MatMul", ["w", "x"], ["y"])
    graph = helper.make_graph(
        [node, last] if function.name == "HyperWeight" else [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", length])],
        [
            helper.make_tensor_value_info(
                "y" if len(operands) == 9 else "w", TensorProto.FLOAT, None
            )
        ],
        [numpy_helper.from_array(tensors[name], name) for name in inputs],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=8)
    weight = hyper_format.decode(codes, scales, shared[0], (rows, length), sizes[2])
    return model, weight if function.name == "HyperWeight" else weight.T


def check(function, sizes, opset):
    model, wanted = model_of(function, sizes, opset)
    unit = np.eye(sizes[4], dtype=np.float32)
    for level in LEVELS:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        np.testing.assert_array_equal(session.run(None, {"x": unit})[0], wanted)
        if function.name == "HyperMatMul":  # what the parts wait for may be empty
            assert session.run(None, {"x": unit[:0]})[0].shape == (0, sizes[3])


@pytest.mark.parametrize("sizes", FOUR_BITS)
@pytest.mark.parametrize("opset", [7, 10, 17])
def test_two_weights_of_a_byte_are_looked_up_at_once(opset, sizes):
    check(byte_bodies.weight(opset), sizes, opset)
    check(byte_bodies.matmul(opset, padded=True, cast=True), sizes, opset)
    if sizes[3] % 16 == sizes[4] % sizes[2] == 0:
        check(byte_bodies.matmul(opset, padded=False, cast=False), sizes, opset)


@pytest.mark.parametrize(("bits", "state_bits"), [k for k in WINDINGS if sum(k) <= 14])
def test_two_weights_of_any_bits_are_looked_up_at_once(bits, state_bits):
    assert pair_bodies.suits(12, bits, state_bits) and not pair_bodies.suits(11, bits, state_bits)
    for number, sizes in enumerate([(128, 37, 200), (32, 16, 64), (256, 33, 300), (64, 48, 128)]):
        opset, layout = (12, 17, 21)[number % 3], (bits, state_bits, *sizes)
        product = pair_bodies.matmul(opset, bits, state_bits, padded=True, cast=True)
        check(product, layout, opset)
        if sizes[1] % 16 == sizes[2] % sizes[0] == 0:
            product = pair_bodies.matmul(opset, bits, state_bits, padded=False, cast=False)
            check(product, layout, opset)


def test_windows_of_two_have_to_fit_into_a_float():
    assert not any(pair_bodies.suits(21, *k) for k in [(6, 12), (6, 10), (5, 10), (4, 12), (3, 12)])
    for bits, state_bits in WINDINGS:
        first = [(2 * pair + 1) * bits - state_bits for pair in range(4)]
        spans = [(start + bits + state_bits + 7) // 8 - start // 8 for start in first]
        if pair_bodies.suits(21, bits, state_bits):
            assert max(spans) <= 3


@pytest.mark.parametrize("sizes", FOUR_BITS + OTHERS)
@pytest.mark.parametrize("opset", [11, 18])
def test_parts_of_a_product_are_the_product(opset, sizes):
    padded = sizes[4] % sizes[2] != 0
    by_byte = sizes[0] == byte_bodies.BITS
    count = min(3, hyper_format.GroupLayout(*sizes).panels)
    check(part_bodies.matmul(opset, count, by_byte=by_byte, padded=padded), sizes, opset)
    check(part_bodies.matmul(opset, count, by_byte=False, padded=True), sizes, opset)
    if pair_bodies.suits(opset, *sizes[:2]):
        pairs = part_bodies.matmul(opset, count, by_byte=by_byte, padded=padded, pairs=sizes[:2])
        check(pairs, sizes, opset)


def test_a_codec_has_them_where_they_fit():
    special = CODECS["hyper"].special

    def site(rows, length):
        return WeightSite("w", (rows, length), "float32", (), "", rows, length, transposed=False)

    assert special.weight(17, site(64, 128), HyperParams(bits=4)) is byte_bodies.weight(17)
    assert special.weight(17, site(64, 128), HyperParams(bits=5)) is None
    payloads = [payload_of(4, 7, 128, 64, 128), payload_of(3, 7, 128, 96, 200)]
    types = frozenset({"float32"})
    assert (
        special.product(10, payloads, 2, types) is special.product(17, payloads, 5, types) is None
    )
    mixed = part_bodies.matmul(17, 4, by_byte=False, padded=True, pairs=None)
    assert special.product(17, payloads, 4, types) is mixed
    alone = part_bodies.matmul(17, 4, by_byte=True, padded=False, pairs=(4, 7))
    assert special.product(17, payloads[:1], 4, types) is alone
    assert special.product(17, payloads, 1, types) is None
    pairs = pair_bodies.matmul(17, 4, 7, padded=False, cast=False)
    assert special.product(17, payloads[:1], 1, types) is pairs
    assert special.rows(17, site(64, 128), HyperParams(bits=5)) is pair_bodies.rows(17, 5, 7)
    assert special.rows(11, site(64, 128), HyperParams(bits=5)) is None
    short = byte_bodies.matmul(9, padded=False, cast=False)
    assert special.product(9, payloads[:1], 1, types) is short
    assert special.product(9, payloads[:1], 1, types | {"float16"}) is not short
    general = next(body for body in functions(17) if body.name == "HyperMatMul")
    assert list(mixed.input) == list(general.input)
    assert list(mixed.attribute) == list(general.attribute)
    assert CODECS["hash"].special is None
