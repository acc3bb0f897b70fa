"""Structured pruning: what is lost, by score and share, and what is gained in time.

    python benchmarks/bench_prune.py --data FOLDER [--seconds 300] [--only TEXT]
                      [--parts language,lowrank,division,resnet,mobilenet,latency,decode]

The language model (lm/tinyllama_ref.onnx) loses 10 to 50 % of the parameters of its blocks; judged
by the Kullback-Leibler divergence of its predictions from the dense model's on held-out books and
Shakespeare. ResNet20 and MobileNetV2 lose 20 to 50 % of their FLOPs; judged by accuracy. No labels
are used. `obs fit` is the default; `obs local` measures no losses of outputs and tunes nothing;
`obs search` tries other divisions between layers.
With other scores those layers are fitted that lose columns, as published.
`lowrank` is the language model with factors of as many parameters, fitted as published (`even`: the
same share of every weight) or with ranks by the planner; `division` gives one size to pruning and
codes; `decode` is the form with a cache, which may shrink: tokens in a second, one
after the other, and resident memory of a session. Calibration and evaluation data are disjoint.
Rows that the result file has are not made again; a run ends after --seconds, and the next one goes
on.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from bench_lowrank import factored_plan, factored_sites, only
from inputs import CIFAR_MEAN, CIFAR_STD, cifar, mobilenet
from PIL import Image
from results import RESULTS, print_table, write_results

import onnxcomp
from onnxcomp.passes.ir.model import load, save
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.prune.options import PruneOptions
from onnxcomp.passes.transforms.prune.pruning import prune
from onnxcomp.runtime.bench import load_model

Array = npt.NDArray[Any]
Feeds = Sequence[Mapping[str, Array]]
Row = dict[str, Any]

CONTEXT = 256
CALIBRATION_WINDOWS = 32
WINDOWS = 12
SCORES = ("obs", "numerical", "wanda", "flap", "magnitude")
PARTS = "language,lowrank,division,resnet,mobilenet,latency,decode"
RATIOS = (0.2, 0.5, 0.1, 0.3)

# Divisions between layers that a search tries.
SEARCH = 16


def session(path: Path, *, profile: str = "") -> onnxruntime.InferenceSession:
    """A session with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class LanguageModel:
    """Judges forms of the language model by the dense one."""

    name = "language"

    def __init__(self, data: Path) -> None:
        self.path = data / "lm" / "tinyllama_ref.onnx"
        tokens = np.load(data / "lm" / "calib.npy").astype(np.int64)[:CALIBRATION_WINDOWS]
        self.feeds = [{"input_ids": tokens[i : i + 2]} for i in range(0, len(tokens), 2)]
        sets = [np.load(data / "lm" / f"eval_{name}.npy") for name in ("books", "shakespeare")]
        parts = [part[: WINDOWS * CONTEXT].reshape(-1, CONTEXT) for part in sets]
        self.tokens = np.concatenate(parts).astype(np.int64)
        self._dense: list[Array] | None = None

    def _predictions(self, path: Path) -> Iterator[Array]:
        run = session(path)
        for start in range(0, len(self.tokens), 4):
            logits = run.run(["logits"], {"input_ids": self.tokens[start : start + 4]})[0]
            logits = logits - logits.max(axis=-1, keepdims=True)
            yield logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    def judge(self, path: Path) -> dict[str, float]:
        """Divergence in nats and agreement of the most probable token."""
        if self._dense is None:
            self._dense = list(self._predictions(self.path))
        divergence, agreement, count = 0.0, 0, 0
        for own, dense in zip(self._predictions(path), self._dense, strict=True):
            divergence += float((np.exp(dense) * (dense - own)).sum(dtype=np.float64))
            agreement += int((own.argmax(-1) == dense.argmax(-1)).sum())
            count += own.shape[0] * own.shape[1]
        return {"kl": divergence / count, "agreement": agreement / count}


class ResNet:
    """ResNet20 on CIFAR-10: training images to calibrate, test images to judge."""

    name = "resnet"

    def __init__(self, data: Path) -> None:
        self.path = data / "models" / "resnet20_cifar10.onnx"
        self.feeds = [{"input": pixels} for pixels in _training_images(data, 500)]
        self._test = [(_normal(images), labels) for images, labels in cifar(data)]

    def judge(self, path: Path) -> dict[str, float]:
        """Share of 2,000 test images that are classified correctly."""
        run = session(path)
        right = sum(
            int((run.run(None, {"input": x})[0].argmax(-1) == labels).sum())
            for x, labels in self._test
        )
        return {"accuracy": right / sum(len(labels) for _, labels in self._test)}


def _normal(images: Array) -> Array:
    pixels = (images.astype(np.float32) / 255 - CIFAR_MEAN) / CIFAR_STD
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def _training_images(data: Path, count: int) -> Iterator[Array]:
    with np.load(data / "eval" / "cifar10" / "cifar10_train_jpegbytes.npz") as file:
        blob, offsets = file["blob"].tobytes(), file["offsets"]
    for start in range(0, count, 25):
        parts = [blob[offsets[i] : offsets[i + 1]] for i in range(start, start + 25)]
        images = [np.asarray(Image.open(io.BytesIO(part)).convert("RGB")) for part in parts]
        yield _normal(np.stack(images))


class MobileNet:
    """MobileNetV2 on 500 images, in two halves: one to calibrate, the other one to judge.

    Args:
        data: The data folder.
        half: Which half calibrates, 0 or 1.
    """

    name = "mobilenet"

    def __init__(self, data: Path, half: int) -> None:
        self.path = data / "models" / "mobilenetv2_224_tf2ptq_fp32.onnx"
        images = list(mobilenet(data))
        self.feeds = [feed for feed, _ in images[half::2]]
        self._test = images[1 - half :: 2]

    def judge(self, path: Path) -> dict[str, float]:
        """Share of the other 250 images that are classified correctly."""
        run = session(path)
        right = sum(int(run.run(None, feed)[0].argmax() == label[0]) for feed, label in self._test)
        return {"accuracy": right / len(self._test)}


def _together(rows: Sequence[Row]) -> Row:
    """The row of several cases: means of what they share."""
    return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}


def pruned(
    case: Any, options: PruneOptions, output: Path, feeds: Feeds, path: Path | None = None
) -> Row:
    """Prune a model; what was done."""
    model = load(path or case.path)
    canonicalize(model)
    start = time.process_time()
    report = prune(model, options, feeds=feeds)
    save(model, output)
    cache = [report.before.cache_bytes, report.after.cache_bytes]
    tuned = {} if report.tuned is None else {"tuned": report.tuned.passes}
    return {
        "removed": report.reached,
        "parameters": report.after.parameters,
        "flops": report.after.flops / report.before.flops,
        **({"cache_bytes": cache} if any(cache) else {}),
        "bytes": output.stat().st_size,
        "cpu_seconds": round(time.process_time() - start, 1),
        **tuned,
    }


def language_jobs() -> Iterator[tuple[str, PruneOptions]]:
    """Names and options of the rows of the language model."""
    for compensate in ("fit", "none"):
        for ratio in RATIOS:
            for score in SCORES:
                how = "bias" if score == "flap" and compensate == "none" else compensate
                yield (
                    f"{ratio} {score} {how}",
                    PruneOptions(
                        ratio=ratio,
                        score=score,  # type: ignore[arg-type]
                        compensate=how,  # type: ignore[arg-type]
                        behind=score == "obs",
                        measure=how == "fit",
                    ),
                )


def image_jobs() -> Iterator[tuple[str, PruneOptions]]:
    """Names and options of the rows of the image models."""
    for share in (0.8, 0.7, 0.5):
        for score, how in (
            ("obs", "fit"),
            ("obs", "local"),
            ("obs", "none"),
            ("wanda", "fit"),
            ("magnitude", "none"),
        ):
            local = how == "local"
            options = PruneOptions(
                target_flops=share,
                score=score,  # type: ignore[arg-type]
                compensate="fit" if local else how,  # type: ignore[arg-type]
                behind=score == "obs",
                measure=how == "fit",
                tune=how == "fit",
            )
            yield f"{share} {score} {how}", options
        yield f"{share} obs search", PruneOptions(target_flops=share, search=SEARCH)


def record(key: str, row: Row) -> None:
    """Print a row, and write it beside those of other runs, which may have ended meanwhile."""
    print(key, row, flush=True)
    write_results("prune", {"rows": recorded() | {key: row}})


def recorded() -> dict[str, Row]:
    """Rows of earlier runs."""
    path = RESULTS / "prune.json"
    rows: dict[str, Row] = json.loads(path.read_text())["rows"] if path.exists() else {}
    return rows


def fill(
    rows: dict[str, Row],
    cases: Sequence[Any],
    jobs: Iterator[tuple[str, PruneOptions]],
    only: str,
    late: Callable[[], bool],
) -> None:
    """Make the rows that are missing until time is up; each is the mean of all cases.

    Several cases run side by side, in processes of their own.
    """
    for name, options in jobs:
        key = f"{cases[0].name} {name}"
        if key in rows or only not in key or late():
            continue
        if len(cases) > 1:
            with ProcessPoolExecutor(len(cases)) as pool:
                rows[key] = _together(list(pool.map(row_of, cases, itertools.repeat(options))))
        else:
            rows[key] = row_of(cases[0], options)
        record(key, rows[key])


def row_of(case: Any, options: PruneOptions) -> Row:
    """What pruning does to one case."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "pruned.onnx"
        return pruned(case, options, output, case.feeds) | case.judge(output)


def dense(rows: dict[str, Row], cases: Sequence[Any], only: str) -> None:
    """The row of the dense model, on the data that the others are judged by."""
    key = f"{cases[0].name} dense"
    if key not in rows and only in key:
        rows[key] = _together([case.judge(case.path) for case in cases])
        record(key, rows[key])


def lowrank_jobs(path: Path, data: Any) -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """Names of rows with factors in the place of weights, and what writes the model."""
    for ratio in RATIOS:
        even = factored_plan(path, 1 - ratio, 1024)

        def fitted(output: Path, plan: Any = even) -> Any:
            return onnxcomp.optimize(path, output, plan=plan, data=data, verify=False, jobs=1)

        def mixed(output: Path, plan: Any = even) -> Any:
            size = onnxcomp.optimize(path, plan=plan, dry_run=True).report.output.bytes
            return onnxcomp.optimize(
                path, output, method="lowrank", target_size=size, data=data, verify=False, jobs=1,
                include=only(factored_sites(plan)),
            )  # fmt: skip

        yield f"lowrank {ratio} even", fitted
        if ratio in (0.2, 0.5):
            yield f"lowrank {ratio} mixed", mixed


def division_jobs(path: Path, data: Any) -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """Names of rows with one size for pruning and codes, or for codes alone."""
    for ratio in (8, 12):
        for method in ("hyper", "prune+hyper"):

            def write(output: Path, method: str = method, ratio: float = ratio) -> Any:
                return onnxcomp.optimize(
                    path, output, method=method, ratio=ratio, data=data, verify=False, jobs=1
                )

            yield f"division {ratio} {method}", write


def fill_compiled(
    rows: dict[str, Row],
    case: LanguageModel,
    jobs: Iterator[tuple[str, Callable[[Path], Any]]],
    wanted: str,
    late: Callable[[], bool],
) -> None:
    """Make rows of whole runs of the compiler that are missing."""
    for key, write in jobs:
        if key in rows or wanted not in key or late():
            continue
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "small.onnx"
            start = time.process_time()
            report = write(output).report
            row: Row = {"bytes": report.output.bytes}
            row["cpu_seconds"] = round(time.process_time() - start, 1)
            row |= {"division": report.division} if report.division else {}
            rows[key] = row | case.judge(output)
        record(key, rows[key])


class Decoder:
    """The language model with a cache, one token after the other.

    Args:
        path: The model.
        tokens: What it reads; not what it would write, so that all models do the same.
    """

    def __init__(self, path: Path, tokens: Array) -> None:
        self._run = session(path)
        self._tokens = tokens
        shapes = {value.name: value.shape for value in self._run.get_inputs()}
        self._past = {n: s for n, s in shapes.items() if n.startswith("past")}

    def seconds(self, start: int) -> float:
        """CPU seconds of a token behind `start` others, in the mean."""
        cache = {
            name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
            for name, shape in self._past.items()
        }
        cache = self._step(cache, 0, start)
        begin = time.process_time()
        for place in range(start, len(self._tokens)):
            cache = self._step(cache, place, place + 1)
        return (time.process_time() - begin) / (len(self._tokens) - start)

    def _step(self, cache: dict[str, Array], start: int, stop: int) -> dict[str, Array]:
        feed = {
            "input_ids": self._tokens[None, start:stop],
            "attention_mask": np.ones((1, stop), np.int64),
            "position_ids": np.arange(start, stop)[None],
        }
        return dict(zip(cache, self._run.run(None, feed | cache)[1:], strict=True))


def cached_feeds(case: LanguageModel) -> list[dict[str, Array]]:
    """Calibration inputs of the form with a cache, which is empty."""
    past = [f"past_key_values.{n}.{kind}" for n in range(6) for kind in ("key", "value")]
    found = []
    for feed in case.feeds:
        tokens = feed["input_ids"]
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        empty = np.zeros((len(tokens), 4, 0, 32), np.float32)
        feed = {**feed, "attention_mask": np.ones_like(tokens), "position_ids": positions.copy()}
        found.append(feed | dict.fromkeys(past, empty))
    return found


def decode(rows: dict[str, Row], case: LanguageModel, wanted: str) -> None:
    """Tokens in a second and memory, dense and pruned in turns."""
    path = case.path.with_name("tinyllama_ref_kv.onnx")
    for ratio in (0.2, 0.5):
        key = f"decode {ratio}"
        if key in rows or wanted not in key:
            continue
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "pruned.onnx"
            row = pruned(None, PruneOptions(ratio=ratio), output, cached_feeds(case), path)
            forms = [Decoder(form, case.tokens[0]) for form in (path, output)]
            times = np.array([[form.seconds(64) for form in forms] for _ in range(15)])
            dense, own = (1 / statistics.median(column) for column in times.T.tolist())
            row["tokens_per_second"] = [round(dense, 1), round(own, 1)]
            row["time"] = statistics.median((times[:, 1] / times[:, 0]).tolist())
            memory = [load_model(form, library=True)["rss_bytes"] for form in (path, output)]
            rows[key] = row | {"rss_bytes": memory}
        record(key, rows[key])


def _product_times(
    path: Path, feed: Mapping[str, Array], folder: Path, runs: int
) -> dict[str, float]:
    """Median microseconds of each node that multiplies, by node name."""
    run = session(path, profile=str(folder / path.stem))
    for _ in range(runs):
        run.run(None, dict(feed))
    events = json.loads(Path(run.end_profiling()).read_text())
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        name = event.get("name", "")
        if event.get("cat") == "Node" and name.endswith("_kernel_time"):
            found[name.removesuffix("_kernel_time")].append(event["dur"])
    return {name: statistics.median(values) for name, values in found.items()}


def latency(rows: dict[str, Row], case: LanguageModel, only: str) -> None:
    """Time of the blocks' products at 128 positions, dense and pruned, taken in turns."""
    for ratio in (0.2, 0.5):
        key = f"latency {ratio}"
        if key in rows or only not in key:
            continue
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "pruned.onnx"
            pruned(case, PruneOptions(ratio=ratio, least=0.1), output, case.feeds[:8])
            rows[key] = _compare(case, output, Path(folder))
        record(key, rows[key])


def _compare(case: LanguageModel, output: Path, folder: Path) -> Row:
    feed = {"input_ids": case.tokens[:1, :128]}
    flops = [_product_flops(path) for path in (case.path, output)]
    changed = [name for name in flops[0] if flops[1].get(name, flops[0][name]) != flops[0][name]]
    ratios = []
    for _ in range(7):
        times = [_product_times(path, feed, folder, 40) for path in (case.path, output)]
        ratios.append(sum(times[1][n] for n in changed) / sum(times[0][n] for n in changed))
    share = sum(flops[1][n] for n in changed) / sum(flops[0][n] for n in changed)
    return {"time": statistics.median(ratios), "flops": share, "products": len(changed)}


def _product_flops(path: Path) -> dict[str, int]:
    """Multiplications for one position, by the name of a MatMul with a weight."""
    model = load(path)
    return {
        node.name or "": int(node.inputs[1].const_value.size)  # type: ignore[union-attr]
        for node in model.graph
        if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].const_value
    }


def show(rows: Mapping[str, Row]) -> None:
    """Print all rows."""
    keys = ("removed", "flops", "kl", "agreement", "accuracy", "time", "cpu_seconds")
    table = [
        [name, *(f"{row[key]:.4f}" if key in row else "" for key in keys)]
        for name, row in sorted(rows.items())
    ]
    print_table(["row", *keys], table)


def main() -> None:
    """Make rows, print them, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parts", default=PARTS)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    rows = recorded()
    end = time.monotonic() + given.seconds

    def late() -> bool:
        return time.monotonic() > end

    for part in given.parts.split(","):
        if part in ("resnet", "mobilenet"):
            cases: list[Any] = [ResNet(given.data)]
            if part == "mobilenet":
                cases = [MobileNet(given.data, half) for half in (0, 1)]
            fill(rows, cases, image_jobs(), given.only, late)
            dense(rows, cases, given.only)
            continue
        case = LanguageModel(given.data)
        if part == "language":
            fill(rows, [case], language_jobs(), given.only, late)
        elif part in ("lowrank", "division"):
            data = {"input_ids": np.concatenate([feed["input_ids"] for feed in case.feeds])}
            jobs = {"lowrank": lowrank_jobs, "division": division_jobs}[part](case.path, data)
            fill_compiled(rows, case, jobs, given.only, late)
        else:
            {"latency": latency, "decode": decode}[part](rows, case, given.only)
    show(rows)


if __name__ == "__main__":
    main()
