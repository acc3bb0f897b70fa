"""Low-rank factors: what is lost at 75, 50 and 25 % of the weights, and what is gained in speed.

    python benchmarks/bench_lowrank.py --data FOLDER [--minilm MINILM.onnx] [--kept 0.5]
    python benchmarks/bench_lowrank.py --data FOLDER --smollm2 FOLDER --kept 0.75
    python benchmarks/bench_lowrank.py --speed

Language models are judged by the divergence of their predictions from the dense model's, MiniLM by
a third of STS-B; see judges.py. Only products within the layers are factored, all with
the same share of their weights (ranks are multiples of 8), but for `noise` and `global`, which
choose ranks in the same bytes. `svd` looks at the weights alone, `whitened` at the inputs that the
dense model gives them, `anchored` at those behind the factors before and at the dense model's
outputs, `both` also at what the loss feels of products, `tuned` moves the factors in the end.
`shared` and `neighbours` are as `tuned`, in the same share of all weights of a basis: `shared` has
one for weights that read the same value, `neighbours` one for those of two layers in turn.
`global` is `tuned` with ranks by the curvature of the loss, `noise` with ranks by the loss of noise
in each weight, and `shared, planned` what a plan makes of shared bases.

In few bits:
`lowrank+hyper` has factors of half of the weights in 4 bits, `hyper` all ranks in 2 bits,
`hyper+lowrank` those with a repair of rank 32, `chosen` what a plan takes of the first two in the
bytes of the first. Rows that were measured before are kept. Speed: CPU time of two products against
one, 4096 x 4096, interleaved.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from bench_matmul import Bench, Maker, Product, build, float_product, interleave, open_session
from bench_minilm import quality
from judges import DecoderModel, Judge, LanguageModel, SentenceModel
from onnx import helper
from results import RESULTS, print_table, write_results

import onnxcomp
from onnxcomp.passes.codecs.lowrank.codec import STEP
from onnxcomp.passes.encoding import samples
from onnxcomp.passes.planning import observed
from onnxcomp.passes.planning.candidates import Choice
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.runtime.memory import peak_rss

Array = npt.NDArray[Any]
NAME = "lowrank"
SIDE = 4096
SHARES = (4, 8, 16)

METHODS = ("svd", "whitened", "anchored", "both", "tuned", "noise", "global")
SHARED = ("shared", "neighbours")
PLANNED = ("noise", "global", "shared, planned")
# In few bits, at half of the weights: factors, all ranks, and what a plan chooses of the two.
CODED = ("lowrank+hyper", "hyper", "hyper+lowrank", "chosen")
FACTOR_BITS, WHOLE_BITS = 4, 2
NAMES = tuple(dict.fromkeys((*METHODS, *SHARED, *PLANNED, *CODED)))
# Passes over the samples that tune factors, as by default.
TUNED = 2
# MiniLM is judged by one pair of sentences in so many.
PAIRS = 3


def factored_plan(
    model: Path, kept: float, widest: int, codec: str = "lowrank", step: int = STEP, **params: int
) -> Plan:
    """Every product within the layers with the same share of its weights."""
    plan = onnxcomp.plan(model, method="dense")
    for choice in list(plan):
        inside = len(choice.shape) == 2 and max(choice.shape) <= widest
        if inside and "MatMul" in choice.uses:
            rows, length = choice.shape
            rank = round(kept * rows * length / (rows + length) / step - 0.2) * step
            plan[choice.site] = choice.with_(codec=codec, rank=max(step, rank), **params)
    return plan


def shared_plan(model: Path, kept: float, widest: int, layers: int) -> Plan:
    """As many weights as `factored_plan` keeps; `layers` families of equal shapes share a basis."""
    even = factored_plan(model, kept, widest)
    names = factored_sites(even)
    found = onnxcomp.plan(model, method="shared_basis", set_=f".*:kept={kept}", include=only(names))
    families: dict[str, list[Choice]] = {}
    for choice in found:
        basis = getattr(choice.params, "basis", "")
        if choice.site in names and basis:
            families.setdefault(basis, []).append(choice)
    alike: dict[tuple[Any, ...], list[list[Choice]]] = {}
    for members in families.values():
        alike.setdefault(tuple(choice.shape for choice in members), []).append(members)
    joined = [
        [choice for turn in turns[start : start + layers] for choice in turn]
        for turns in alike.values()
        for start in range(0, len(turns), layers)
    ]
    room = sum(even[c.site].params.rank * sum(c.shape) for own in joined for c in own)  # type: ignore[attr-defined]
    # Weights are stored transposed, as exporters do.
    sizes = [own[0].shape[0] + sum(choice.shape[1] for choice in own) for own in joined]
    full = [sum(math.prod(choice.shape) for choice in own) for own in joined]
    exact = [kept * whole / size / STEP for whole, size in zip(full, sizes, strict=True)]
    ranks = [STEP * int(steps) for steps in exact]
    for number in sorted(range(len(ranks)), key=lambda n: int(exact[n]) - exact[n]):
        used = sum(rank * size for rank, size in zip(ranks, sizes, strict=True))
        if used + STEP * sizes[number] <= room:
            ranks[number] += STEP
    for own, rank in zip(joined, ranks, strict=True):
        for choice in own:
            even[choice.site] = choice.with_(rank=rank, basis=f"of {own[0].site}")
    return even


def factored_sites(plan: Plan) -> list[str]:
    """Names of the weights with factors."""
    return [choice.site for choice in plan if choice.codec == "lowrank"]


def only(names: list[str]) -> str:
    """A pattern for exactly these weights."""
    import re

    return f"^({'|'.join(re.escape(name) for name in names)})$"


@contextlib.contextmanager
def unknown_curvature(place: ModuleType) -> Iterator[None]:
    """What the loss feels of products is not known to a module while the block runs."""
    known = place.output_moments
    place.output_moments = lambda *_, **__: {}  # type: ignore[attr-defined]
    try:
        yield
    finally:
        place.output_moments = known  # type: ignore[attr-defined]


def compile_row(
    model: Path, output: Path, method: str, kept: float, widest: int, data: Any
) -> onnxcomp.Result:
    """Write one form of a model."""
    even = factored_plan(model, kept, widest)
    options: dict[str, Any] = {"verify": False, "jobs": 1}
    if method == "svd":
        return onnxcomp.optimize(model, output, plan=even, **options)
    if method in SHARED:
        even = shared_plan(model, kept, widest, 1 if method == "shared" else 2)
        return onnxcomp.optimize(model, output, plan=even, data=data, tune=TUNED, **options)
    if method in ("whitened", "anchored", "both", "tuned"):
        options["calibration"] = "parallel" if method == "whitened" else "sequential"
        options["tune"] = TUNED if method == "tuned" else 0
        with contextlib.ExitStack() as stack:
            if method in ("whitened", "anchored"):
                stack.enter_context(unknown_curvature(samples))
            return onnxcomp.optimize(model, output, plan=even, data=data, **options)
    options["include"] = only(factored_sites(even))
    options["data"] = data
    if method == "hyper":
        return onnxcomp.optimize(model, output, method="hyper", bits=WHOLE_BITS, **options)
    if method == "hyper+lowrank":
        rule = f".*:bits={WHOLE_BITS},rank=32"
        return onnxcomp.optimize(model, output, method=method, set_=rule, **options)
    if method in PLANNED:
        codec = "shared_basis" if method == "shared, planned" else "lowrank"
        size = onnxcomp.optimize(model, plan=even, dry_run=True).report.output.bytes
        with contextlib.ExitStack() as stack:
            if method == "noise":
                stack.enter_context(unknown_curvature(observed))
            return onnxcomp.optimize(model, output, method=codec, target_size=size, **options)
    coded = factored_plan(model, kept, widest, "lowrank+hyper", 32, bits=FACTOR_BITS)
    if method == "lowrank+hyper":
        del options["include"]
        return onnxcomp.optimize(model, output, plan=coded, **options)
    size = onnxcomp.optimize(model, plan=coded, dry_run=True).report.output.bytes
    both = ["hyper", "lowrank+hyper"]
    return onnxcomp.optimize(model, output, method=both, target_size=size, **options)


def measure(
    judge: Judge, model: Path, method: str, kept: float, widest: int, data: Any
) -> dict[str, Any]:
    """One row: bytes, seconds, quality, and the peak of the process' memory until then."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.onnx"
        start = time.process_time()
        result = compile_row(model, path, method, kept, widest, data)
        seconds = time.process_time() - start
        peak = peak_rss()
        quality = {name: round(value, 5) for name, value in judge(path).items()}
    row = {"method": method, "kept": kept, "bytes": result.report.output.bytes}
    taken = [site.method for site in result.report.sites if site.method in CODED]
    row |= {"taken": {name: taken.count(name) for name in set(taken)}} if taken else {}
    return {**row, "cpu_seconds": round(seconds, 1), "peak_rss_bytes": peak, **quality}


def recorded() -> dict[str, Any]:
    """Results of earlier runs."""
    path = RESULTS / f"{NAME}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found.pop("environment", None)
    return {"language_model": [], "minilm": [], "smollm2": [], "speed": [], **found}


def sweep(
    key: str, judge: Judge, model: Path, widest: int, data: Any, arguments: argparse.Namespace
) -> None:
    """Measure what is not recorded yet, a row at a time."""
    for kept in arguments.kept:
        for method in arguments.method:
            results = recorded()
            others = [r for r in results[key] if (r["method"], r["kept"]) != (method, kept)]
            if len(others) < len(results[key]) and not arguments.again:
                continue
            row = measure(judge, model, method, kept, widest, data)
            print(row, flush=True)
            results = recorded()
            results[key] = sorted([*others, row], key=lambda r: (-r["kept"], r["method"]))
            write_results(NAME, results)


def thin_product(rank: int) -> Maker:
    """Two products with factors of a rank."""

    def make(rng: np.random.Generator, i: int, length: int, rows: int) -> Product:
        nodes = [
            helper.make_node("MatMul", ["x", f"down{i}"], [f"h{i}"]),
            helper.make_node("MatMul", [f"h{i}", f"up{i}"], [f"y{i}"]),
        ]
        down = rng.standard_normal((length, rank), np.float32)
        return Product(
            nodes, {f"down{i}": down, f"up{i}": rng.standard_normal((rank, rows), np.float32)}
        )

    return make


def measure_speed(repeats: int) -> list[dict[str, Any]]:
    """CPU time of a dense product over that of two thin ones; few rows with cold weights."""
    makers: dict[str, Callable[..., Product]] = {"dense": float_product}
    makers |= {f"K/{share}": thin_product(SIDE // share) for share in SHARES}
    rows = []
    for m, cold in ((1, 400_000_000), (128, 0)):
        benches = {}
        for name, make in makers.items():
            model, count, size = build(make, SIDE, SIDE, cold)
            benches[name, 1] = Bench(open_session(model, 1, False), count, size, "")
        x = np.random.default_rng(m).standard_normal((m, SIDE), np.float32)
        times = interleave(benches, {"x": x}, repeats)
        rows += [
            {"m": m, "rank": name, "over_dense": round(times["dense", 1] / times[name, 1], 2)}
            for name in list(makers)[1:]
        ]
    return rows


def show(results: dict[str, Any]) -> None:
    columns = {"language_model": "kl", "minilm": "spearman", "smollm2": "kl"}
    for key, column in columns.items():
        rows = [
            [f"{r['kept']:.0%}", r["method"], r["bytes"], f"{r[column]:.4f}"] for r in results[key]
        ]
        print_table([key, "method", "bytes", column], rows)
    print_table(
        ["M", "rank", "times faster"],
        [[r["m"], r["rank"], r["over_dense"]] for r in results["speed"]],
    )


def sweep_language_model(arguments: argparse.Namespace) -> None:
    """Rows of the small language model."""
    folder = arguments.data / "lm"
    model = folder / "tinyllama_ref.onnx"
    windows = np.load(folder / "calib.npy").astype(np.int64)[: arguments.samples]
    judge = LanguageModel(model, folder, arguments.windows)
    sweep("language_model", judge, model, 704, {"input_ids": windows}, arguments)


def sweep_minilm(arguments: argparse.Namespace) -> None:
    """Rows of MiniLM."""
    sentences = SentenceModel(arguments.minilm, arguments.data, PAIRS)
    dense = quality(sentences.dense, sentences.dense, sentences.scores)["spearman"]
    write_results(NAME, {**recorded(), "minilm_dense": round(dense, 5)})
    feeds = sentences.calibration(arguments.data)
    feeds = feeds[:: -(-len(feeds) // (2 * arguments.samples))]  # they are sorted by length
    sweep("minilm", sentences, arguments.minilm, 1536, feeds, arguments)


def sweep_smollm2(arguments: argparse.Namespace) -> None:
    """Rows of SmolLM2-135M; its tied table stays dense."""
    judge = DecoderModel(arguments.smollm2, arguments.data, arguments.windows)
    feeds = list(judge.calibration(arguments.data))[: arguments.samples]
    sweep("smollm2", judge, judge.model, 1536, feeds, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--minilm", type=Path)
    parser.add_argument("--smollm2", type=Path, help="folder of the model")
    parser.add_argument("--kept", nargs="+", type=float, default=[0.75, 0.5, 0.25])
    parser.add_argument("--method", nargs="+", default=METHODS, choices=NAMES)
    parser.add_argument("--windows", type=int, default=10)
    parser.add_argument(
        "--samples", type=int, default=32, help="calibration windows, and half of the batches"
    )
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--again", action="store_true", help="measure recorded rows again")
    arguments = parser.parse_args()
    if arguments.speed:
        results = recorded()
        results["speed"] = measure_speed(arguments.repeats)
        write_results(NAME, results)
    if arguments.smollm2 is not None:
        sweep_smollm2(arguments)
    elif arguments.minilm is not None:
        sweep_minilm(arguments)
    elif arguments.data is not None:
        sweep_language_model(arguments)
    show(recorded())


if __name__ == "__main__":
    main()
