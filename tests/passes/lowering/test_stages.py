"""Weights are expanded piece by piece while a model is loaded: less memory, the same results."""

import collections
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest

from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.protocol import LoadMemory
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.ir.traversal import scopes
from onnxcomp.passes.lowering import stages
from onnxcomp.passes.lowering.expand import expand
from onnxcomp.passes.lowering.inline_bodies import inline_bodies
from onnxcomp.passes.lowering.rewrite import Placement, rewrite
from onnxcomp.passes.lowering.stages import (
    is_staged,
    loading_peak,
    stage_loading,
    stages_of,
)
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.runtime.session import open_session

MB = 1 << 20
COUNT = 6

LOADER = """
import sys, onnxruntime
def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, before = 1, memory("VmRSS")
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(memory("VmHWM") - before)
"""


def chain(tools, shape="N, 512", opset=17):
    """Products one after another, with 1 MB of weights each."""
    lines = " ".join(f"h{i + 1} = MatMul (h{i}, w{i})" for i in range(COUNT))
    text = f"g (float[{shape}] h0) => (float[{shape}] h{COUNT}) {{ {lines} }}"
    weights = {f"w{i}": tools.weight(512, 512, seed=i) / 20 for i in range(COUNT)}
    return tools.build(text, weights, opset=opset)


def compressed(proto, name="hyper", mode="auto"):
    model = load(proto)
    canonicalize(model)
    codec = CODECS[name]
    placements = []
    for site in find_sites(model).sites:
        ranked = name == "lowrank+hyper"
        params = codec.params_type(rank=128) if ranked else codec.params_type()
        payload = codec.encode(site, read_weight(model, site), params)
        placements.append(Placement(site, codec, payload, mode, params))
    rewrite(model, placements)
    return model, placements


def operators(model):
    return collections.Counter(node.op_type for scope in scopes(model) for node in scope.graph)


def optimised(tools, model, tmp_path):
    """What ONNX Runtime makes of a model."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    content = tools.proto_of(model).SerializeToString()
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return load(tmp_path / "optimised.onnx")


@pytest.mark.parametrize("mode", ["auto", "folded"])
@pytest.mark.parametrize(
    ("shape", "opset"),
    [("N, 512", 8), ("N, 512", 13), ("N, 512", 21), ("2, 512", 9), ("2, 512", 17)],
)
def test_all_of_it_is_folded_away(tools, tmp_path, monkeypatch, shape, opset, mode):
    monkeypatch.setattr(stages, "LEAST", MB)
    model, placements = compressed(chain(tools, shape, opset), mode=mode)
    x = {"h0": np.random.default_rng(0).standard_normal((2, 512)).astype(np.float32)}
    wanted = tools.run(model, x)
    plain = operators(optimised(tools, model, tmp_path))
    assert stage_loading(model, placements) == COUNT and is_staged(model)
    assert operators(optimised(tools, model, tmp_path)) == plain
    np.testing.assert_array_equal(tools.run(model, x)[0], wanted[0])


@pytest.mark.parametrize("name", ["hyper", "hash"])
def test_kernels_of_the_library_do_not_notice(tools, name):
    model, placements = compressed(chain(tools), name)
    x = {"h0": np.random.default_rng(0).standard_normal((2, 512)).astype(np.float32)}
    results = []
    for _ in range(2):
        session = open_session(tools.proto_of(model).SerializeToString(), library=True)
        results.append(session.run(None, x)[0])
        stage_loading(model, placements)
    np.testing.assert_array_equal(*results)


def test_no_rows_are_no_harm(tools):
    model, placements = compressed(chain(tools))
    stage_loading(model, placements)
    assert tools.run(model, {"h0": np.zeros((0, 512), np.float32)})[0].shape == (0, 512)


@pytest.mark.parametrize("name", ["hyper", "hash", "lowrank+hyper"])
def test_the_way_back_is_the_same(tools, name):
    model, placements = compressed(chain(tools), name)
    reference, inlined = load(tools.proto_of(model)), load(tools.proto_of(model))
    assert stage_loading(model, placements) > 1
    again = load(tools.proto_of(model))
    expand(model)
    expand(reference)
    assert operators(model) == operators(reference)
    inline_bodies(again)
    inline_bodies(inlined)
    assert operators(again) == operators(inlined) and "If" not in operators(again)


def test_loading_takes_less_memory(tools, tmp_path):
    model, placements = compressed(chain(tools))
    peaks = []
    for _ in range(2):
        path = tmp_path / "model.onnx"
        path.write_bytes(tools.proto_of(model).SerializeToString())
        command = [sys.executable, "-c", LOADER, str(path)]
        runs = [subprocess.run(command, capture_output=True, check=True) for _ in range(3)]
        peaks.append(min(int(run.stdout) for run in runs))  # the system adds to some
        stage_loading(model, placements)
    assert peaks[1] < 0.7 * peaks[0]


def test_small_models_and_those_without_inputs_stay_as_they_are(tools):
    text = "g (float[N, 512] x) => (float[N, 512] y) { y = MatMul (x, w) }"
    model, placements = compressed(tools.build(text, {"w": tools.weight(512, 512)}))
    assert stage_loading(model, placements) == 1 and not is_staged(model)
    text = "g () => (float[2, 512] h6) { "
    text += " ".join(f"h{i + 1} = MatMul (h{i}, w{i})" for i in range(COUNT)) + " }"
    weights = {f"w{i}": tools.weight(512, 512, seed=i) for i in range(COUNT)}
    model, placements = compressed(tools.build(text, weights | {"h0": tools.weight(2, 512)}))
    assert stage_loading(model, placements) == 1 and not is_staged(model)


def test_pieces_are_as_good_as_seven_can_be():
    needs = [LoadMemory(7 * MB, MB, MB) for _ in range(40)]
    stages = stages_of(needs)
    assert stages == sorted(stages) and set(stages) == set(range(7))
    # Later pieces are smaller: what earlier ones left stays in memory.
    sizes = [stages.count(stage) for stage in range(7)]
    assert sizes == sorted(sizes, reverse=True)
    assert loading_peak(needs) < 0.35 * loading_peak(needs, staged=False)
    assert loading_peak(needs, staged=False) == 40 * 7 * MB + MB
    assert stages_of([LoadMemory(1 << 20, 0)] * 3) == [0, 0, 0]
    assert loading_peak([]) == 0
