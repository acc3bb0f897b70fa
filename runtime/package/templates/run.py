"""Run the model: python run.py [INPUTS.npz]. Needs onnxruntime and numpy, nothing else."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime

FOLDER = Path(__file__).resolve().parent


def open_session() -> onnxruntime.InferenceSession:
    """Load the model, with the operator library if it is here."""
    options = onnxruntime.SessionOptions()
    for library in FOLDER.glob("*onnxcomp_ops.*"):
        options.register_custom_ops_library(str(library))
    path = str(FOLDER / "model.onnx")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def read_inputs(path: str) -> dict[str, np.ndarray]:
    """Read arrays by input name; text becomes objects, as ONNX Runtime wants it."""
    with np.load(path) as arrays:
        return {
            name: array.astype(object) if array.dtype.kind == "U" else array
            for name, array in arrays.items()
        }


if __name__ == "__main__":
    session = open_session()
    inputs = read_inputs(sys.argv[1] if len(sys.argv) > 1 else str(FOLDER / "inputs.npz"))
    for output, value in zip(session.get_outputs(), session.run(None, inputs), strict=True):
        print(output.name, getattr(value, "shape", type(value).__name__))
