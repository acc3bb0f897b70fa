"""MiniLM in headless Chromium with onnxruntime-web: dense, compressed in each form, and integers.

    python benchmarks/bench_web.py MINILM.onnx --modules FOLDER [--data FOLDER] [--rounds 3]

FOLDER is where `npm install` has put onnxruntime-web (its node_modules); chromium must be on the
PATH. The page is examples/web. Forms take turns, each in a browser of its own; times are medians
over all rounds, memory is the largest resident set of a renderer process. With --data, the error is
that of the embeddings of sentences; weights are not calibrated.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import os
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import onnxruntime
from bench_minilm import make_batches, read_pairs
from results import compile_model, print_table, write_results
from tokenizers import Tokenizer

from onnxcomp.runtime.machine import look

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "examples" / "web"

# Options of `onnxcomp optimize` for each form.
FORMS = {
    "4 bits": ("--bits", "4"),
    "4 bits, inlined": ("--bits", "4", "--functions", "inline"),
    "4 bits, not to be folded": ("--bits", "4", "--functions", "inline-unfoldable"),
    "6 bits": ("--bits", "6"),
    "int, 4 bits": ("--method", "int", "--bits", "4"),
    "int, 8 bits": ("--method", "int", "--bits", "8"),
}

TOKENS = 128


class Page(http.server.SimpleHTTPRequestHandler):
    """Serves the page, onnxruntime-web and models; takes what the page found."""

    models: Path
    modules: Path
    found: queue.Queue[dict[str, Any]]

    def translate_path(self, path: str) -> str:
        """Where a file of the site lies."""
        name = path.split("?")[0].lstrip("/")
        for prefix, folder in (("node_modules/", self.modules), ("models/", self.models)):
            if name.startswith(prefix):
                return str(folder / name.removeprefix(prefix))
        return str(PAGE / name)

    def do_POST(self) -> None:  # the name is the library's
        """Take a result."""
        length = int(self.headers["Content-Length"])
        self.found.put(json.loads(self.rfile.read(length)))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def served(models: Path, modules: Path) -> Iterator[tuple[str, queue.Queue[dict[str, Any]]]]:
    """The site, at an address of this machine, and what its page finds."""
    found: queue.Queue[dict[str, Any]] = queue.Queue()
    handler = type("Handler", (Page,), {"models": models, "modules": modules, "found": found})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", found
        server.shutdown()


def renderer_peak(profile: Path) -> int:
    """Largest resident set that a renderer of the browser with this profile has had, in bytes."""
    peak = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes()
            if b"--type=renderer" not in command or str(profile).encode() not in command:
                continue
            status = (folder / "status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
            peak = max(peak, 1024 * int(line.split()[1]))
    return peak


def visit(site: str, found: queue.Queue[dict[str, Any]], model: str) -> dict[str, Any]:
    """Open the page for a model in a browser of its own."""
    dims = f"1x{TOKENS}"
    query = [("model", f"models/{model}"), ("report", "/found"), ("runs", "8")]
    query += [("shape", f"{name}:{dims}") for name in ("input_ids", "attention_mask")]
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder)
        command = [
            "chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            f"--user-data-dir={profile}", f"{site}/index.html?{urlencode(query)}",
        ]  # fmt: skip
        browser = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            result = found.get(timeout=300)
            return {**result, "peak_bytes": renderer_peak(profile)}
        finally:
            os.killpg(browser.pid, signal.SIGTERM)
            browser.wait()


def embeddings(path: Path, feeds: Sequence[dict[str, Any]]) -> Any:
    """Embeddings of all sentences, without the operator library."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, feed)[0] for feed in feeds])


def sentences(data: Path) -> list[dict[str, Any]]:
    """Inputs to measure the error with."""
    tokenizer = Tokenizer.from_file(str(data / "models" / "minilm_tokenizer.json"))
    texts, _ = read_pairs(data)
    return [feed for _, feed in make_batches(tokenizer, texts[:256])]


def compiled(model: Path, folder: Path, data: Path | None) -> Iterator[dict[str, Any]]:
    """Every form: its file, and its error where there is data."""
    test = sentences(data) if data else []
    wanted = embeddings(model, test) if test else None
    shutil.copy(model, folder / "dense.onnx")
    yield {"form": "dense", "file": "dense.onnx", "bytes": model.stat().st_size, "error": 0.0}
    for name, options in FORMS.items():
        output = folder / f"{name.replace(' ', '_').replace(',', '')}.onnx"
        compile_model(model, output, *options, "--no-verify", "--external-data", "never")
        row = {"form": name, "file": output.name, "bytes": output.stat().st_size}
        if wanted is not None:
            found = embeddings(output, test)
            row["error"] = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
        yield row


def summary(visits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of all visits of one form."""
    failed = next((visit["failed"] for visit in visits if "failed" in visit), None)
    if failed is not None:
        return {"failed": failed}
    names = ("load_ms", "first_ms", "run_ms", "peak_bytes")
    return {name: statistics.median(visit[name] for visit in visits) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--modules", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = list(compiled(options.model, folder, options.data))
        visits: dict[str, list[dict[str, Any]]] = {row["form"]: [] for row in rows}
        with served(folder, options.modules.resolve()) as (site, found):
            for _ in range(options.rounds):
                for row in rows:
                    visits[row["form"]].append(visit(site, found, row["file"]))
                    print(row["form"], visits[row["form"]][-1], file=sys.stderr, flush=True)
    package = options.modules / "onnxruntime-web" / "package.json"
    version = json.loads(package.read_text())["version"]
    browser = subprocess.run(["chromium", "--version"], capture_output=True, text=True).stdout
    rows = [{**row, **summary(visits[row["form"]])} for row in rows]
    document = {
        "processor": look().processor, "onnxruntime-web": version, "browser": browser.strip(),
        "tokens": TOKENS, "rounds": options.rounds, "rows": rows,
    }  # fmt: skip
    write_results("web", document)
    columns = ("form", "bytes", "error", "load ms", "first ms", "run ms", "peak MB")
    print_table(columns, [cells(row) for row in rows])


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table."""
    size, error = f"{row['bytes'] / 1e6:.2f} MB", f"{row.get('error', float('nan')):.4f}"
    if "failed" in row:
        return (row["form"], size, error, row["failed"][:60], "", "", "")
    times = (f"{row[name]:.0f}" for name in ("load_ms", "first_ms", "run_ms"))
    return (row["form"], size, error, *times, f"{row['peak_bytes'] / 1e6:.0f}")


if __name__ == "__main__":
    main()
