"""The test cases that come with the onnx package, before and after the compiler.

    python benchmarks/bench_onnx_cases.py [--every N] [--offset I] [--kinds node ...] [--only TEXT]

Every case that ONNX Runtime runs is compiled three times: with ``--method dense --min-size 0``,
which must not change a bit of the outputs; with ``--bits 6 --min-size 0``; and with every matrix
replaced by 6-bit codes, whether that makes it smaller or not. The last two must give what the same
model gives with the decoded weights in it, with the operator library and without. Most cases have
no weights, only inputs: they run a second time with their float matrices made initializers. Prints
the counts and every case that fails, and writes ``results/onnx_cases.json``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from results import write_results

import onnxcomp as oc
from onnxcomp.errors import CompressionError
from onnxcomp.passes.analysis.weight_sites import find_sites, read_weight
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.methods import typed_params
from onnxcomp.passes.ir import model as graph
from onnxcomp.passes.lowering.expand import expand
from onnxcomp.passes.lowering.rewrite import Placement, rewrite
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.runtime.evaluate import Outputs, run_model
from onnxcomp.runtime.inputs import synthesize_inputs

KINDS = ("node", "simple", "pytorch-converted", "pytorch-operator", "light")
BITS = 6
WITH_WEIGHTS = ", with weights"

# Largest relative L2 difference of an output to that of the model with decoded weights. The library
# rounds activations of products to 8 bits; the definitions in the file round as the operators do,
# which is 2^-8 in bfloat16.
TOLERANCE = 0.05
EXACT = 4e-3

Feed = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One model with inputs.

    Attributes:
        name: Its name.
        model: The model.
        feeds: Its inputs, by name; None for made-up ones.
    """

    name: str
    model: onnx.ModelProto
    feeds: Sequence[Feed] | None


def cases(kinds: Sequence[str]) -> Iterator[Case]:
    """All cases of the installed onnx package, each followed by its form with weights."""
    for kind in kinds:
        source = {"node": node_cases, "light": light_cases}.get(kind)
        for case in source() if source else stored_cases(kind):
            yield case
            frozen = with_weights(case)
            if frozen is not None:
                yield frozen


def node_cases() -> Iterator[Case]:
    """One operator each; the package makes them anew."""
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        found = list(collect_testcases(None))
    for case in found:
        if case.model is None:
            continue
        names = [value.name for value in case.model.graph.input]
        feeds = [dict(zip(names, inputs, strict=False)) for inputs, _ in case.data_sets or ()]
        yield Case(case.name, case.model, feeds)


def data_folder() -> Path:
    """Folder of the cases that are files."""
    import onnx.backend.test

    return Path(onnx.backend.test.__file__).parent / "data"


def stored_cases(kind: str) -> Iterator[Case]:
    """Models with inputs, as files; without those whose models would be downloaded."""
    for folder in sorted((data_folder() / kind).glob("*/")):
        path = folder / "model.onnx"
        if path.is_file():
            model = onnx.load(path)
            yield Case(folder.name, model, list(stored_feeds(folder, model)))


def stored_feeds(folder: Path, model: onnx.ModelProto) -> Iterator[Feed]:
    """The data sets of a stored case."""
    known = {value.name for value in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in known]
    for data in sorted(folder.glob("test_data_set_*")):
        feed = {}
        for index, value in enumerate(inputs):
            path = data / f"input_{index}.pb"
            if path.is_file():
                feed[value.name] = stored_value(path, value.type)
        yield feed


def stored_value(path: Path, kind: onnx.TypeProto) -> Any:
    """One input: a tensor, or a sequence of tensors."""
    if kind.HasField("sequence_type"):
        sequence = onnx.SequenceProto()
        sequence.ParseFromString(path.read_bytes())
        return numpy_helper.to_list(sequence)
    if kind.HasField("optional_type"):
        optional = onnx.OptionalProto()
        optional.ParseFromString(path.read_bytes())
        return numpy_helper.to_optional(optional)
    tensor = onnx.TensorProto()
    tensor.ParseFromString(path.read_bytes())
    return numpy_helper.to_array(tensor)


def light_cases() -> Iterator[Case]:
    """Known networks whose weights are made by nodes."""
    for path in sorted((data_folder() / "light").glob("*.onnx")):
        yield Case(path.stem, onnx.load(path), None)


def is_matrix(array: Any) -> bool:
    """Whether an input could be a weight."""
    name = getattr(getattr(array, "dtype", None), "name", "")
    return name in ("float32", "float16", "bfloat16") and sum(d > 1 for d in array.shape) > 1


def with_weights(case: Case) -> Case | None:
    """The case with its float matrices as initializers; one input stays. None where none is."""
    if not case.feeds:
        return None
    feed = case.feeds[0]
    names = [name for name, array in feed.items() if is_matrix(array)]
    if len(names) == len(feed):
        names = names[1:]
    if not names:
        return None
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    model.ir_version = max(model.ir_version, 4)
    kept = [value for value in model.graph.input if value.name not in names]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    model.graph.initializer.extend(numpy_helper.from_array(feed[name], name) for name in names)
    rest = {name: value for name, value in feed.items() if name not in names}
    return Case(case.name + WITH_WEIGHTS, model, [rest])


class Check:
    """Compiles cases and counts what becomes of them.

    Attributes:
        counts: Cases by outcome.
        failures: What is wrong, by case.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.counts: collections.Counter[str] = collections.Counter()
        self.failures: dict[str, str] = {}

    def __call__(self, case: Case) -> None:
        """Run one case."""
        self.counts["cases"] += 1
        path = self._folder / "case.onnx"
        path.write_bytes(case.model.SerializeToString())
        try:
            feeds = case.feeds or synthesize_inputs(path, samples=1)
            wanted = run_model(path, feeds)
            again = run_model(path, feeds)
        except CompressionError:
            self.counts["not run by ONNX Runtime"] += 1
            self._compile_only(case, path)
            return
        self.counts["run by ONNX Runtime"] += 1
        self.counts["of these with weights"] += case.name.endswith(WITH_WEIGHTS)
        if not same(wanted, again):
            self.counts["random outputs"] += 1
            wanted = []
        self._try(case, "dense", lambda: self._dense(path, feeds, wanted))
        self._try(case, "bits", lambda: self._bits(path, feeds, wanted))
        self._try(case, "codes", lambda: self._codes(path, feeds, bool(wanted)))

    def _try(self, case: Case, step: str, work: Callable[[], str]) -> None:
        try:
            problem = work()
        except Exception as error:  # whatever comes is to be counted and shown
            problem = f"{type(error).__name__}: {error}"
        if problem:
            self.failures[f"{case.name} [{step}]"] = problem
            self.counts[f"{step}: failed"] += 1
        else:
            self.counts[f"{step}: passed"] += 1

    def _compile_only(self, case: Case, path: Path) -> None:
        """What ONNX Runtime refuses may be refused here, in an error of this package."""
        out = self._folder / "out.onnx"
        with contextlib.suppress(CompressionError):
            self._try(case, "unrun", lambda: compiled(path, out, method="dense"))

    def _dense(self, path: Path, feeds: Sequence[Feed], wanted: list[Outputs]) -> str:
        out = self._folder / "out.onnx"
        oc.optimize(path, out, method="dense", min_size=0, verify=False)
        found = run_model(out, feeds)
        return "" if not wanted or same(wanted, found) else "outputs differ"

    def _bits(self, path: Path, feeds: Sequence[Feed], wanted: list[Outputs]) -> str:
        out = self._folder / "out.onnx"
        result = oc.optimize(path, out, bits=BITS, min_size=0, verify=False)
        if not wanted:
            run_model(out, feeds)
            return ""
        if not any(site.compressed for site in result.report.sites):
            found = run_model(out, feeds)
            return "" if same(wanted, found) else "outputs of an unchanged model differ"
        self.counts["bits: with compressed weights"] += 1
        return self._compare(out, feeds)

    def _codes(self, path: Path, feeds: Sequence[Feed], comparable: bool) -> str:
        """Every matrix as codes, even those that grow."""
        model = graph.load(path)
        canonicalize(model)
        placements = [placement(model, site) for site in find_sites(model, min_size=0).sites]
        if not placements:
            return ""
        self.counts["codes: with compressed weights"] += 1
        self.counts["codes: compressed weights"] += len(placements)
        rewrite(model, placements)
        out = self._folder / "codes.onnx"
        graph.save(model, out)
        if not comparable:
            run_model(out, feeds)
            return ""
        return self._compare(out, feeds)

    def _compare(self, compressed: Path, feeds: Sequence[Feed]) -> str:
        """Both forms against the model with the decoded weights."""
        dense = self._folder / "expanded.onnx"
        model = graph.load(compressed)
        expand(model)
        graph.save(model, dense)
        wanted = run_model(dense, feeds)
        library = distance(wanted, run_model(compressed, feeds))
        portable = distance(wanted, run_model(compressed, feeds, library=False))
        if not library <= TOLERANCE:
            return f"with the library the outputs are {library:.3g} away"
        return "" if portable <= EXACT else f"without it the outputs are {portable:.3g} away"


def compiled(path: Path, out: Path, **options: Any) -> str:
    """Compile without running; an error of this package is an answer."""
    with contextlib.suppress(CompressionError):
        oc.optimize(path, out, min_size=0, verify=False, **options)
    return ""


def placement(model: Any, site: Any) -> Placement:
    """A weight as 6-bit codes."""
    codec = CODECS["hyper"]
    params = typed_params(codec.params_type, {"bits": BITS, "state_bits": 8, "group": 32}, "hyper")
    payload = codec.encode(site, read_weight(model, site), params)
    return Placement(site, codec, payload, params=params)


def same(first: Sequence[Outputs], second: Sequence[Outputs]) -> bool:
    """Whether all outputs have the same bits; NaN equals NaN."""
    return all(
        one.keys() == two.keys() and all(equal(one[name], two[name]) for name in one)
        for one, two in zip(first, second, strict=True)
    )


def equal(first: Any, second: Any) -> bool:
    """Whether two arrays have the same type, shape and content."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if first.dtype.kind in "OUS":
        return bool(np.array_equal(first, second))
    return bool(np.ascontiguousarray(first).tobytes() == np.ascontiguousarray(second).tobytes())


def distance(wanted: Sequence[Outputs], found: Sequence[Outputs]) -> float:
    """Largest relative L2 difference of an output; share of unequal elements of discrete ones."""
    pairs = [
        difference(one[name], two[name])
        for one, two in zip(wanted, found, strict=True)
        for name in one
    ]
    return max(pairs, default=0.0)


def difference(wanted: Any, found: Any) -> float:
    """Relative L2 difference where both are finite; infinite where only one is."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return float("inf")
    if wanted.dtype.kind not in "fV" and wanted.dtype.name not in ("bfloat16", "float16"):
        return float(np.mean(wanted != found)) if wanted.size else 0.0
    one, two = wanted.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(one) & np.isfinite(two)
    if not np.array_equal(one[~finite], two[~finite], equal_nan=True):
        return float("inf")
    power = np.linalg.norm(one[finite])
    error = np.linalg.norm((two - one)[finite])
    return float(error / power) if power > 0 else float(error > 1e-6)


def main() -> None:
    """Run the cases, print the counts and the failures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--every", type=int, default=1, help="run each N-th case")
    parser.add_argument("--offset", type=int, default=0, help="and which of them")
    parser.add_argument("--only", default="", help="part of the name")
    parser.add_argument("--write", action="store_true", help="write results/onnx_cases.json")
    parser.add_argument("--verbose", action="store_true", help="name every case before it runs")
    options = parser.parse_args()
    faulthandler.enable()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        check = Check(Path(name))
        for number, case in enumerate(cases(options.kinds)):
            if number % options.every == options.offset and options.only in case.name:
                if options.verbose:
                    print(case.name, flush=True)
                check(case)
    for failed, problem in check.failures.items():
        print(f"{failed}: {problem}")
    document = {"counts": dict(sorted(check.counts.items())), "failures": check.failures}
    if options.write:
        print(write_results("onnx_cases", document))
    print(json.dumps(document["counts"]))
    raise SystemExit(1 if check.failures else 0)


if __name__ == "__main__":
    main()
