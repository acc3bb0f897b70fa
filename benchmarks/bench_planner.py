"""The planner on real models: are sizes met, and is a mixed plan better than equal settings?

    python benchmarks/bench_planner.py FOLDER MINILM [--only NAME ...] [--ranks]

FOLDER holds models/*.onnx, lm/*.onnx and eval/; MINILM is all-MiniLM-L6-v2 as ONNX. Plans are made
with one half of some real inputs and judged by the other half. For each model:

* ratios 4, 6, 8 and 10: bytes of the output under the target, or the best that was reached;
* for 2 to 5 bits for all weights: measured error of the outputs (relative L2, the worst output) and
  loss (divergence of distributions, squared error of the rest) of equal settings, and of mixed
  plans of the same bytes, made without inputs and with them;
* with --ranks alone: expected against measured noise of the outputs with one weight compressed, and
  expected against measured times of products, over all weights of some models.

Codes are chosen by the weights' values alone, so that plans are all that differs. Results of
models that are not asked for are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from planner_inputs import MODELS, write_halves
from planner_ranks import error_ranks, pooled, time_ranks
from results import RESULTS, print_table, write_results

import onnxcomp
from onnxcomp.passes.calibration.output_difference import OutputDifference, kinds_by_name
from onnxcomp.passes.ir.model import load
from onnxcomp.runtime.evaluate import iterate_model
from onnxcomp.runtime.inputs import load_inputs

RATIOS = (4, 6, 8, 10)
BITS = (5, 4, 3, 2)

# Numbers of plans with equal bytes, in the order of the table.
PLANS = ("equal", "mixed", "mixed_with_inputs", "expected")
COLUMNS = (*PLANS, *(f"{name}_loss" for name in PLANS))

# What is ranked.
KINDS = ("error", "time")

# Models whose weights are compared one by one: of errors, and of times of products.
ERROR_RANKS = ("resnet20_cifar10", "silero_vad", "squeezenet_fp16")
TIME_RANKS = ("magika_standard_v3_3", "tinyllama_ref", "minilm_l6_v2_embed")


def compile_model(model: Path, output: Path, cache: Path, **options: Any) -> onnxcomp.Result:
    """The result, also of a run that misses its target."""
    try:
        return onnxcomp.optimize(
            model, output, cache=cache, verify=False, calibration="off", **options
        )
    except onnxcomp.TargetMissedError as missed:
        return missed.result


def error_of(model: Path, small: Path, judge: Path) -> float:
    """Relative L2 difference of the worst output on inputs that no plan has seen."""
    outputs = onnxcomp.verify(model, small, data=judge).outputs
    return max(metrics.rel_l2 for metrics in outputs.values())


def loss_of(model: Path, small: Path, judge: Path) -> float:
    """The loss that plans are compared by, on inputs that no plan has seen."""
    feeds = load_inputs(judge, model)
    found = OutputDifference(kinds_by_name(load(model)))
    for exact, now in zip(iterate_model(model, feeds), iterate_model(small, feeds), strict=True):
        found.add({n: a for n, a in exact.items() if a.dtype.kind == "f"}, now)
    return found.mean().loss


def at_ratios(model: Path, folder: Path, plan: Path) -> list[dict[str, Any]]:
    """Bytes for each ratio."""
    rows = []
    for ratio in RATIOS:
        output = folder / "small.onnx"
        result = compile_model(model, output, folder / "cache", ratio=ratio, data=plan)
        size, target = result.report.output.bytes, result.plan.budget.bytes or 0
        rows.append({"ratio": ratio, "target": target, "bytes": size, "met": size <= target})
    return rows


def at_equal_bytes(model: Path, folder: Path, plan: Path, judge: Path) -> list[dict[str, Any]]:
    """Errors of equal settings and of mixed plans of their bytes."""
    rows = []
    for bits in BITS:
        output, cache = folder / "small.onnx", folder / "cache"
        equal = compile_model(model, output, cache, bits=bits, method="hyper")
        size = equal.report.output.bytes
        row: dict[str, Any] = {"bits": bits, "bytes": size}
        row["equal"] = error_of(model, output, judge)
        row["equal_loss"] = loss_of(model, output, judge)
        for name, data in (("mixed", None), ("mixed_with_inputs", plan)):
            mixed = compile_model(model, output, cache, target_size=size, data=data)
            row[name] = error_of(model, output, judge)
            row[f"{name}_loss"] = loss_of(model, output, judge)
            row[f"{name}_bytes"] = mixed.report.output.bytes
            if mixed.plan.error is not None:
                row["expected"] = mixed.plan.error
                row["expected_loss"] = mixed.plan.loss
        rows.append(row)
    return rows


def measure(model: Path, data: Path) -> dict[str, Any]:
    """Everything about one model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan, judge = write_halves(model, data, folder)
        return {
            "name": model.stem,
            "bytes": model.stat().st_size,
            "ratios": at_ratios(model, folder, plan),
            "equal_bytes": at_equal_bytes(model, folder, plan, judge),
        }


def write(models: list[dict[str, Any]], ranks: dict[str, Any]) -> None:
    """Write all results, with the correlations over the points of all models together."""
    rows = {what: [kinds[what] for kinds in ranks.values() if what in kinds] for what in KINDS}
    together = {
        what: {
            "models": len(found),
            "points": sum(row["points"] for row in found),
            "rank_correlation": pooled(found),
        }
        for what, found in rows.items()
        if found
    }
    write_results("planner", {"models": models, "ranks": ranks, "pooled": together})


def earlier() -> dict[str, Any]:
    """Results of earlier runs."""
    path = RESULTS / "planner.json"
    found: dict[str, Any] = {"models": [], "ranks": {}, "pooled": {}}
    if path.exists():
        found |= json.loads(path.read_text(encoding="utf-8"))
    return found


def ranks(model: Path, data: Path) -> dict[str, Any]:
    """Rank correlations of one model."""
    with tempfile.TemporaryDirectory() as name:
        plan, judge = write_halves(model, data, Path(name))
        found = {}
        if model.stem in ERROR_RANKS:
            found["error"] = error_ranks(model, plan, judge)
        if model.stem in TIME_RANKS:
            found["time"] = time_ranks(model, judge)
        return found


def print_ranks(found: dict[str, Any], together: dict[str, Any]) -> None:
    """Print one line for each model, and one for all."""
    for what, row in together.items():
        print(
            f"{what}, all {row['points']} points of {row['models']} models: "
            f"rank correlation {row['rank_correlation']:.3f}"
        )
    columns = ("model", "what", "points", "rank correlation", "measured / expected")
    print_table(
        columns,
        [
            (
                name,
                what,
                row["points"],
                f"{row['rank_correlation']:.3f}",
                f"{row['median_measured_over_expected']:.2f}",
            )
            for name, kinds in found.items()
            for what, row in kinds.items()
        ],
    )


def print_results(rows: list[dict[str, Any]]) -> None:
    """Print both tables."""
    print_table(
        ("model", *(f"{ratio}x" for ratio in RATIOS)),
        [
            (row["name"], *(f"{100 * r['bytes'] / r['target']:.2f} %" for r in row["ratios"]))
            for row in rows
        ],
    )
    print_table(
        ("model", "bits", "bytes", *(name.replace("_", " ") for name in COLUMNS)),
        [
            (
                row["name"],
                r["bits"],
                r["bytes"],
                *(f"{r.get(key, math.nan):.4g}" for key in COLUMNS),
            )
            for row in rows
            for r in row["equal_bytes"]
        ],
    )


def main() -> None:
    """Measure the models that are asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("minilm", type=Path)
    parser.add_argument("--only", nargs="*", default=MODELS)
    parser.add_argument("--ranks", action="store_true")
    options = parser.parse_args()
    places = {
        "minilm_l6_v2_embed": options.minilm,
        "tinyllama_ref": options.folder / "lm" / "tinyllama_ref.onnx",
    }
    for name in options.only:
        model = places.get(name, options.folder / "models" / f"{name}.onnx")
        if not options.ranks:
            row = measure(model, options.folder)
            rows = {row["name"]: row for row in earlier()["models"]} | {name: row}
            ordered = [rows[other] for other in MODELS if other in rows]
            write(ordered, earlier()["ranks"])
        elif name in (*ERROR_RANKS, *TIME_RANKS):
            found = earlier()["ranks"] | {name: ranks(model, options.folder)}
            write(earlier()["models"], found)
    print_results(earlier()["models"])
    print_ranks(earlier()["ranks"], earlier()["pooled"])


if __name__ == "__main__":
    main()
