"""What the loss feels of products, and tuned factors, take memory for some layers, not for all."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.lowrank.codec import LowRankParams, break_even
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.weight import WeightSite

WIDTH, BLOCKS, WORDS = 512, 16, 128

PROGRAM = """
import re, resource, sys
sys.path[:0] = {paths!r}
import test_lowrank_memory as own
from onnxcomp.passes.encoding import tuning
from onnxcomp.passes.gradients import gradient_sums, output_moments
tuning._HELD = gradient_sums.HELD = 1 << 22
def memory():
    return int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
for path in sys.argv[2:]:
    model, sites, weights = own.factored(path)
    if path == sys.argv[3]:
        limit = memory() + int(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    found = output_moments.output_moments(model, sites, own.inputs())
    assert len(found) == len(sites), found.keys()
    del found
    assert tuning.tune(model, weights, own.inputs(), 1) is not None
"""


def residual(path: Path, width: int, blocks: int) -> Path:
    """Look-up, blocks ``x + relu(x A) B``, and a head."""
    rng = np.random.default_rng(0)
    shapes = {"table": (WORDS, width), "head": (width, WORDS)}
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x0"])]
    for i in range(blocks):
        shapes |= {f"a{i}": (width, 2 * width), f"b{i}": (2 * width, width)}
        nodes += [
            helper.make_node("MatMul", [f"x{i}", f"a{i}"], [f"h{i}"]),
            helper.make_node("Relu", [f"h{i}"], [f"r{i}"]),
            helper.make_node("MatMul", [f"r{i}", f"b{i}"], [f"o{i}"]),
            helper.make_node("Add", [f"x{i}", f"o{i}"], [f"x{i + 1}"]),
        ]
    nodes.append(helper.make_node("MatMul", [f"x{blocks}", "head"], ["logits"]))
    weights = {n: rng.standard_normal(s, np.float32) / np.sqrt(4 * s[0]) for n, s in shapes.items()}
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "n"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")
    return path


def factored(path: str) -> tuple[ir.Model, Sequence[WeightSite], list[EncodedWeight]]:
    """A model whose products have factors."""
    model, codec, found = load(path), CODECS["lowrank"], []
    canonicalize(model)
    sites = [site for site in find_sites(model, min_size=1).sites if "gather" not in site.kinds]
    for site in sites:
        params = LowRankParams(min(96, break_even(site.rows, site.length)))
        payload = codec.encode(site, read_weight(model, site), params)
        choice = Choice(site.name, site.shape, site.dtype, (), site.nbytes, "lowrank", params)
        found.append(EncodedWeight(site, choice, payload, 0.5))
    return model, sites, found


def inputs() -> list[dict[str, npt.NDArray[Any]]]:
    rng = np.random.default_rng(0)
    return [{"ids": rng.integers(0, WORDS, (1, 16))} for _ in range(16)]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and counted as Linux does")
def test_memory_follows_some_layers_and_not_all_of_them(tmp_path: Path) -> None:
    large = residual(tmp_path / "large.onnx", WIDTH, BLOCKS)
    tiny = residual(tmp_path / "tiny.onnx", 64, 2)
    paths = [str(Path(__file__).parent), *sys.path]
    sums = 8 * BLOCKS * (WIDTH**2 + (2 * WIDTH) ** 2)
    limit = 112 << 20
    assert limit < sums
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(paths=paths), str(limit), str(tiny), str(large)],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
