"""Would pruning save more time if it weighed layers by measured time, and not by FLOPs?

    python benchmarks/bench_prune_time.py --data FOLDER [--models language,mobilenet]

Losses of steps are measured once, as `--target-flops` does. The budget is then divided by what
steps save in FLOPs, and by what they save in time: that of each product of the dense model as ONNX
Runtime's profile has it (one thread, a lower quartile of 40 runs), in proportion to the weight that
stays. For shares of FLOPs, a row says how much of that time goes, and how much would go at the same
loss if steps were chosen by time. Nothing is fitted. Takes a minute or two of processor time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from bench_matmul import cpu_name
from bench_prune import LanguageModel, MobileNet, session
from results import RESULTS, print_table, write_results

from onnxcomp.passes.ir.model import load, save
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.prune import choose, cost, pruning
from onnxcomp.passes.transforms.prune.cost import Ledger
from onnxcomp.passes.transforms.prune.options import PruneOptions
from onnxcomp.passes.transforms.prune.select import Step, merge, removed

NAME = "prune_time"
SHARES = (0.1, 0.2, 0.3, 0.4)
RUNS = 40
_PRODUCTS = ("Conv", "Gemm", "MatMul")
_FUSED = ("Clip", "Relu", "Add")


class StepsKnownError(Exception):
    """Ends pruning when the steps are known."""


def product_times(case: Any, feed: Mapping[str, Any]) -> dict[str, float]:
    """Nanoseconds of each product of a model, by the name of its node."""
    model = load(case.path)
    canonicalize(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        save(model, path)
        run = session(path, profile=str(path))
        for _ in range(RUNS):
            run.run(None, dict(feed))
        events = json.loads(Path(run.end_profiling()).read_text())
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"].removesuffix("_kernel_time")].append(event["dur"])
    nodes = {node.name: node for node in model.graph}
    makers = {value.name: node for node in model.graph for value in node.outputs}
    found: dict[str, float] = defaultdict(float)
    for name, values in times.items():
        own = name.removesuffix("_nchwc")
        node = nodes.get(own) or makers.get(own)
        while node is not None and node.op_type in _FUSED and node.inputs[0] is not None:
            node = node.inputs[0].producer()
        if node is not None and node.op_type in _PRODUCTS:
            found[node.name or ""] += 1000 * float(np.percentile(values, 25))
    return dict(found)


@contextlib.contextmanager
def costing(times: Mapping[str, float]) -> Iterator[None]:
    """Products cost what they take while the block runs."""
    known = cost._flops
    cost._flops = lambda node, seen: int(times.get(node.name or "", 0)) if known(node, seen) else 0
    try:
        yield
    finally:
        cost._flops = known


class Division:
    """Divides budgets in two ways, when pruning would divide one.

    Args:
        times: Of products, by node.
    """

    def __init__(self, times: Mapping[str, float]) -> None:
        self._times = times
        self.rows: list[dict[str, float]] = []

    def ledger(self, *given: Any) -> Ledger:
        """The ledger of FLOPs that pruning asks for; one of time is made beside it."""
        self._flops = Ledger(*given)
        with costing(self._times):
            self._time = Ledger(*given)
        return self._flops

    def merge(self, sequences: Sequence[Sequence[Step]], *_: Any, **__: Any) -> list[Step]:
        """In the place of `select.merge`: make the rows, and end."""
        time = self._time
        timed = [
            [dataclasses.replace(step, cost=time.cost(step.classes)) for step in steps]
            for steps in sequences
        ]
        for share in SHARES:
            flops, saved, loss = self._divided(sequences, self._flops, share)
            low, high = 0.0, min(0.9, saved + 0.2)
            for _ in range(12):
                middle = (low + high) / 2
                low, high = (
                    (middle, high)
                    if self._divided(timed, time, middle)[2] <= loss
                    else (low, middle)
                )
            by_time = self._divided(timed, time, low)
            self.rows.append(
                {"flops": flops, "time": saved, "loss": loss,
                 "flops_by_time": by_time[0], "time_by_time": by_time[1]}
            )  # fmt: skip
        raise StepsKnownError

    def _divided(
        self, sequences: Sequence[Sequence[Step]], ledger: Ledger, share: float
    ) -> tuple[float, float, float]:
        """Shares of FLOPs and of time that go, and the loss."""
        ledgers = (self._flops, self._time)
        _clear(*ledgers)
        steps = merge(sequences, ledger, share, trim=True)
        _clear(ledger)
        for own in ledgers:
            own.remove(removed(steps))
        flops, time = (own.removed for own in ledgers)
        _clear(*ledgers)
        return flops, time, sum(step.loss for step in steps)


def _clear(*ledgers: Ledger) -> None:
    for ledger in ledgers:
        ledger.restore(np.flatnonzero(ledger.gone).tolist())


def rows_of(case: Any, feed: Mapping[str, Any]) -> list[dict[str, float]]:
    """Rows of one model."""
    division = Division(product_times(case, feed))
    model = load(case.path)
    canonicalize(model)
    with (
        mock.patch.object(pruning, "Ledger", division.ledger),
        mock.patch.object(choose, "merge", division.merge),
        contextlib.suppress(StepsKnownError),
    ):
        pruning.prune(model, PruneOptions(target_flops=1 - SHARES[-1]), feeds=case.feeds)
    return [{name: round(value, 5) for name, value in row.items()} for row in division.rows]


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", default="language,mobilenet")
    options = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found.pop("environment", None)
    for name in options.models.split(","):
        if name == "language":
            case: Any = LanguageModel(options.data)
            feed = {"input_ids": case.tokens[:1, :128]}
        else:
            case = MobileNet(options.data, 0)
            feed = case.feeds[0]
        found[name] = rows_of(case, feed)
        found["processors"] = {**found.get("processors", {}), name: cpu_name()}
        write_results(NAME, found)
    for name, rows in found.items():
        if name != "processors":
            print(name)
            print_table(list(rows[0]), [list(row.values()) for row in rows])


if __name__ == "__main__":
    main()
