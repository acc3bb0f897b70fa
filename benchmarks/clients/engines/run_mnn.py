"""MNN: its converter, and the model that it writes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import MNN
import numpy as np
from harness import measure


def load(path: str) -> Any:
    convert = Path(sys.executable).with_name("mnnconvert")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "model.mnn"
        options = ["-f", "ONNX", "--modelFile", path, "--MNNModel", str(output), "--bizCode", "x"]
        done = subprocess.run([convert, *options], capture_output=True, text=True)
        if not output.exists():
            raise SystemExit(done.stdout[-400:])
        print(f"MNN file: {output.stat().st_size} bytes")
        names = ["input_ids", "attention_mask"]
        return MNN.nn.load_module_from_file(str(output), names, ["embedding"])


def run(module: Any, feeds: Any) -> Any:
    inputs = [
        MNN.expr.const(value.astype(np.int32), list(value.shape), MNN.expr.NCHW, MNN.expr.int)
        for value in feeds.values()
    ]
    return MNN.expr.convert(module.forward(inputs)[0], MNN.expr.NCHW).read()


if __name__ == "__main__":
    measure(load, run)
