"""Expected times of one model on this machine: what settings cost beside the dense weights."""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.calibration.perturbation import made_up_inputs
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec
from onnxcomp.passes.ir.model import copy_model, save
from onnxcomp.passes.latency.cost_table import (
    CostTable,
    cached_costs,
    committed_costs,
    measure_costs,
)
from onnxcomp.passes.weight import Array, Feed, WeightSite
from onnxcomp.runtime.machine import current_isa, look, target_of

__all__ = ["ProductInput", "Timing", "is_here", "measure_timing", "product_inputs"]

log = logging.getLogger(__name__)

# Runs of the dense model.
_RUNS = 5

# Inputs that activations are looked at with: their largest values differ.
_FEEDS = 4


class ProductInput(NamedTuple):
    """The activations of one product.

    Attributes:
        rows: How many there are.
        rounding: Their relative error when they are rounded to 8 bits with one range.
    """

    rows: int
    rounding: float


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """What a run of a model takes.

    Attributes:
        costs: Of products on this machine.
        heights: Rows of activations of each product with a weight, by the weight's name.
        dense_seconds: Processor time of one run of the dense model, on one thread.
        rounding: Relative error of the activations of each weight when they are rounded to 8 bits
            with one range, see `Codec.rounds_inputs`; the largest that was seen.
    """

    costs: CostTable
    heights: Mapping[str, Sequence[int]]
    dense_seconds: float
    rounding: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __call__(self, codec: Codec, site: WeightSite, params: Params) -> float | None:
        """Expected seconds that a run takes longer with a setting than with the dense weight."""
        return self.costs.added(codec, params, site, self.heights.get(site.name, ()))


def measure_timing(
    model: ir.Model,
    sites: Sequence[WeightSite],
    feeds: Sequence[Feed] | None,
    *,
    target: str = "any",
) -> Timing:
    """Run the dense model, and take the costs of this machine, measured now if need be.

    For another class of machines they are those of one of its machines, and what the dense model
    takes there is what it takes here, with its products at their price there.

    Args:
        model: The canonical model; only read.
        sites: Its weights.
        feeds: Real inputs; None to make some up.
        target: The class of machines, a value of the option `target`.

    Raises:
        ModelError: The model cannot be run.
    """
    from onnxcomp.runtime.evaluate import runner
    from onnxcomp.runtime.session import open_session

    feeds = feeds or made_up_inputs(model, samples=1)
    there = None if is_here(target) else committed_costs(target)
    here = _costs_here(measured=there is None)
    with tempfile.TemporaryDirectory() as folder:
        path = save(copy_model(model), Path(folder) / "dense.onnx").files[0]
        run = runner(open_session(path, library=False, threads=1))
        run(feeds[0])
        times = [_thread_seconds(run, feeds[0]) for _ in range(_RUNS)]
    looks = [product_inputs(model, sites, feed) for feed in feeds[:_FEEDS]]
    heights = {name: [each.rows for each in found] for name, found in looks[0].items()}
    rounding = {
        name: max((each.rounding for look in looks for each in look[name]), default=0.0)
        for name in heights
    }
    seconds = float(np.median(times))
    if there is None:
        return Timing(here, heights, seconds, rounding)
    rest = max(0.0, seconds - _dense_products(here, sites, heights))
    return Timing(there, heights, rest + _dense_products(there, sites, heights), rounding)


def is_here(target: str) -> bool:
    """Whether this machine is of a class, so that what is measured here holds for it."""
    return target in ("any", target_of(current_isa(look())))


def _costs_here(*, measured: bool) -> CostTable:
    """Costs of this machine; where they need not be its own, those of its class will do."""
    table = cached_costs()
    if table is None and not measured:
        table = committed_costs(target_of(current_isa(look())) or "any")
    if table is None:
        log.warning("measuring what products cost on this machine; this happens once")
        table = measure_costs()
    return table


def _dense_products(
    costs: CostTable, sites: Sequence[WeightSite], heights: Mapping[str, Sequence[int]]
) -> float:
    """Expected seconds of all products with dense weights."""
    return sum(
        costs.seconds("dense", height, site.rows, site.length) or 0.0
        for site in sites
        for height in heights.get(site.name, ())
    )


def _thread_seconds(run: Any, feed: Feed) -> float:
    start = time.thread_time()
    run(feed)
    return time.thread_time() - start


def product_inputs(
    model: ir.Model, sites: Sequence[WeightSite], feed: Feed
) -> dict[str, list[ProductInput]]:
    """The activations of each product with a weight in one run, by the weight's name.

    Products in subgraphs are not counted.
    """
    from onnxcomp.runtime.evaluate import runner
    from onnxcomp.runtime.session import open_session

    copy = copy_model(model)
    nodes = {node.name: node for node in copy.graph}
    read: dict[str, list[tuple[str, bool]]] = {}
    for site in sites:
        for use in site.uses:
            node = nodes.get(use.node)
            value = node.inputs[0] if node is not None and use.need == "matmul" else None
            if node is not None and value is not None:
                flipped = node.op_type == "Gemm" and bool(node.attributes.get_int("transA", 0))
                read.setdefault(site.name, []).append((value.name or "", flipped))
    names = {name for entries in read.values() for name, _ in entries}
    found = {name: np.asarray(array) for name, array in feed.items()}
    wanted = [value for node in copy.graph for value in node.outputs if value.name in names]
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(wanted)
    if wanted:
        with tempfile.TemporaryDirectory() as folder:
            path = save(copy, Path(folder) / "values.onnx").files[0]
            results = runner(open_session(path, library=False, threads=1))(feed)
        found |= {v.name or "": np.asarray(r) for v, r in zip(wanted, results, strict=True)}
    errors = {name: _rounding(found[name]) for name in names if name in found}
    return {
        name: [
            ProductInput(_height(found[value].shape, flipped), errors[value])
            for value, flipped in entries
            if value in found
        ]
        for name, entries in read.items()
    }


def _height(shape: Sequence[int], flipped: bool) -> int:
    rest = shape[1:] if flipped else shape[:-1]
    return int(np.prod(rest, dtype=np.int64))


def _rounding(activations: Array) -> float:
    """Relative error of activations that are rounded to 8 bits with one range, zero in it."""
    values = np.asarray(activations, np.float32)
    power = float(np.mean(np.square(values, dtype=np.float64))) if values.size else 0.0
    span = max(float(values.max(initial=0.0)), 0.0) - min(float(values.min(initial=0.0)), 0.0)
    return span / 255.0 / math.sqrt(12.0 * power) if power > 0.0 else 0.0
