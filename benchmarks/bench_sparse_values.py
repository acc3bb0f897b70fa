"""Values of sparse weights: integers, trellis codes, and codes of the weight with its zeros.

    python benchmarks/bench_sparse_values.py --data FOLDER [--minilm MINILM.onnx] [--only REGEX]
        [--again]

A model with two of every four elements of its products (by `--sparsity 2:4` and data) stands for
those that come pruned. Forms of it are compared with it, and with the model before pruning: `hyper`
has codes for zeros as well, with and without data, and `hyper of the dense model` was never pruned.
The language model is judged by the divergence of its predictions, MiniLM by 1 - cosine on a third
of STS-B; see judges.py. Bytes are those of the pruned weights. Rows that the JSON has already are
not measured again.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
from bench_minilm import embed
from judges import Judge, LanguageModel, SentenceModel
from results import RESULTS, print_table, write_results

import onnxcomp

NAME = "sparse_values"
SPARSITY = "2:4"
WINDOWS, PAIRS = 10, 3
# MiniLM is calibrated with one batch in so many.
BATCHES = 12

# (name, method, bits, of the pruned model, with data)
FORMS = (
    ("sparse+int, 8 bits", "sparse+int", 8, True, False),
    ("sparse+int, 4 bits", "sparse+int", 4, True, False),
    ("sparse+hyper, 5 bits", "sparse+hyper", 5, True, False),
    ("sparse+hyper, 4 bits", "sparse+hyper", 4, True, False),
    ("sparse+hyper, 3 bits", "sparse+hyper", 3, True, False),
    ("hyper, 3 bits", "hyper", 3, True, False),
    ("hyper, 3 bits, with data", "hyper", 3, True, True),
    ("hyper, 2 bits, with data", "hyper", 2, True, True),
    ("hyper of the dense model, 3 bits, with data", "hyper", 3, False, True),
    ("hyper of the dense model, 2 bits, with data", "hyper", 2, False, True),
)


def judge_of(model: Path, reference: Path, data: Path) -> Judge:
    """A judge of forms of a model by another one, which is dense or pruned."""
    if model.stem == "tinyllama_ref":
        return LanguageModel(reference, data / "lm", WINDOWS)
    judge = SentenceModel(model, data, PAIRS)
    judge.dense = embed(onnxruntime.InferenceSession(reference), judge.batches)
    return judge


def rows_of(
    model: Path, data: Path, known: dict[str, dict[str, Any]], asked: str
) -> Iterator[dict[str, Any]]:
    """Rows of the forms that are asked for and not known."""
    feeds = list(judge_of(model, model, data).calibration(data))
    if model.stem != "tinyllama_ref":
        feeds = feeds[::BATCHES]
    with tempfile.TemporaryDirectory() as folder:
        pruned, form = Path(folder) / "pruned.onnx", Path(folder) / "form.onnx"
        onnxcomp.optimize(
            model, pruned, method="dense", sparsity=SPARSITY, data=feeds, verify=False
        )
        judges = {"dense": judge_of(model, model, data), "pruned": judge_of(model, pruned, data)}
        plan = onnxcomp.plan(pruned, method="sparse+int", bits=4)
        names = [choice.site for choice in plan if choice.codec == "sparse+int"]
        only = f"^({'|'.join(map(re.escape, names))})$"
        whole = onnxcomp.inspect(pruned)
        dense = sum(site.nbytes for site in whole.sites if site.name in names)
        if "pruned" not in known:
            yield {"name": "pruned", "bytes": dense, **_losses(judges, pruned)}
        for name, method, bits, of_pruned, with_data in FORMS:
            if name in known or not re.search(asked, name):
                continue
            found = onnxcomp.optimize(
                pruned if of_pruned else model, form, method=method, bits=bits, include=only,
                data=feeds if with_data else None, verify=False,
            )  # fmt: skip
            size = sum(site.bytes_after for site in found.report.sites if site.name in names)
            yield {"name": name, "bytes": size, **_losses(judges, form)}


def _losses(judges: dict[str, Judge], form: Path) -> dict[str, float]:
    """How far a form is from the dense model and from the pruned one."""
    found: dict[str, float] = {}
    for name, judge in judges.items():
        own = judge(form)
        found[f"from_{name}"] = round(own[judge.loss], 5)
        if "spearman" in own:
            found["spearman"] = round(own["spearman"], 5)
    return found


def recorded() -> dict[str, list[dict[str, Any]]]:
    """Rows of earlier runs, by model."""
    path = RESULTS / f"{NAME}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found.pop("environment", None)
    return found


def main() -> None:
    """Measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--only", default="", help="forms whose names match")
    parser.add_argument("--again", action="store_true", help="measure recorded rows again")
    options = parser.parse_args()
    models = {"language_model": options.data / "lm" / "tinyllama_ref.onnx"}
    if options.minilm is not None:
        models["minilm"] = options.minilm
    order = ["pruned", *(form[0] for form in FORMS)]
    for key, model in models.items():
        rows = [] if options.again else recorded().get(key, [])
        known = {row["name"]: row for row in rows}
        if not known.keys() >= set(order):
            for row in rows_of(model, options.data, known, options.only):
                print(key, row, flush=True)
                known[row["name"]] = row
                found = [known[name] for name in order if name in known]
                write_results(NAME, {**recorded(), key: found})
    for key, rows in recorded().items():
        print(f"\n{key}")
        columns = [name for name in rows[0] if name != "name"]
        print_table(["form", *columns], [[r["name"], *(r[c] for c in columns)] for r in rows])


if __name__ == "__main__":
    main()
