"""Time and memory that ONNX Runtime needs to load compressed models without the operator library.

    python benchmarks/bench_portable_load.py [--python /path/to/other/python ...]

Each model is loaded in a process of its own; the peak is above the process's memory just before.
`predicted` is what `onnxcomp plan` says, `dense` the bytes of the weights in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.passes.codecs.hyper import bodies as hyper_bodies
from onnxcomp.passes.codecs.hyper import format as hyper_format
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.weight import DOMAIN, Array, Kind, WeightSite

LOADER = """
import json, sys, time
import onnxruntime as ort
def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
options = ort.SessionOptions()
options.log_severity_level = 3
options.intra_op_num_threads = 1
before, start = memory("VmRSS"), time.perf_counter()
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(json.dumps({"version": ort.__version__, "seconds": time.perf_counter() - start,
                  "peak": memory("VmHWM") - before, "after": memory("VmRSS") - before}))
"""


@dataclasses.dataclass(frozen=True)
class Weights:
    """`count` weights of one shape in one use."""

    kind: Kind
    rows: int
    length: int
    count: int = 1
    bits: int = 4
    state_bits: int = 7
    group: int = 128

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Arguments of `GroupLayout`."""
        return self.bits, self.state_bits, self.group, self.rows, self.length

    @property
    def dense(self) -> int:
        """Bytes in float32."""
        return 4 * self.rows * self.length * self.count

    @property
    def predicted(self) -> int:
        """Predicted peak."""
        geometry = hyper_format.GroupLayout(*self.sizes)
        return hyper_bodies.peak_load_bytes([(self.site, geometry, self.kind)] * self.count)

    @property
    def site(self) -> WeightSite:
        """The weight as the codec protocol describes it."""
        shape = (self.rows, self.length)
        return WeightSite("w", shape, "float32", (), "", *shape, transposed=False)


class Model:
    """Builds a chain of products, or look-ups side by side, with random payloads."""

    opset = 17

    def __init__(self) -> None:
        self.payload = Payload({})
        self.prefix = ""
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, Array] = {}

    def tensor(self, key: str) -> str:
        """As in the codec protocol."""
        own = key in self.payload.tensors
        name = self.prefix + key if own else key
        self.initializers[name] = (self.payload.tensors if own else self.payload.shared)[key]
        return name

    def constant(self, key: str, array: Array) -> str:
        """As in the codec protocol."""
        self.initializers[key] = array
        return key

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
    ) -> str:
        """As in the codec protocol."""
        output = f"y{len(self.nodes)}"
        made = helper.make_node(op_type, list(inputs), [output], domain=domain, **attributes or {})
        self.nodes.append(made)
        return output

    def add(self, weights: Weights, rng: np.random.Generator, x: str) -> str:
        """Add one weight and its use; returns the result."""
        geometry = hyper_format.GroupLayout(*weights.sizes)
        site = weights.site
        tensors = {
            "codes": rng.integers(0, 256, geometry.codes_shape, dtype=np.uint8),
            "scales": rng.uniform(0.001, 0.03, geometry.scales_shape).astype(np.float16),
        }
        shared = hyper_format.shared_tensors(*weights.sizes)
        self.payload = Payload(tensors, shared, {"group": weights.group})
        self.prefix = f"{len(self.nodes)}."
        if weights.kind in ("matmul", "gather"):
            return hyper_bodies.emit(self, site, self.payload, weights.kind, x)
        dense = hyper_bodies.emit(self, site, self.payload, weights.kind, None)
        return self.node("Gemm", [x, dense], {"transB": 1})

    def save(self, weights: Weights, path: Path) -> None:
        """Build the model and write it."""
        outputs = list(self._outputs(weights))
        width = ["n"] if weights.kind == "gather" else ["n", weights.length]
        dtype = TensorProto.INT64 if weights.kind == "gather" else TensorProto.FLOAT
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", dtype, width)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(value, name) for name, value in self.initializers.items()],
        )
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(DOMAIN, 1)]
        functions = list(hyper_bodies.functions(self.opset))
        model = helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=8)
        onnx.save(model, path)

    def _outputs(self, weights: Weights) -> Iterator[str]:
        rng = np.random.default_rng(0)
        for _ in range(weights.count):
            yield self.add(weights, rng, "x")


def measure(weights: Weights, interpreter: str = sys.executable) -> dict[str, Any]:
    """Load a model with these weights in an interpreter and return seconds and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        Model().save(weights, path)
        command = [interpreter, "-c", LOADER, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


CASES = (
    Weights("weight", 30522, 384),
    Weights("matmul", 30522, 384),
    Weights("gather", 30522, 384),
    Weights("matmul", 4096, 4096, bits=2),
    Weights("matmul", 4096, 4096),
    Weights("matmul", 4096, 4096, bits=6, state_bits=12, group=256),
    Weights("weight", 384, 384, count=200),
    Weights("matmul", 384, 384, count=200),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", action="append", default=[], help="another interpreter")
    interpreters = [sys.executable, *parser.parse_args().python]
    print("| weights | use | bits | ORT | seconds | peak MB | x dense | predicted MB | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    for weights in CASES:
        for interpreter in interpreters:
            found = measure(weights, interpreter)
            error = weights.predicted / found["peak"] - 1
            print(
                f"| {weights.count} x {weights.rows}x{weights.length} | {weights.kind} "
                f"| {weights.bits} | {found['version']} | {found['seconds']:.2f} "
                f"| {found['peak'] / 1e6:.0f} | {found['peak'] / weights.dense:.2f} "
                f"| {weights.predicted / 1e6:.0f} | {error:+.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
