"""Expected against measured, site by site: noise of the outputs, and times of products."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from scipy.stats import spearmanr

import onnxcomp
from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.calibration.perturbation import Probe
from onnxcomp.passes.calibration.sensitivity import measure_sensitivities
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.hyper.codec import HyperParams
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.driver.prepare import prepare
from onnxcomp.passes.ir.files import read
from onnxcomp.passes.latency.cost_table import cached_costs, measure_costs
from onnxcomp.passes.latency.model import product_inputs
from onnxcomp.runtime.inputs import load_inputs

__all__ = ["error_ranks", "pooled", "time_ranks"]

# Settings whose errors are compared.
_BITS = (2, 3, 4)

_RUNS = 30


def pooled(rows: Sequence[Mapping[str, Any]]) -> float:
    """Rank correlation over the points of several models."""
    expected = [value for row in rows for value in row["expected"]]
    measured = [value for row in rows for value in row["measured"]]
    return float(spearmanr(expected, measured).statistic)


def _rank(expected: Sequence[float], measured: Sequence[float]) -> dict[str, Any]:
    """Spearman's rank correlation, and the median of measured over expected."""
    shares = np.array(measured) / np.array(expected)
    return {
        "expected": [float(f"{value:.4g}") for value in expected],
        "measured": [float(f"{value:.4g}") for value in measured],
        "points": len(expected),
        "rank_correlation": float(spearmanr(expected, measured).statistic),
        "median_measured_over_expected": float(np.median(shares)),
    }


def _prepared(model: Path) -> Prepared:
    return prepare(read(model), Settings())


def error_ranks(model: Path, plan: Path, judge: Path) -> dict[str, Any]:
    """Noise of the outputs with one weight compressed: expected from other inputs, and measured."""
    work = _prepared(model)
    found = measure_sensitivities(work.model, work.sites, load_inputs(plan, model))
    sites = [site for site in work.sites if site.name in found.noise]
    codec = CODECS["hyper"]
    expected, measured = [], []
    with tempfile.TemporaryDirectory() as folder:
        probe = Probe(work.model, sites, load_inputs(judge, model)[:24], Path(folder))
        for site in sites:
            weight = read_weight(work.model, site)
            for params in map(HyperParams, _BITS):
                decoded = codec.decode(site, codec.encode(site, weight, params))
                error = codec.predict(site, params)
                noise = found.noise[site.name] * error**2 + found.scale[site.name] * error**4
                expected.append(noise)
                measured.append(probe.noise({site: decoded}))
    return {"sites": len(sites), **_rank(np.sqrt(expected), np.sqrt(measured))}


def time_ranks(model: Path, judge: Path) -> dict[str, Any]:
    """Times of products on codes: by the costs of this machine, and by ONNX Runtime's profile."""
    costs = cached_costs() or measure_costs()
    work = _prepared(model)
    feed = load_inputs(judge, model)[0]
    inputs = product_inputs(work.model, work.sites, feed)
    expected, measured = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for bits in (2, 4):
            small = folder / f"{bits}.onnx"
            options: dict[str, Any] = {"bits": bits, "method": "hyper", "verify": False}
            onnxcomp.optimize(model, small, cache=folder / "cache", **options)
            times = _node_times(small, feed, folder)
            for site in work.sites:
                uses = [use.node for use in site.uses if use.need == "matmul"]
                for node, x in zip(uses, inputs.get(site.name, ()), strict=False):
                    seconds = costs.seconds(f"hyper {bits}", x.rows, site.rows, site.length)
                    if node in times and seconds is not None:
                        expected.append(seconds)
                        measured.append(times[node])
    return _rank(expected, measured)


def _node_times(model: Path, feed: Any, folder: Path) -> dict[str, float]:
    """Median seconds of each node, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxcomp.InferenceSession(model, session_options=options)
    for _ in range(_RUNS):
        session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event["name"].endswith("_kernel_time"):
            times[event["name"].removesuffix("_kernel_time")].append(event["dur"] * 1e-6)
    return {node: float(np.median(values)) for node, values in times.items()}
