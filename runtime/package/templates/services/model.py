"""The model behind the service. Requests that came together run together where the model can."""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

FOLDER = Path(__file__).resolve().parent
MAX_BATCH = int(os.environ.get("MAX_BATCH", "@MAX_BATCH@"))
WAIT_SECONDS = 0.01  # how long a request waits for others

_TYPES = {
    "float": np.float32, "float16": np.float16, "double": np.float64, "bool": np.bool_,
    "int8": np.int8, "int16": np.int16, "int32": np.int32, "int64": np.int64,
    "uint8": np.uint8, "uint16": np.uint16, "uint32": np.uint32, "uint64": np.uint64,
    "string": object,
}  # fmt: skip


class Model:
    """One session, and requests as dictionaries of arrays by input name."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("THREADS", "0"))
        for library in FOLDER.glob("*onnxcomp_ops.*"):
            options.register_custom_ops_library(str(library))
        self.session = onnxruntime.InferenceSession(
            str(FOLDER / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.types = {v.name: _TYPES[v.type[7:-1]] for v in self.session.get_inputs()}
        self.outputs = [v.name for v in self.session.get_outputs()]
        first = [v.shape[:1] for v in (*self.session.get_inputs(), *self.session.get_outputs())]
        # One free size that is the first of everything: rows are independent.
        self.joins = all(s == first[0] and s and isinstance(s[0], str) for s in first)

    def run_lists(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Answer requests of nested lists by nested lists."""
        answers = self.run(
            [
                {name: np.asarray(value, self.types[name]) for name, value in request.items()}
                for request in requests
            ]
        )
        return [{name: value.tolist() for name, value in answer.items()} for answer in answers]

    def run(self, requests: list[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """Answer several requests; those of equal shapes behind the first dimension run at once."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            shapes = tuple((name, value.shape[1:]) for name, value in sorted(request.items()))
            groups[shapes if self.joins else i].append(i)
        answers: list[dict[str, np.ndarray]] = [{} for _ in requests]
        for members in groups.values():
            rows = [len(next(iter(requests[i].values()))) if self.joins else 0 for i in members]
            feed = {
                name: np.concatenate([requests[i][name] for i in members])
                if len(members) > 1
                else requests[members[0]][name]
                for name in requests[members[0]]
            }
            values = self.session.run(self.outputs, feed)
            ends = np.cumsum(rows)
            for i, begin, end in zip(members, ends - rows, ends, strict=True):
                parts = values if len(members) == 1 else [v[begin:end] for v in values]
                answers[i] = dict(zip(self.outputs, parts, strict=True))
        return answers
