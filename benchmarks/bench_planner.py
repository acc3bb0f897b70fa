"""The planner on real models: are sizes met, and is a mixed plan better than equal settings?

    python benchmarks/bench_planner.py FOLDER MINILM [--only NAME ...] [--ranks | --losses]

FOLDER holds models/*.onnx, lm/*.onnx and eval/; MINILM is all-MiniLM-L6-v2 as ONNX. Plans are made
with one half of some real inputs and judged by the other half. For each model:

* ratios 4, 6, 8 and 10: bytes of the output under the target, or the best that was reached;
* for 2 to 5 bits for all weights: measured error of the outputs (relative L2, the worst output) and
  loss (divergence of distributions, squared error of the rest) of equal settings, and of mixed
  plans of the same bytes, made without inputs and with them; of the last one also the loss that it
  expected, and standard errors of both;
* with --ranks alone: expected against measured noise of the outputs with one weight compressed, and
  expected against measured times of products, over all weights of some models.

With --losses bytes at ratios are those of an earlier run. Codes are chosen by the weights' values
alone, so that plans are all that differs. Results of models that are not asked for are kept.
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
ERRORS = ("measured_loss_error", "expected_loss_error")
COLUMNS = (*PLANS, *(f"{name}_loss" for name in PLANS), *ERRORS)

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


class Judge:
    """Compares forms of a model with it, on inputs that no plan has seen.

    Args:
        model: The dense model.
        folder: Of the inputs.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        self._feeds = list(load_inputs(folder, model))
        self._kinds = kinds_by_name(load(model))
        self._exact = [
            {name: array for name, array in outputs.items() if array.dtype.kind == "f"}
            for outputs in iterate_model(model, self._feeds)
        ]

    def __call__(self, small: Path) -> OutputDifference:
        """How far outputs are from those of the dense model."""
        found = OutputDifference(self._kinds)
        for exact, now in zip(self._exact, iterate_model(small, self._feeds), strict=True):
            found.add(exact, now)
        return found


def error_of(found: OutputDifference) -> float:
    """Relative L2 difference of the worst output."""
    return math.sqrt(found.worst_noise())


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
    judged = Judge(model, judge)
    for bits in BITS:
        output, cache = folder / "small.onnx", folder / "cache"
        equal = compile_model(model, output, cache, bits=bits, method="hyper")
        size = equal.report.output.bytes
        row: dict[str, Any] = {"bits": bits, "bytes": size}
        found = judged(output)
        row |= {"equal": error_of(found), "equal_loss": found.mean().loss}
        for name, data in (("mixed", None), ("mixed_with_inputs", plan)):
            mixed = compile_model(model, output, cache, target_size=size, data=data)
            found = judged(output)
            row |= {name: error_of(found), f"{name}_loss": found.mean().loss}
            row[f"{name}_bytes"] = mixed.report.output.bytes
            if mixed.plan.error is not None:
                row["expected"] = mixed.plan.error
                row["expected_loss"] = mixed.plan.loss
                row["expected_loss_error"] = mixed.plan.loss_error
                row["measured_loss_error"] = found.mean().loss * found.uncertainty()
        rows.append(row)
    return rows


def measure(model: Path, data: Path, known: dict[str, Any] | None) -> dict[str, Any]:
    """Everything about one model.

    Args:
        model: The model.
        data: Folder of the data.
        known: What is known of it, for bytes at ratios that are not asked for; None to ask.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan, judge = write_halves(model, data, folder)
        return {
            "name": model.stem,
            "bytes": model.stat().st_size,
            "ratios": at_ratios(model, folder, plan) if known is None else known["ratios"],
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
    parser.add_argument("--losses", action="store_true", help="keep bytes at ratios as they are")
    options = parser.parse_args()
    places = {
        "minilm_l6_v2_embed": options.minilm,
        "tinyllama_ref": options.folder / "lm" / "tinyllama_ref.onnx",
    }
    for name in options.only:
        model = places.get(name, options.folder / "models" / f"{name}.onnx")
        if not options.ranks:
            known = {row["name"]: row for row in earlier()["models"]}
            row = measure(model, options.folder, known.get(name) if options.losses else None)
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
