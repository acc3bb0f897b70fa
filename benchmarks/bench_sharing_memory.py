"""Memory of a session whose weights are shared 64 times, beside that of the dense model.

    python benchmarks/bench_sharing_memory.py         # half a minute

A perceptron of eight layers of 2,048 x 2,048 weights is made to share one memory, exported and
compiled; `onnxcomp bench` loads and runs every form in a process of its own. What a process takes
for Python, ONNX Runtime and its own code is that of a model of one small layer.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from results import print_table, write_results
from torch import nn

import onnxcomp
from onnxcomp.models import export, share
from onnxcomp.runtime.bench import bench


def network(layers: int, width: int) -> nn.Module:
    """Linear layers with ReLU in between."""
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def models(folder: Path, layers: int, width: int, compression: int) -> dict[str, Path]:
    """The empty, the dense and the compiled model."""
    paths = {name: folder / f"{name}.onnx" for name in ("empty", "dense", "shared")}
    torch.manual_seed(0)
    export(network(1, 16).eval(), (torch.zeros(1, 16),), paths["empty"])
    shared = share(network(layers, width), compression).eval()
    export(shared, (torch.zeros(1, width),), paths["dense"])
    onnxcomp.optimize(paths["dense"], paths["shared"], verify=False)
    return paths


def rows(paths: dict[str, Path], seconds: float = 1.0) -> list[dict[str, Any]]:
    """Bytes of files and of processes."""
    found = bench([*paths.values()], seconds=seconds, threads=1)["models"]
    columns = ("file_bytes", "rss_bytes", "peak_rss_bytes", "median_ms")
    return [
        {"model": name, **{column: row[column] for column in columns}}
        for name, row in zip(paths, found, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--compression", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        paths = models(Path(name), options.layers, options.width, options.compression)
        found = rows(paths)
    print_table(list(found[0]), [list(row.values()) for row in found])
    write_results("sharing_memory", {"compression": options.compression, "models": found})


if __name__ == "__main__":
    main()
