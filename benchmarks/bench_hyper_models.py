"""Quality of whole models: hyper, plain and calibrated, against integer rounding and winding.

    python benchmarks/bench_hyper_models.py --data FOLDER [--minilm MINILM.onnx]
        [--models language_model,squeezenet] [--only REGEX] [--again]

FOLDER is laid out as for the other benchmarks. The language model (lm/tinyllama_ref.onnx) is
judged by the divergence of its predictions from the dense model's and by perplexity, MiniLM by
STS-B development pairs, MobileNetV2 and SqueezeNet by agreement with the dense model. Calibration
data are lm/calib.npy, sentences of the STS-B training set, and images that are not judged by. All
forms of a model compress the same tensors; sizes are those of real files. Rows that the JSON has
already are not measured again unless `--again` asks for it; it is written after every row. A row
takes a minute or two, calibrated rows of MiniLM ten.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from integer_rounding import gptq_model, round_model
from judges import ImageModel, Judge, LanguageModel, SentenceModel
from results import RESULTS, print_table, write_results

import onnxcomp
from onnxcomp.passes.analysis.weight_sites import find_sites
from onnxcomp.passes.calibration.statistics import Stats, collect
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.transforms.canonicalize import canonicalize

# Writes a form of a model and returns its bytes.
Writer = Callable[[Path], int]
IMAGE_MODELS = {
    "mobilenetv2": "mobilenetv2_224_tf2ptq_fp32.onnx",
    "squeezenet": "squeezenet_fp16.onnx",
}
# The published settings for language models, and for the small UNet.
PUBLISHED = {
    "winding, published, 1600 points": "points=1600,side=0.1,classes=3",
    "winding, published, 225 points": "points=225,side=0.1,classes=3",
}


class Forms:
    """All forms of a model that are compared.

    Args:
        judge: Knows the model and its calibration data.
        data: The data folder.
    """

    def __init__(self, judge: Judge, data: Path) -> None:
        self.model, self.feeds = judge.model, judge.calibration(data)
        self._stats: dict[str, Stats] | None = None

    def __iter__(self) -> Iterator[tuple[str, Writer]]:
        if self.model.name not in IMAGE_MODELS.values():
            yield from self.integers()
        for bits in (4, 3, 2):
            yield f"hyper {bits}", self.hyper(bits, "")
            yield f"hyper {bits}, calibrated", self.hyper(bits, "", calibrated=True)
            table = self.hyper(bits, "table=structured")
            yield f"hyper {bits}, structured", table
            table = self.hyper(bits, "table=structured", calibrated=True)
            yield f"hyper {bits}, structured, calibrated", table
            best = self.hyper(bits, "state_bits=12", calibrated=True)
            yield f"hyper {bits}, calibrated, 12 state bits", best
        for bits in (5, 6):
            yield f"hyper {bits}", self.hyper(bits, "")
            yield f"hyper {bits}, calibrated", self.hyper(bits, "", calibrated=True)
        for name, settings in PUBLISHED.items():
            yield name, self.winding(settings)

    def integers(self) -> Iterator[tuple[str, Writer]]:
        """MatMulNBits, with every quantiser that comes with ONNX Runtime and needs no other."""
        for bits, symmetric in ((4, True), (4, False), (2, False), (8, False)):
            kind = "symmetric" if symmetric else "asymmetric"
            yield f"RTN int{bits}, {kind}", self._rounded(bits, "default", symmetric)
        yield "HQQ int4", self._rounded(4, "hqq")
        yield "k-quant int4", self._rounded(4, "k_quant")
        for bits in (4, 2):
            yield f"GPTQ int{bits} (numpy), asymmetric", self._gptq(bits)

    def _rounded(self, bits: int, algorithm: str, symmetric: bool = False) -> Writer:
        return lambda path: round_model(
            self.model, path, bits, symmetric=symmetric, algorithm=algorithm
        )

    def _gptq(self, bits: int) -> Writer:
        return lambda path: gptq_model(self.model, path, bits, self.statistics())

    def statistics(self) -> dict[str, Stats]:
        """Second moments of the dense model, by name of the MatMul node."""
        if self._stats is None:
            self._stats, model = {}, load(self.model)
            canonicalize(model)
            for stats in collect(model, self.feeds, find_sites(model).sites):
                uses = (use.node for use in stats.site.uses if use.op_type == "MatMul")
                self._stats.update(dict.fromkeys(uses, stats))
        return self._stats

    def hyper(self, bits: int, settings: str, *, calibrated: bool = False) -> Writer:
        """A writer of hyper codes."""
        rules = (f".*:{settings}",) if settings else ()
        data = self.feeds if calibrated else None
        return lambda path: self._compile(path, "hyper", bits=bits, data=data, set_=rules)

    def winding(self, settings: str) -> Writer:
        """A writer of the published form."""
        return lambda path: self._compile(path, "winding", bits=4, set_=f".*:{settings}")

    def _compile(self, path: Path, method: str, **options: Any) -> int:
        result = onnxcomp.optimize(self.model, path, method=method, verify=False, **options)
        kept = [s.name for s in result.report.sites if not s.compressed and s.bytes_before >= 16384]
        if kept:
            print(f"{len(kept)} weights stay dense, such as {kept[0]}: {path.name}", flush=True)
        return int(result.report.output.bytes)


def bars(rows: list[dict[str, Any]], key: str) -> dict[str, bool]:
    """Which of the promised comparisons hold, of those whose rows are there."""
    loss = {row["name"]: row[key] for row in rows}
    if "GPTQ int2 (numpy), asymmetric" not in loss:
        return {}
    loss["RTN int4"] = min(loss[f"RTN int4, {kind}"] for kind in ("symmetric", "asymmetric"))
    two = ("RTN int2, asymmetric", "GPTQ int2 (numpy), asymmetric")
    loss["the best int2"] = min(loss[name] for name in two)
    promises = (
        ("hyper 4", "RTN int4", "at most half of", 0.5),
        ("hyper 4, calibrated", "RTN int4", "at most half of", 0.5),
        ("hyper 4, calibrated", "GPTQ int4 (numpy), asymmetric", "not above", 1.0),
        ("hyper 3, calibrated", "RTN int4", "not above", 1.0),
        ("hyper 3, calibrated, 12 state bits", "RTN int4", "not above", 1.0),
        ("hyper 2, calibrated", "the best int2", "below a third of", 1 / 3),
    )
    return {
        f"{ours} {words} {theirs}": loss[ours] <= share * loss[theirs]
        for ours, theirs, words, share in promises
        if ours in loss
    }


def compare(
    judge: Judge, data: Path, rows: list[dict[str, Any]], options: argparse.Namespace
) -> Iterator[list[dict[str, Any]]]:
    """Rows of all forms in their order, whenever one more has been measured."""
    known = {row["name"]: row for row in rows}
    forms = Forms(judge, data)
    writers: dict[str, Writer | None] = {"dense": None, **dict(forms)}
    for name, write in writers.items():
        asked = re.search(options.only, name) is not None
        if not asked or (name in known and not options.again):
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "form.onnx" if write else judge.model
            size = write(path) if write else judge.model.stat().st_size
            known[name] = {"name": name, "bytes": size, **judge(path)}
        print(known[name], flush=True)
        yield [known[name] for name in writers if name in known]


def show(title: str, rows: list[dict[str, Any]], held: dict[str, bool]) -> None:
    """Print one table and the comparisons."""
    columns = [name for name in rows[0] if name not in ("name", "bytes")]
    print(f"\n{title}")
    cells = [
        [row["name"], row["bytes"], f"{rows[0]['bytes'] / row['bytes']:.2f}"]
        + [f"{row[column]:.5f}" for column in columns]
        for row in rows
    ]
    print_table(("model", "bytes", "ratio", *columns), cells)
    for text, met in held.items():
        print(f"{'met   ' if met else 'MISSED'}  {text}")


def judge_of(name: str, options: argparse.Namespace) -> Judge:
    """The judge of one model."""
    if name == "language_model":
        folder = options.data / "lm"
        return LanguageModel(folder / "tinyllama_ref.onnx", folder, options.windows)
    if name == "minilm":
        if options.minilm is None:
            raise SystemExit("minilm needs --minilm")
        return SentenceModel(options.minilm, options.data)
    return ImageModel(options.data / "models" / IMAGE_MODELS[name], options.data, options.images)


def main() -> None:
    """Measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--models", default="language_model,minilm,mobilenetv2,squeezenet")
    parser.add_argument("--windows", type=int, default=30, help="of each set of the language model")
    parser.add_argument("--images", type=int, default=175, help="that classifiers are judged by")
    parser.add_argument("--only", default="", help="rows whose names match")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    options = parser.parse_args()
    results = earlier_results()
    for name in options.models.split(","):
        judge = judge_of(name, options)
        found = results.setdefault(name, {"rows": []})
        for rows in compare(judge, options.data, found["rows"], options):
            found |= {"windows": options.windows, "rows": rows, "bars": bars(rows, judge.loss)}
            write_results("hyper_models", results)
        if found["rows"]:
            show(name, found["rows"], found["bars"])


def earlier_results() -> dict[str, Any]:
    """What earlier runs have found."""
    path = RESULTS / "hyper_models.json"
    if not path.exists():
        return {}
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    document.pop("environment", None)
    return document


if __name__ == "__main__":
    main()
