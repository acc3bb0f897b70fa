"""A decode step of a layer of experts: chosen ones on their codes, against Gather and MatMul.

    python benchmarks/bench_experts.py [--experts 8] [--widths 1024,2816] [--runs 60]

The model is two products with stacks of matrices, up and down, a Relu between them, for one token
and indices that change at each run. Sessions have one thread and take turns in one process; times
are processor time of that thread, medians over all runs. Memory is that of a process of its own for
each session: resident pages after the session was created and has run, above those before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from bench_matmul import cpu_name
from onnx import TensorProto, helper, numpy_helper
from results import print_table, write_results

import onnxcomp
from onnxcomp.runtime.session import open_session

Array = np.ndarray[Any, Any]

MEMORY = """
import json, sys
import numpy as np
import onnxruntime
from onnxcomp.runtime.session import open_session
def memory():
    with open("/proc/self/status") as status:
        return {line[:6]: int(line.split()[1]) * 1024 for line in status if line.startswith("Rss")}
path, library, width, experts = sys.argv[1], sys.argv[2] == "library", *map(int, sys.argv[3:])
before = memory()
session = open_session(path, library=library, threads=1)
for run in range(20):
    chosen = np.random.default_rng(run).permutation(experts)[:2][None]
    session.run(None, {"x": np.ones((1, 1, 1, width), np.float32), "i": chosen})
after = memory()
print(json.dumps(sum(after.values()) - sum(before.values())))
"""


def layer(experts: int, width: int, inner: int) -> onnx.ModelProto:
    """``y = Relu(x W[i]) V[i]`` with random weights."""
    rng = np.random.default_rng(0)
    shapes = {"W": (experts, width, inner), "V": (experts, inner, width)}
    weights = [
        numpy_helper.from_array(
            rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1])), name
        )
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("Gather", ["W", "i"], ["w"]),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gather", ["V", "i"], ["v"]),
        helper.make_node("MatMul", ["r", "v"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "experts",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["t", 1, 1, width]),
            helper.make_tensor_value_info("i", TensorProto.INT64, ["t", "k"]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["t", "k", 1, width])],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def forms(folder: Path, experts: int, width: int, inner: int) -> dict[str, tuple[Path, bool]]:
    """Models, and whether their sessions have the library, by the name of the form."""
    found = {"dense float32": (folder / "dense.onnx", False)}
    onnx.save(layer(experts, width, inner), found["dense float32"][0])
    for bits in (4, 3):
        for precision in ("int8", "exact"):
            path = folder / f"{bits}-{precision}.onnx"
            onnxcomp.optimize(
                found["dense float32"][0], path, bits=bits, method="hyper", precision=precision,
                verify=False,
            )  # fmt: skip
            found[f"{bits} bits, {precision}"] = (path, True)
    found["4 bits, without the library"] = (folder / "4-exact.onnx", False)
    return found


def times(
    sessions: Mapping[str, Any], experts: int, width: int, chosen: int, runs: int
) -> dict[str, float]:
    """Milliseconds of a run for each session, medians."""
    rng = np.random.default_rng(1)
    spent: dict[str, list[float]] = {name: [] for name in sessions}
    for run in range(runs):
        feed = {
            "x": rng.standard_normal((1, 1, 1, width), np.float32),
            "i": rng.permutation(experts)[:chosen][None],
        }
        for name, session in sessions.items():
            if "without" in name and run > 8:
                continue
            start = time.thread_time()
            session.run(None, feed)
            spent[name].append(1000 * (time.thread_time() - start))
    return {name: statistics.median(values) for name, values in spent.items()}


def memory(path: Path, library: bool, width: int, experts: int) -> int:
    """Bytes that a session takes."""
    mode = "library" if library else "plain"
    command = [sys.executable, "-c", MEMORY, str(path), mode, str(width), str(experts)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--widths", default="1024,2816")
    parser.add_argument("--runs", type=int, default=60)
    options = parser.parse_args()
    width, inner = map(int, options.widths.split(","))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        made = forms(Path(name), options.experts, width, inner)
        sessions = {
            form: open_session(path, library=library, threads=1)
            for form, (path, library) in made.items()
        }
        for chosen in (1, 2):
            found = times(sessions, options.experts, width, chosen, options.runs)
            for form, milliseconds in found.items():
                ratio = found["dense float32"] / milliseconds
                rows.append({"form": form, "chosen": chosen, "ms": milliseconds, "faster": ratio})
        sessions.clear()
        sizes = {
            form: {
                "memory": memory(path, library, width, options.experts),
                "file": sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*")),
            }
            for form, (path, library) in made.items()
        }
    write_results(
        "experts",
        {
            "cpu": cpu_name(),
            "experts": options.experts,
            "widths": [width, inner],
            "runs": options.runs,
            "rows": [row | sizes[row["form"]] for row in rows],
        },
    )
    print_table(
        ("form", "chosen", "ms", "times as fast as dense", "session, MB", "file, MB"),
        [
            (
                row["form"],
                f"{row['chosen']} of {options.experts}",
                f"{row['ms']:.2f}",
                f"{row['faster']:.2f}",
                f"{sizes[row['form']]['memory'] / 1e6:.0f}",
                f"{sizes[row['form']]['file'] / 1e6:.1f}",
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
