"""The rows of bench_llm.py: how each model is made."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from llm_rivals import KINDS
from llm_texts import calibration_feeds, calibration_tokens

from onnxcomp.runtime.structure import model_bytes

__all__ = ["ROWS", "Maker", "Row", "bytes_of"]

HERE = Path(__file__).parent
# Windows of calibration: of most rows, and of those that show what less text does.
WINDOWS, FEW = 128, 32

# How rows of ONNX Runtime are called; the others say it themselves.
_NAMES = {
    "fp16": "float16",
    "rtn4_128": "MatMulNBits 4 bits, block 128, symmetric",
    "rtn4_32": "MatMulNBits 4 bits, block 32",
    "rtn4_32_all": "MatMulNBits 4 bits, block 32, table and head",
    "rtn8_32": "MatMulNBits 8 bits, block 32",
    "gptq4_32": "MatMulNBits 4 bits, block 32, GPTQ",
    "kquant4_32": "MatMulNBits 4 bits, block 32, k-quant",
    "hqq4_32": "MatMulNBits 4 bits, block 32, HQQ",
}
_LLAMA = ("Q8_0", "Q4_K_M", "Q4_0", "IQ4_XS", "Q3_K_M", "IQ3_XXS", "Q2_K", "IQ2_S")
# Types that llama.cpp makes only with an importance matrix are left out without one.
_NEED_IMPORTANCE = ("IQ2_S",)


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to make the model smaller.

    Attributes:
        name: What the table calls it.
        tool: "dense", "onnxruntime", "llama" or "onnxcomp".
        kind: What the tool is asked for.
        data: Whether it gets the calibration text.
        windows: How much of it.
    """

    name: str
    tool: str
    kind: tuple[str, ...] = ()
    data: bool = False
    windows: int = WINDOWS

    def can(self, task: str) -> bool:
        """Whether a task makes sense: predictions need the logits of all positions."""
        return task != "predictions" or "--logits-to-keep" not in self.kind


def _rows() -> list[Row]:
    rows = [Row("float32", "dense")]
    rows += [Row(_NAMES[kind], "onnxruntime", (kind,), kind.startswith("gptq")) for kind in KINDS]
    for kind in _LLAMA:
        if kind not in _NEED_IMPORTANCE:
            rows.append(Row(f"llama.cpp {kind}", "llama", (kind,)))
        rows.append(Row(f"llama.cpp {kind}, importance matrix", "llama", (kind,), True))
    for bits in ("4", "3", "2"):
        rows.append(Row(f"onnxcomp {bits} bits", "onnxcomp", ("--bits", bits)))
    name = f"llama.cpp Q4_K_M, importance matrix of {FEW} windows"
    rows.append(Row(name, "llama", ("Q4_K_M",), True, FEW))
    last = ("--bits", "4", "--logits-to-keep", "1")
    rows.append(Row("onnxcomp 4 bits, last logits", "onnxcomp", last))
    for bits in ("4", "3", "2"):
        rows.append(Row(f"onnxcomp {bits} bits, calibrated", "onnxcomp", ("--bits", bits), True))
    plain = ("--tune", "0")
    for bits, more in (("4", "5"), ("3", "4"), ("2", "3")):
        asked = ("--bits", bits, *plain)
        rows.append(Row(f"onnxcomp {bits} bits, calibrated, not tuned", "onnxcomp", asked, True))
        asked = (*asked, "--set", f"embed_tokens:bits={more}")
        name = f"onnxcomp {bits} bits, tied table {more} bits, calibrated, not tuned"
        rows.append(Row(name, "onnxcomp", asked, True))
    name = f"onnxcomp 4 bits, calibrated on {FEW} windows, not tuned"
    rows.append(Row(name, "onnxcomp", ("--bits", "4", *plain), True, FEW))
    for ratio in ("7.15", "8", "10"):
        asked = ("--ratio", ratio)
        rows.append(Row(f"onnxcomp --ratio {ratio}", "onnxcomp", asked))
        rows.append(Row(f"onnxcomp --ratio {ratio}, calibrated", "onnxcomp", asked, True))
    return rows


ROWS = {row.name: row for row in _rows()}


def bytes_of(model: Path) -> int:
    """Bytes of all files of a model."""
    return model.stat().st_size if model.suffix == ".gguf" else model_bytes(model)


class Maker:
    """Makes the models of rows, once each.

    Args:
        model: Folder of the dense model.
        data: Folder of the texts.
        work: Folder of what is made.
        llama: Python with llama-cpp-python; None where there is none.
        torch: Python with torch; None where there is none.

    Attributes:
        made: What making a model took, by the row's name.
    """

    def __init__(
        self, model: Path, data: Path, work: Path, llama: str | None, torch: str | None
    ) -> None:
        self.model, self.work = model, work
        self._data, self._llama, self._torch = data, llama, torch
        work.mkdir(parents=True, exist_ok=True)
        self._log = work / "made.json"
        self.made = json.loads(self._log.read_text()) if self._log.exists() else {}

    def can(self, row: Row) -> bool:
        """Whether the row's tool is there."""
        if row.tool == "llama":
            return self._llama is not None
        return row.kind != ("hqq4_32",) or self._torch is not None

    def python(self, row: Row) -> str:
        """The interpreter that runs the row's model."""
        return str(self._llama) if row.tool == "llama" else sys.executable

    def tokens(self, windows: int = WINDOWS) -> Path:
        """Tokens of so many windows of the calibration text."""
        path = self._of_windows("calibration.npy", windows)
        if not path.exists():
            np.save(path, calibration_tokens(self._data, self.model, windows))
        return path

    def feeds(self, windows: int = WINDOWS) -> Path:
        """Inputs made of them."""
        path = self._of_windows("calibration.npz", windows)
        if not path.exists():
            config = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
            np.savez(path, **calibration_feeds(np.load(self.tokens(windows)), config))
        return path

    def _of_windows(self, name: str, windows: int) -> Path:
        return self.work / (name if windows == WINDOWS else f"{windows}.{name}")

    @functools.cached_property
    def gguf(self) -> Path:
        """The dense weights as GGUF."""
        return self._tool("dense.gguf", sys.executable, "llm_gguf.py", "write", self.model)

    def importance(self, windows: int = WINDOWS) -> Path:
        """The importance matrix of the calibration text."""
        words = ("llm_gguf.py", "weigh", self.model, self.tokens(windows))
        name = self._of_windows("importance.npz", windows).name
        return self._tool(name, sys.executable, *words)

    def _tool(self, name: str, *words: str | Path) -> Path:
        """A file that a script beside this one writes, its path the last argument."""
        path = self.work / name
        if not path.exists():
            self._run(words[0], HERE / words[1], *words[2:], path)
        return path

    def _run(self, *words: str | Path) -> dict[str, float]:
        """Run a program; the processor time and the memory it took."""
        start = time.perf_counter()
        with tempfile.TemporaryFile("w+") as said:
            run = subprocess.Popen([*map(str, words)], stdout=subprocess.DEVNULL, stderr=said)
            _, status, took = os.wait4(run.pid, 0)
            run.returncode = os.waitstatus_to_exitcode(status)
            said.seek(0)
            if run.returncode:
                raise SystemExit(f"{' '.join(map(str, words))} failed:\n{said.read()[-3000:]}")
        return {
            "cpu_seconds": round(took.ru_utime + took.ru_stime, 1),
            "seconds": round(time.perf_counter() - start, 1),
            "peak_rss_bytes": took.ru_maxrss << 10,
        }

    def make(self, row: Row) -> Path:
        """The row's model."""
        if row.tool == "dense":
            return self.model / "model.onnx"
        stem = "".join(c if c.isalnum() else "_" for c in row.name)
        path = self.work / f"{stem}.{'gguf' if row.tool == 'llama' else 'onnx'}"
        if not path.exists():
            self.made[row.name] = self._run(*self._command(row, path))
            self._log.write_text(json.dumps(self.made, indent=1))
        return path

    def _command(self, row: Row, path: Path) -> list[str | Path]:
        """What makes the row's model."""
        dense = self.model / "model.onnx"
        if row.tool == "llama":
            given = ["--importance", self.importance(row.windows)] if row.data else []
            words = [HERE / "llm_gguf.py", "round", self.gguf, path, *row.kind]
            return [str(self._llama), *words, *given]
        if row.tool == "onnxruntime":
            python = self._torch if row.kind == ("hqq4_32",) else sys.executable
            given = ["--calibration", self.tokens(row.windows)] if row.data else []
            return [str(python), HERE / "llm_rivals.py", dense, path, *row.kind, *given]
        given = ["--data", self.feeds(row.windows)] if row.data else []
        words = ["-m", "onnxcomp", "optimize", dense, "-o", path, "--no-verify", *row.kind]
        return [sys.executable, *words, *given]
