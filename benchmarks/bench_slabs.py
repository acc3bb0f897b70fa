"""What bits that differ inside a matrix would gain: an estimate from real moments of inputs.

    python benchmarks/bench_slabs.py FOLDER MINILM

FOLDER holds models/*.onnx and lm/*; MINILM is all-MiniLM-L6-v2 as ONNX. Groups of 128 inputs get
one bit more or less than others, at the same bytes, where the expected error of the product falls.
The error of a group is that of its codes times what is left of its second moments behind the groups
that make up for it (the diagonal of the factors of the moments), as with codes that are found by
feedback. Inputs stay as they are; or their groups are gone through by their moments, which costs
nothing at run time; or inputs are sorted by their moments, which costs a Gather before the product.
Groups are rotated as the codes rotate them.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from bench_hyper_quality import coded, sample
from onnx import numpy_helper
from planner_inputs import real_inputs
from results import print_table, write_results

from onnxcomp.passes.codecs.hyper.codec import HyperParams
from onnxcomp.passes.codecs.hyper.viterbi import rotated

Array = npt.NDArray[Any]

GROUP = 128

DAMPING = 0.01

ORDERS = ("as it is", "groups by moments", "inputs by moments")


def products(model: onnx.ModelProto) -> Iterator[tuple[str, str, Array]]:
    """Inputs, weights and their values, of products with at least two groups."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            weight = numpy_helper.to_array(tensors[node.input[1]])
            if weight.shape[0] >= 2 * GROUP and weight.shape[0] % GROUP == 0:
                yield node.input[0], node.input[1], weight


def moments(model: onnx.ModelProto, names: set[str], feeds: Any) -> dict[str, Array]:
    """Second moments of values, ``(length, length)`` in float64."""
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in sorted(names - {value.name for value in model.graph.output})
    )
    session = onnxruntime.InferenceSession(model.SerializeToString())
    sums: dict[str, Array] = {}
    for feed in feeds:
        for name, value in zip(sorted(names), session.run(sorted(names), feed), strict=True):
            rows = value.reshape(-1, value.shape[-1]).astype(np.float64)
            sums[name] = sums.get(name, 0.0) + rows.T @ rows
    return sums


def left_over(moment: Array, order: Array) -> Array:
    """What is left of the moments of each group behind those that make up for it."""
    length = len(moment)
    damped = moment[np.ix_(order, order)] + DAMPING * np.mean(np.diag(moment)) * np.eye(length)
    half = rotated(damped.astype(np.float32).reshape(-1, GROUP)).reshape(length, length).T
    turned = rotated(np.ascontiguousarray(half).reshape(-1, GROUP)).reshape(length, length)
    turned = turned.astype(np.float64) / GROUP
    # The last ones first: what comes before is made up for by what comes behind.
    lower = np.linalg.cholesky((turned + turned.T)[::-1, ::-1] / 2)
    left: Array = (np.diag(lower)[::-1] ** 2).reshape(-1, GROUP).sum(axis=1)
    return left


def ordered(moment: Array, order: str) -> Array:
    """Inputs in an order."""
    diagonal = np.diag(moment)
    if order == "inputs by moments":
        return np.argsort(-diagonal)
    inputs = np.arange(len(moment)).reshape(-1, GROUP)
    if order == "groups by moments":
        inputs = inputs[np.argsort(-diagonal.reshape(-1, GROUP).sum(axis=1))]
    return inputs.reshape(-1)


@functools.cache
def noise_of(bits: int) -> float:
    """Relative squared error of the default codes of normal weights."""
    weight = sample("normal", 1 << 20)
    restored, _ = coded(weight, "hyper", HyperParams(bits))
    return float(np.square(restored - weight).sum() / np.square(weight).sum())


def gain_of(error: Array, bits: int) -> tuple[float, float]:
    """Error with one bit more or less over that with equal bits, and the share that moves."""
    noise = {k: noise_of(k) for k in (bits - 1, bits, bits + 1)}
    ranked = np.sort(error)[::-1]
    more = ranked * (noise[bits] - noise[bits + 1])
    less = ranked[::-1] * (noise[bits - 1] - noise[bits])
    half = len(error) // 2
    steps = np.maximum(more[:half] - less[:half], 0.0)
    gain = steps.sum() / (error.sum() * noise[bits])
    return 1.0 - gain, 2.0 * np.count_nonzero(steps) / len(error)


def measure(path: Path, data: Path) -> Iterator[dict[str, Any]]:
    """Rows of one model: the sum over its products."""
    model = onnx.load(path)
    found = list(products(model))
    sums = moments(model, {name for name, _, _ in found}, real_inputs(path, data))
    for order in ORDERS:
        errors = []
        for name, _, weight in found:
            moment = sums[name]
            chosen = ordered(moment, order)
            power = np.square(weight[chosen].astype(np.float64)).reshape(-1, GROUP, weight.shape[1])
            # Every group of a row has a scale of its own: noise is relative to its power.
            errors.append(left_over(moment, chosen) * power.mean(axis=(1, 2)))
        shares = [error.sum() for error in errors]
        for bits in (4, 3, 2):
            pairs = [gain_of(error, bits) for error in errors]
            yield {
                "model": path.stem,
                "order": order,
                "bits": bits,
                "products": len(found),
                "error": float(np.average([gain for gain, _ in pairs], weights=shares)),
                "best": float(min(gain for gain, _ in pairs)),
                "moved": float(np.average([share for _, share in pairs], weights=shares)),
                "total": float(np.sum(shares)),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description="Bits that differ inside a matrix.")
    parser.add_argument("data", type=Path)
    parser.add_argument("minilm", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for path in (options.data / "lm" / "tinyllama_ref.onnx", options.minilm):
        rows.extend(measure(path, options.data))
    base = {row["model"]: row["total"] for row in rows if row["order"] == "as it is"}
    for row in rows:
        row["order_gain"] = row.pop("total") / base[row["model"]]
    columns = ("model", "order", "bits", "products", "error", "best", "moved", "order_gain")
    print_table(
        columns,
        [
            [
                row[name] if not isinstance(row[name], float) else f"{row[name]:.3f}"
                for name in columns
            ]
            for row in rows
        ],
    )
    write_results("slabs", {"rows": rows})


if __name__ == "__main__":
    main()
