"""What each step of calibration brings, one step more from row to row, and what rivals lose.

    python benchmarks/bench_quality.py --data FOLDER [--smollm2 FOLDER] [--minilm MINILM.onnx]
        [--models language_model] [--bits 4,3,2] [--ratios 10] [--only REGEX] [--again]

FOLDER is laid out as for the other benchmarks. Rows of `--ratios` have plans for a size. Steps that
the compiler always takes are left out by replacing what they are done with. All steps of a model
and of as many bits have the same bytes. Rivals round the same tensors to as many bits
(rival_forms.py), GPTQ with the same inputs.
Times are CPU seconds of the whole run, with all threads. Rows that the JSON has already are not
measured again unless `--again` asks for it; it is written after every row.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import bench_hyper_models
from judges import (
    TRAINING_PAIRS,
    DecoderModel,
    Detector,
    Judge,
    LabelledImages,
    SentenceModel,
    SpeechModel,
)
from results import RESULTS, print_table, write_results
from rival_forms import RIVALS, Rivals

import onnxcomp
from onnxcomp.passes.calibration import statistics
from onnxcomp.passes.codecs import anchoring
from onnxcomp.passes.encoding.look_ups import LookUps

__all__ = ["STEPS"]

Patch = contextlib.AbstractContextManager[Any]


def _no_drift() -> Patch:
    """Errors of earlier weights are not made up for."""
    return mock.patch.object(anchoring, "anchored", lambda weight, stats: weight)


def _no_streams() -> Patch:
    """What a residual stream lacks is not made up for."""
    return mock.patch.object(statistics, "stream_source", lambda *_: ())


def _no_look_ups() -> Patch:
    """Tables that are only looked up are encoded by their values."""
    return mock.patch.object(LookUps, "_fitted", lambda self, read, plain, threads: None)


# By name: options of the run, and what is left out of it. Each row has one step more.
STEPS: Mapping[str, tuple[Mapping[str, Any], tuple[Callable[[], Patch], ...]]] = {
    "by values": ({"calibration": "off"}, ()),
    "inputs of the dense model": ({"calibration": "parallel", "tune": 0}, (_no_look_ups,)),
    "inputs behind compressed weights": ({"tune": 0}, (_no_drift, _no_look_ups)),
    "drift made up for": ({"tune": 0}, (_no_streams, _no_look_ups)),
    "streams made up for": ({"tune": 0}, (_no_look_ups,)),
    "look-ups weighed": ({"tune": 0}, ()),
    "scales tuned, 1 pass": ({"tune": 1}, ()),
    "scales tuned, 2 passes": ({"tune": 2}, ()),
    "scales tuned, 4 passes": ({"tune": 4}, ()),
}


def judge_of(name: str, options: argparse.Namespace) -> Judge:
    """The judge of one model."""
    if name == "resnet20":
        return LabelledImages(options.data / "models" / "resnet20_cifar10.onnx", options.data)
    if name == "silero":
        return SpeechModel(options.data / "models" / "silero_vad.onnx", options.data)
    if name == "yolox":
        model = options.data / "models" / "yolox_nano.onnx"
        return Detector(model, options.data, options.images)
    if name == "minilm" and options.minilm is not None:
        return SentenceModel(options.minilm, options.data, pairs=options.pairs)
    if name != "smollm2":
        return bench_hyper_models.judge_of(name, options)
    if options.smollm2 is None:
        raise SystemExit("smollm2 needs --smollm2")
    return DecoderModel(options.smollm2, options.data, min(options.windows, 10))


def measured(judge: Judge, data: Path, goal: Mapping[str, int], step: str) -> dict[str, Any]:
    """One row, with as many bits for all weights or planned for a ratio."""
    options, left_out = STEPS[step]
    feeds = judge.calibration(data)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for patch in left_out:
            stack.enter_context(patch())
        path, start = Path(folder) / "form.onnx", time.process_time()
        result = onnxcomp.optimize(
            judge.model, path, method="hyper", data=feeds, verify=False, **goal, **options
        )
        seconds = time.process_time() - start
        found = judge(path)
    size = int(result.report.output.bytes)
    return {**goal, "step": step, "bytes": size, "cpu_seconds": round(seconds, 1), **found}


def rival(judge: Judge, rivals: Rivals, bits: int, name: str) -> dict[str, Any]:
    """One row of a rival."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "form.onnx"
        size, seconds = rivals.write(name, bits, path)
        found = judge(path)
    return {"bits": bits, "step": name, "bytes": size, "cpu_seconds": round(seconds, 1), **found}


def rows_of(name: str, options: argparse.Namespace, known: list[dict[str, Any]]) -> Iterator[Any]:
    """All rows of a model, whenever one more has been measured."""
    judge = judge_of(name, options)
    kept = {_key(row): row for row in known}
    goals = [{"bits": bits} for bits in map(int, filter(None, options.bits.split(",")))]
    goals += [{"ratio": ratio} for ratio in map(int, filter(None, options.ratios.split(",")))]
    rivals: Rivals | None = None
    for goal, step in itertools.product(goals, (*STEPS, *RIVALS)):
        key = _key({**goal, "step": step})
        if not re.search(options.only, step) or (key in kept and not options.again):
            continue
        if step in STEPS:
            kept[key] = measured(judge, options.data, goal, step)
        elif "bits" in goal:
            rivals = rivals or Rivals(judge.model, judge.calibration(options.data))
            kept[key] = rival(judge, rivals, goal["bits"], step)
        else:
            continue
        print(kept[key], flush=True)
        yield judge.loss, sorted(kept.values(), key=_key)
    if kept:
        show(name, judge.loss, sorted(kept.values(), key=_key))


def _key(row: Mapping[str, Any]) -> tuple[int, int, int]:
    """A row's place in the table."""
    return row.get("ratio", 0), -row.get("bits", 0), [*STEPS, *RIVALS].index(row["step"])


def show(name: str, loss: str, rows: list[dict[str, Any]]) -> None:
    """Print one table."""
    print(f"\n{name}")
    cells = [
        [
            row["bits"] if "bits" in row else f"{row['ratio']}x",
            *(row["step"], row["bytes"], f"{row[loss]:.5f}", row["cpu_seconds"]),
        ]
        for row in rows
    ]
    print_table(("bits", "step", "bytes", loss, "CPU seconds"), cells)


def main() -> None:
    """Measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--models", default="language_model")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--ratios", default="", help="sizes to plan for, relative to the model")
    parser.add_argument(
        "--pairs", type=int, default=TRAINING_PAIRS, help="that MiniLM is fitted to"
    )
    parser.add_argument("--windows", type=int, default=30, help="of each set of language models")
    parser.add_argument("--images", type=int, default=175, help="that classifiers are judged by")
    parser.add_argument("--only", default="", help="steps whose names match")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    options = parser.parse_args()
    path = RESULTS / "quality.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results.pop("environment", None)
    for name in options.models.split(","):
        found = results.setdefault(name, {"rows": []})
        for loss, rows in rows_of(name, options, found["rows"]):
            image = name in (*bench_hyper_models.IMAGE_MODELS, "yolox")
            judged = {"images": options.images} if image else {"windows": options.windows}
            judged = {"pairs": options.pairs} if name == "minilm" else judged
            judged = {} if name in ("resnet20", "silero") else judged
            found |= {**judged, "loss": loss, "rows": rows}
            write_results("quality", results)


if __name__ == "__main__":
    main()
