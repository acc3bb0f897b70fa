"""Write the models that gpu_check.py runs in sessions: in float16, with codes, and pruned.

    python benchmarks/gpu_models.py OUT [--data FOLDER] [--minilm FILE]

FOLDER holds lm/tinyllama_ref.onnx and its calibration windows. This needs no GPU: the folder OUT
may be written anywhere and taken to the machine that has one (`gpu_check.sh --models OUT`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnxcomp

__all__ = ["write_models"]

_BITS = (4, 2)
_PRUNED = 0.2
_WINDOWS, _POSITIONS = 32, 256


def write_half(model: Path, output: Path) -> None:
    """The rival: all weights and products in float16, by ONNX Runtime's own converter."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted: Any = convert_float_to_float16(onnx.load(model), keep_io_types=True)
    onnx.save(converted, output)


def write_models(model: Path, folder: Path, calibration: dict[str, Any] | None) -> Iterator[Path]:
    """One model in all its forms, the dense ones first.

    Args:
        model: A float32 model.
        folder: Where the forms go, as ``<name>.<form>.onnx``.
        calibration: Inputs for a pruned form; None for none.
    """
    half = folder / f"{model.stem}.float16.onnx"
    write_half(model, half)
    yield half
    for bits in _BITS:
        small = folder / f"{model.stem}.{bits}bit.onnx"
        onnxcomp.optimize(model, small, bits=bits, verify=False)
        yield small
    if calibration is not None:
        pruned = folder / f"{model.stem}.pruned.4bit.onnx"
        onnxcomp.optimize(
            model, pruned, method=("prune", "hyper"), prune_ratio=_PRUNED, bits=_BITS[0],
            data=calibration, calibration="off", verify=False,
        )  # fmt: skip
        yield pruned


def language_calibration(data: Path, model: Path) -> dict[str, Any]:
    """Windows of the training text, by the name of the model's input."""
    (name,) = (value.name for value in onnx.load(model, load_external_data=False).graph.input)
    windows = np.load(data / "lm" / "calib.npy")[:_WINDOWS, :_POSITIONS]
    return {name: windows.astype(np.int64)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", type=Path, help="with lm/tinyllama_ref.onnx")
    parser.add_argument("--minilm", type=Path, help="all-MiniLM-L6-v2 as ONNX")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    if given.data is not None:
        model = given.data / "lm" / "tinyllama_ref.onnx"
        for path in write_models(model, given.output, language_calibration(given.data, model)):
            print(path)
    if given.minilm is not None:
        for path in write_models(given.minilm, given.output, None):
            print(path)


if __name__ == "__main__":
    main()
