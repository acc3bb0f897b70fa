"""MiniLM in every form, in engines and versions of ONNX Runtime; and what tools make of it.

    python benchmarks/bench_engines.py MINILM.onnx --environments FOLDER [--only NAME ...]

Every engine and tool is installed from PyPI or npm into an environment of its own below FOLDER,
which must lie outside of the project. The error is that of the first output against the dense
model's in ONNX Runtime for the dense model, and against the functions' form there for the others.
Engines that take a library of operators run the functions' form with it, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from environments import InstallError, installed, installed_by_npm, own_variables, version_of
from results import compile_model, print_table, write_results

import onnxcomp
from onnxcomp.ops import library_path
from onnxcomp.runtime.machine import look

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(__file__).parent / "clients" / "engines"
RESULTS = Path(__file__).parent / "results" / "engines.json"
MARK = "RESULT "
SECONDS = 600
LIBRARY = "functions, with the library"

# Options of `onnxcomp optimize` for each form; None for the model as it is.
FORMS: dict[str, tuple[str, ...] | None] = {
    "dense": None,
    "functions": ("--bits", "4"),
    "inlined": ("--bits", "4", "--functions", "inline"),
    "not to be folded": ("--bits", "4", "--functions", "inline-unfoldable"),
}


@dataclasses.dataclass(frozen=True)
class Engine:
    """Something that runs ONNX.

    Attributes:
        name: What it is called.
        packages: What pip, or npm for a script of Node, is told to install; the first one's
            version is reported.
        script: Runs it, in `SCRIPTS`.
        line: The line of code that opens a model.
        library: Whether it takes a library of operators.
    """

    name: str
    packages: tuple[str, ...]
    script: str
    line: str
    library: bool = False


_RUNTIME = 'onnxruntime.InferenceSession("m.onnx")'
ENGINES = (
    Engine(
        "onnxruntime-1.18", ("onnxruntime==1.18.1", "numpy<2"), "run_onnxruntime.py", _RUNTIME, True
    ),
    Engine("onnxruntime-1.24", ("onnxruntime==1.24.1",), "run_onnxruntime.py", _RUNTIME, True),
    Engine("onnxruntime", ("onnxruntime",), "run_onnxruntime.py", _RUNTIME, True),
    Engine(
        "onnxruntime-node", ("onnxruntime-node",), "run_onnxruntime_node.mjs",
        'InferenceSession.create("m.onnx")',
    ),
    Engine("onnx", ("onnx",), "run_onnx.py", 'ReferenceEvaluator("m.onnx")'),
    Engine("openvino", ("openvino", "numpy"), "run_openvino.py", 'Core().compile_model("m.onnx")'),
    Engine("tract", ("tract", "numpy"), "run_tract.py", 'tract.onnx().load("m.onnx")'),
    Engine("mnn", ("mnn", "numpy"), "run_mnn.py", "mnnconvert -f ONNX --modelFile m.onnx ..."),
)  # fmt: skip

# Tools that write a model, and what they are told: `{0}` is the input, `{1}` the output.
_SAVE = (
    "import sys, onnxruntime as o; s = o.SessionOptions(); "
    "s.optimized_model_filepath = sys.argv[2]; "
    "s.graph_optimization_level = o.GraphOptimizationLevel.ORT_ENABLE_BASIC; "
    "o.InferenceSession(sys.argv[1], s, providers=['CPUExecutionProvider'])"
)
_SIMPLIFY = (
    "import sys, onnx, onnxsim; onnx.save(onnxsim.simplify(onnx.load(sys.argv[1]))[0], sys.argv[2])"
)
TOOLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "onnxslim": (("onnxslim", "onnxruntime"), ("-m", "onnxslim")),
    "onnxsim": (("onnxsim", "onnxruntime"), ("-c", _SIMPLIFY)),
    "ONNX Runtime, saved": (("onnxruntime",), ("-c", _SAVE)),
}


def _done(
    program: Path, *words: str, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A program of an engine's environment, run to its end."""
    return subprocess.run(
        [str(program), *words],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env=own_variables(program),
        cwd=folder,
    )


def run(engine: Engine, place: Path, model: Path, feeds: Path, *more: str) -> dict[str, Any]:
    """What an engine makes of a model; ``failed`` where it does not run it."""
    node = engine.script.endswith(".mjs")
    program = Path(shutil.which("node") or "node") if node else place / "bin" / "python"
    inputs = feeds.with_suffix(".json") if node else feeds
    words = (str(SCRIPTS / engine.script), str(model), str(inputs), *more)
    try:
        done = _done(program, *words, folder=place)
    except subprocess.TimeoutExpired:
        return {"failed": f"no result within {SECONDS} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if lines:
        result: dict[str, Any] = json.loads(lines[-1][len(MARK) :])
        return result
    return {"failed": reason(done.stderr.splitlines()) or f"exit code {done.returncode}"}


def reason(lines: Sequence[str]) -> str:
    """The line that says why a model was refused: one that names an operator, or an error."""
    named = [line.strip() for line in lines if "Hyper" in line or "Unimplemented" in line]
    said = [line.strip() for line in lines if "rror" in line and "::" not in line]
    return (named or said or [""])[-1].lstrip("-[]0123456789: ")[:200]


def prepared(model: Path, folder: Path) -> dict[str, tuple[Path, Path]]:
    """Each form's file, and its inputs with the output to compare with."""
    ids = np.arange(1000, 1016, dtype=np.int64).reshape(1, 16)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    found = {}
    for name, options in FORMS.items():
        path = folder / f"{name.replace(' ', '_')}.onnx"
        if options is None:
            path.write_bytes(model.read_bytes())
        else:
            compile_model(model, path, *options, "--no-verify", "--external-data", "never")
        reference = path if options is None else folder / "functions.onnx"
        session = onnxruntime.InferenceSession(reference, providers=["CPUExecutionProvider"])
        arrays = {**feeds, "wanted": session.run(None, feeds)[0]}
        np.savez(path.with_suffix(".npz"), **arrays)
        texts = {
            key: {"type": str(a.dtype), "dims": a.shape, "data": a.ravel().tolist()}
            for key, a in arrays.items()
        }
        path.with_suffix(".json").write_text(json.dumps(texts), encoding="utf-8")
        found[name] = path, path.with_suffix(".npz")
    return found


def rewritten(python: Path, words: Sequence[str], model: Path, output: Path) -> dict[str, Any]:
    """What a tool makes of a file: bytes, and whether `inspect` notices that it was folded."""
    output.unlink(missing_ok=True)
    done = _done(python, *words, str(model), str(output))
    if not output.exists():
        return {"failed": (done.stderr.strip().splitlines() or ["nothing was written"])[-1][:200]}
    notes = onnxcomp.inspect(output).notes
    undone = any("folded them" in note for note in notes)
    return {"bytes": output.stat().st_size, "noticed": undone}


def tried(engine: Engine, place: Path, files: Mapping[str, tuple[Path, Path]]) -> dict[str, Any]:
    """What an engine makes of every form."""
    home = place / engine.name
    package = engine.packages[0].split("==")[0]
    try:
        if engine.script.endswith(".mjs"):
            version = installed_by_npm(home, package)
        else:
            version = version_of(installed(home, engine.packages), package)
    except InstallError as error:
        return {"line": engine.line, "failed": str(error)}
    row = {"version": version, "line": engine.line}
    forms = {name: run(engine, home, *file) for name, file in files.items()}
    if engine.library:
        forms[LIBRARY] = run(engine, home, *files["functions"], str(library_path()))
    print(engine.name, version, forms, file=sys.stderr, flush=True)
    return {**row, "forms": forms}


def folded(
    name: str, place: Path, files: Mapping[str, tuple[Path, Path]], output: Path
) -> dict[str, Any]:
    """What a tool makes of every compressed form."""
    packages, words = TOOLS[name]
    python = installed(place / name.split(",")[0].replace(" ", "-"), packages)
    version = version_of(python, packages[0])
    made = {
        form: rewritten(python, words, file, output)
        for form, (file, _) in files.items()
        if form != "dense"
    }
    print(name, version, made, file=sys.stderr, flush=True)
    return {"version": version, "forms": made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--environments", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", metavar="NAME")
    options = parser.parse_args()
    place = options.environments.resolve()
    if place.is_relative_to(ROOT):
        raise SystemExit(f"{place} lies in the project: name one outside of it")
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    engines: dict[str, Any] = before.get("engines", {})
    tools: dict[str, Any] = before.get("tools", {})
    with tempfile.TemporaryDirectory() as folder:
        files = prepared(options.model, Path(folder))
        document = {
            "processor": look().processor,
            "bytes": {form: file.stat().st_size for form, (file, _) in files.items()},
            "engines": engines,
            "tools": tools,
        }
        for engine in ENGINES:
            if not options.only or engine.name in options.only:
                engines[engine.name] = tried(engine, place, files)
                write_results("engines", document)
        for name in TOOLS:
            if not options.only or name in options.only:
                tools[name] = folded(name, place, files, Path(folder) / "rewritten.onnx")
                write_results("engines", document)
    columns = (*FORMS, LIBRARY)
    rows = [
        (name, row.get("version", "-"), *(_cell(row, form) for form in columns))
        for name, row in engines.items()
    ]
    print_table(("engine", "version", *columns), rows)


def _cell(row: Mapping[str, Any], form: str) -> str:
    result = row if "failed" in row else row["forms"].get(form)
    if result is None:
        return "-"
    if "failed" in result:
        return f"no: {result['failed'][:50]}"
    return f"{result['error']:.1e}, {result['load_s']:.2f} s, {result['peak_bytes'] / 1e6:.0f} MB"


if __name__ == "__main__":
    main()
