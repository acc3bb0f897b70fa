"""Sessions of one model in one process of Python, for bench_sessions.py.

python session_worker.py MODEL LIBRARY plain|share COUNT
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime

from onnxcomp import share_weights

TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


def main() -> None:
    """Open and run the sessions, say `ready`, and wait for a line."""
    model, library, how, count = sys.argv[1:]
    sessions = []
    for _ in range(int(count)):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.register_custom_ops_library(library)
        if how == "share":
            share_weights(options, model)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        session.run(None, {value.name: made_up(value) for value in session.get_inputs()})
        sessions.append(session)
    print("ready", flush=True)
    sys.stdin.readline()


def made_up(value: onnxruntime.NodeArg) -> np.ndarray:
    """Ones of 1 x 16, and no past."""
    shape = [size if isinstance(size, int) else 1 for size in value.shape]
    if len(shape) == 2:
        shape[1] = 16
    if value.name.startswith("past"):
        shape[2] = 0
    return np.ones(shape, TYPES[value.type])


if __name__ == "__main__":
    main()
