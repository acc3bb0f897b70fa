"""Opens, runs and closes sessions of one compressed model and prints how the process grows.

python tests/fuzz/sessions.py [--count 1000] [--most BYTES]
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

import onnxcomp as oc

# Sessions before the first measurement: allocators and thread pools settle.
WARM_UP = 50


def resident() -> int:
    """Resident bytes of this process."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def model() -> onnx.ModelProto:
    """One product of 256 by 256 and one look-up of 500 rows."""
    rng = np.random.default_rng(0)
    weights = {"table": (500, 256), "w": (256, 256)}
    tensors = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in weights.items()
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    ids = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 256])
    graph = helper.make_graph(nodes, "sessions", [ids], [y], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def cycle(path: Path, count: int) -> None:
    """Open, run and close."""
    for _ in range(count):
        oc.InferenceSession(path).run(None, {"ids": np.arange(40)})


def main() -> int:
    """Print figures as JSON; 1 where the process grows by more than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--most", type=int, default=5_000_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        oc.optimize(model(), path, verify=False)
        cycle(path, WARM_UP)
        gc.collect()
        before = resident()
        cycle(path, given.count)
        gc.collect()
        growth = resident() - before
    print(json.dumps({"sessions": given.count, "growth_bytes": growth, "rss_bytes": before}))
    return 1 if growth > given.most else 0


if __name__ == "__main__":
    sys.exit(main())
