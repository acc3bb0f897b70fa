"""A product that holds most of a model's weights is expanded some rows at a time."""

import subprocess
import sys

import numpy as np
import onnx
import pytest

from onnxcomp.passes.analysis.weight_sites import find_sites
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.hyper import format as hyper_format
from onnxcomp.passes.codecs.load_memory import LoadMemory
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.ir.manifest import STAGE_KEY
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.lowering.expand import expand
from onnxcomp.passes.lowering.inline_bodies import inline_bodies
from onnxcomp.passes.lowering.lower import lower
from onnxcomp.passes.lowering.part_products import passes_of
from onnxcomp.passes.lowering.rewrite import Placement, rewrite
from onnxcomp.passes.lowering.session_memory import expansions
from onnxcomp.passes.lowering.stages import is_staged, loading_peak, stages_of
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.runtime.session import open_session

MB = 1 << 20
NAME = ("com.onnxcomp", "HyperMatMul", "")

LOADER = """
import sys, onnxruntime
def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
options.intra_op_num_threads, before = 1, memory("VmRSS")
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(memory("VmHWM") - before)
"""


def dense(tools, rows=6625, length=1024):
    """Nearly all weights are those of the last product, whose rows are padded."""
    text = f"g (float[N, 128] x) => (float[N, {rows}] y) {{ h = MatMul (x, v) y = MatMul (h, w) }}"
    weights = {"v": tools.weight(128, length) / 20, "w": tools.weight(length, rows) / 20}
    return tools.build(text, weights, opset=13)


def placed(proto, bits=4):
    """The model, with codes that are no one's: encoding takes long."""
    model = load(proto)
    canonicalize(model)
    codec, rng, found = CODECS["hyper"], np.random.default_rng(0), []
    for site in find_sites(model).sites:
        params = codec.params_type(bits=bits)
        sizes = (bits, params.state_bits, 128, site.rows, site.length)
        geometry = hyper_format.GroupLayout(*sizes)
        tensors = {
            "codes": rng.integers(0, 256, geometry.codes_shape, dtype=np.uint8),
            "scales": rng.uniform(1e-5, 3e-5, geometry.scales_shape).astype(np.float16),
        }
        attributes = {"group": 128, "extent": (site.rows, site.length)}
        payload = Payload(tensors, hyper_format.shared_tensors(*sizes), attributes)
        found.append(Placement(site, codec, payload, "auto", params))
    return model, found


def peak(tools, proto, path):
    path.write_bytes(proto.SerializeToString())
    command = [sys.executable, "-c", LOADER, str(path)]
    return int(subprocess.run(command, capture_output=True, check=True).stdout)


def test_loading_takes_about_as_much_memory_as_the_dense_model(tools, tmp_path):
    proto = dense(tools)
    model, found = placed(proto)
    lower(model, found)
    assert model.functions[NAME].metadata_props[STAGE_KEY] == "7" and is_staged(model)
    whole, found = placed(proto)
    rewrite(whole, found)
    peaks = [peak(tools, each, tmp_path / "m.onnx") for each in (proto, tools.proto_of(model))]
    # Above that of any session, 1.4 to 1.6 times; in one part it is more than four times.
    assert peaks[1] < 1.8 * peaks[0]
    assert peak(tools, tools.proto_of(whole), tmp_path / "m.onnx") > 3 * peaks[0]
    # What `plan` and `doctor` say of both forms, without what every session takes.
    needs = [[need for _, need in expansions(each, library=False)] for each in (model, whole)]
    assert loading_peak(needs[0]) < 0.6 * loading_peak(needs[1], staged=False)


@pytest.mark.parametrize("bits", [3, 4])
def test_results_stay_what_they_were(tools, bits):
    proto = dense(tools)
    x = np.random.default_rng(0).standard_normal((2, 128)).astype(np.float32)
    results = {}
    for library in (False, True):
        for put in (rewrite, lower):
            model, found = placed(proto, bits)
            put(model, found)
            session = open_session(tools.proto_of(model).SerializeToString(), library=library)
            results[library, put] = session.run(None, {"x": x})[0]
    np.testing.assert_array_equal(results[True, rewrite], results[True, lower])
    plain = results[False, rewrite]
    assert np.abs(results[False, lower] - plain).max() <= 1e-5 * np.abs(plain).max()


def test_the_way_back_is_that_of_other_models(tools):
    proto = dense(tools)
    model, found = placed(proto)
    lower(model, found)
    onnx.checker.check_model(tools.proto_of(model), full_check=True)
    inlined = load(tools.proto_of(model))
    inline_bodies(inlined)
    assert not inlined.functions and not is_staged(inlined)
    assert "If" not in {node.op_type for node in inlined.graph}
    expand(model)
    assert [node.op_type for node in model.graph] == ["MatMul", "MatMul"]
    assert not model.functions and not is_staged(model)


def test_another_compression_takes_the_general_definition_again(tools):
    model, found = placed(dense(tools))
    lower(model, found[1:])
    assert STAGE_KEY in model.functions[NAME].metadata_props
    again, first = placed(tools.proto_of(model), bits=3)
    rewrite(again, first)
    assert STAGE_KEY not in again.functions[NAME].metadata_props
    x = np.random.default_rng(0).standard_normal((2, 128)).astype(np.float32)
    assert np.isfinite(tools.run(again, {"x": x})[0]).all()


def test_products_are_divided_where_they_are_few_and_large():
    large, small = LoadMemory(200 * MB, 70 * MB, 30 * MB), LoadMemory(7 * MB, 2 * MB, MB)
    assert passes_of([large], 0) == passes_of([large, small], 300 * MB) == 7
    assert passes_of([large], 900 * MB) == 1  # others take most
    assert passes_of([large, *[small] * 4], 0) == 1  # all of them would take many nodes
    assert passes_of([small], 0) == passes_of([], 0) == 1


def test_other_weights_are_in_the_pieces_of_sessions_with_the_library():
    divided = LoadMemory(210 * MB, 70 * MB, 35 * MB, passes=6)
    others = [LoadMemory(7 * MB, MB, MB) for _ in range(20)]
    assert stages_of([divided, *others]) == [0, *stages_of(others)]
    assert loading_peak([divided]) == 5 * (35 * MB // 6) + 35 * MB + 70 * MB // 6
    assert loading_peak(others) < loading_peak([divided, *others]) < 210 * MB
