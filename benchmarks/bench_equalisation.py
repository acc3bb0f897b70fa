"""What scaling channels between two weights would gain: an estimate from real inputs.

    python benchmarks/bench_equalisation.py FOLDER MINILM

FOLDER holds models/*.onnx and lm/*; MINILM is all-MiniLM-L6-v2 as ONNX. Channel j of a value is
divided by s[j] where it is made (a scale of a norm, rows of a weight before, if what lies between
is positively homogeneous) and the columns of all weights that read it are multiplied by s[j]: the
same model with other groups. With P the power of a column and M the second moment of its input,
s[j]^2 = M^a / P^b. The expected error of transformers is that of codes found by feedback, as in
bench_slabs.py, and no value is left out, also where no such scale is free. That of the network of
convolutions is without feedback, and only convolutions behind Conv and Relu are scaled.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from bench_slabs import DAMPING, GROUP, left_over, moments, products
from onnx import numpy_helper
from planner_inputs import real_inputs
from results import print_table, write_results

Array = npt.NDArray[Any]

# Exponents a and b.
POWERS = ((0.0, 0.0), (0.25, 0.25), (0.5, 0.5), (0.25, 0.5), (0.0, 0.5), (0.0, 1.0))


def squares(second: Array, power: Array) -> Iterator[Array]:
    """s^2 for all exponents."""
    for a, b in POWERS:
        yield second**a / power**b


def of_transformer(path: Path, data: Path) -> Array:
    """Expected errors of all products, summed up, for all exponents."""
    model = onnx.load(path)
    found = list(products(model))
    readers: dict[str, list[Array]] = {}
    for name, _, weight in found:
        readers.setdefault(name, []).append(weight.astype(np.float64))
    sums = moments(model, set(readers), real_inputs(path, data))
    total = np.zeros(len(POWERS))
    for name, weights in readers.items():
        moment = sums[name]
        second = np.diag(moment) + DAMPING * np.mean(np.diag(moment))
        power = np.sum([np.square(weight).sum(axis=1) for weight in weights], axis=0)
        for index, square in enumerate(squares(second, power)):
            scale = np.sqrt(square)
            left = left_over(moment / np.outer(scale, scale), np.arange(len(moment)))
            for weight in weights:
                groups = np.square(weight * scale[:, None]).reshape(-1, GROUP, weight.shape[1])
                total[index] += groups.mean(axis=1).sum(axis=1) @ left
    return total


def convolutions(graph: onnx.GraphProto) -> Iterator[tuple[str, Array, bool]]:
    """Inputs and weights of convolutions, and whether Conv and Relu alone lie before."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    read = [name for node in graph.node for name in node.input]
    for node in graph.node:
        if node.op_type != "Conv" or node.input[1] not in tensors:
            continue
        before, scaled = node.input[0], False
        if read.count(before) == 1 and before in makers and makers[before].op_type == "Relu":
            first = makers[before].input[0]
            scaled = read.count(first) == 1 and makers[first].op_type == "Conv"
        weight = numpy_helper.to_array(tensors[node.input[1]]).astype(np.float64)
        if before in makers:
            yield before, weight, scaled


def of_network(path: Path, data: Path) -> Array:
    """Expected relative errors of all convolutions, summed up, for all exponents."""
    model = onnx.load(path)
    found = list(convolutions(model.graph))
    names = sorted({name for name, _, _ in found})
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    seconds = dict.fromkeys(names, np.zeros(1))
    for feed in real_inputs(path, data):
        for name, value in zip(names, session.run(names, feed), strict=True):
            seconds[name] = seconds[name] + np.square(value.astype(np.float64)).sum(axis=(0, 2, 3))
    total = np.zeros(len(POWERS))
    for name, weight, scaled in found:
        second = seconds[name] + DAMPING * seconds[name].mean()
        columns = np.square(weight)
        power = columns.sum(axis=(0, 2, 3))
        output = columns.sum(axis=(0, 2, 3)) @ second
        for index, square in enumerate(squares(second, power + DAMPING * power.mean())):
            chosen = square if scaled else np.ones_like(square)
            flat = (columns * chosen[:, None, None]).reshape(len(weight), -1)
            inputs = np.repeat(second / chosen, weight.shape[2] * weight.shape[3])
            starts = range(0, len(inputs), GROUP)
            total[index] += (
                sum(
                    flat[:, t : t + GROUP].mean(axis=1).sum() * inputs[t : t + GROUP].sum()
                    for t in starts
                )
                / output
            )
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description="Scales of channels between two weights.")
    parser.add_argument("data", type=Path)
    parser.add_argument("minilm", type=Path)
    options = parser.parse_args()
    found = {
        path.stem: of_transformer(path, options.data)
        for path in (options.data / "lm" / "tinyllama_ref.onnx", options.minilm)
    }
    network = options.data / "models" / "resnet20_cifar10.onnx"
    found[network.stem] = of_network(network, options.data)
    rows = [
        {"model": name, "moment": a, "power": b, "error": error}
        for name, total in found.items()
        for (a, b), error in zip(POWERS, (total / total[0]).tolist(), strict=True)
    ]
    columns = ("model", "moment", "power", "error")
    print_table(columns, [[*list(row.values())[:3], f"{row['error']:.3f}"] for row in rows])
    write_results("equalisation", {"rows": rows})


if __name__ == "__main__":
    main()
