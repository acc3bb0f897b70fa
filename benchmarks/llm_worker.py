"""One language model in a process of its own, told what to do in JSON lines.

    python benchmarks/llm_worker.py MODEL [--portable]

MODEL is an .onnx file, run by ONNX Runtime, or a .gguf file, run by llama-cpp-python; each needs
its own packages only. Everything runs on one thread. The answer to every line is a JSON line.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

CONTEXT = 1024


class Engine(Protocol):
    """A model that reads and writes."""

    def logits(self, tokens: list[int]) -> Any:
        """Scores after every token, ``(length, vocabulary)``, from an empty cache."""

    def fill(self, positions: int) -> None:
        """Have so many positions in the cache, whatever they are."""

    def read(self, tokens: list[int], *, fresh: bool) -> Any:
        """Scores ``(vocabulary,)`` after tokens, which follow those in the cache."""


class OnnxEngine:
    """ONNX Runtime, with the operator library where the model needs it."""

    def __init__(self, model: str, portable: bool) -> None:
        from onnxcomp.runtime.language.decoder import Decoder
        from onnxcomp.runtime.session import open_session

        self.decoder = Decoder(open_session(model, library=False if portable else None, threads=1))

    def logits(self, tokens: list[int]) -> Any:  # noqa: D102 - see Engine
        return self.decoder.logits(np.array([tokens]))[0]

    def fill(self, positions: int) -> None:  # noqa: D102 - see Engine
        self.decoder.fill(positions)

    def read(self, tokens: list[int], *, fresh: bool) -> Any:  # noqa: D102 - see Engine
        if fresh:
            self.decoder.reset()
        return self.decoder.step(np.array([tokens]))[0, -1]


class LlamaEngine:
    """llama.cpp, which computes scores of the last token only unless all are asked for."""

    def __init__(self, model: str) -> None:
        import llama_cpp

        self._module, self._model = llama_cpp, model
        self._open(everything=False)

    def _open(self, *, everything: bool) -> None:
        self._everything = everything
        self.llama = self._module.Llama(
            self._model, n_ctx=CONTEXT, n_batch=512, n_threads=1, n_threads_batch=1,
            logits_all=everything, verbose=False,
        )  # fmt: skip

    def logits(self, tokens: list[int]) -> Any:  # noqa: D102 - see Engine
        if not self._everything:
            self._open(everything=True)
        self.llama.reset()
        self.llama.eval(tokens)
        return self.llama.scores[: len(tokens)]

    def fill(self, positions: int) -> None:  # noqa: D102 - see Engine
        if self.llama.n_tokens < positions:
            self.llama.reset()
            self.llama.eval([1000 + place for place in range(positions)])
        self.llama.n_tokens = positions

    def read(self, tokens: list[int], *, fresh: bool) -> Any:  # noqa: D102 - see Engine
        if fresh:
            self.llama.reset()
        self.llama.eval(tokens)
        found = self._module.llama_get_logits_ith(self.llama.ctx, -1)
        return np.ctypeslib.as_array(found, (self.llama.n_vocab(),))


def continued(engine: Engine, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens behind a prompt."""
    found: list[int] = []
    scores = engine.read(prompt, fresh=True)
    while len(found) < count:
        found.append(int(np.argmax(scores)))
        if len(found) < count:
            scores = engine.read(found[-1:], fresh=False)
    return found


def timed(engine: Engine, task: str, size: int, runs: int) -> dict[str, list[float]]:
    """Processor and wall-clock seconds of prompts, or of tokens behind a cache."""
    times: dict[str, list[float]] = {"cpu": [], "wall": []}
    tokens = np.random.default_rng(runs).integers(100, 40000, size if task == "prompt" else 1)
    if task == "decode":
        engine.fill(size)
    for _ in range(runs):
        wall, cpu = time.perf_counter(), time.process_time()
        engine.read(tokens.tolist(), fresh=task == "prompt")
        times["cpu"].append(time.process_time() - cpu)
        times["wall"].append(time.perf_counter() - wall)
    return times


def memory() -> dict[str, int]:
    """Resident bytes now, and at the peak."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rss_bytes": pages * os.sysconf("SC_PAGE_SIZE"), "peak_rss_bytes": peak}


def answer(engine: Engine, asked: dict[str, Any]) -> Any:
    """What one line asks for."""
    match asked["do"]:
        case "logits":
            np.save(asked["file"], np.asarray(engine.logits(asked["tokens"]), np.float32))
            return None
        case "continue":
            return continued(engine, asked["prompt"], asked["count"])
        case "time":
            return timed(engine, asked["task"], asked["size"], asked["runs"])
        case "memory":
            return memory()
    raise ValueError(f"{asked} is nothing that can be done")


def main() -> None:
    """Load the model and do what the lines of stdin say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--portable", action="store_true")
    given = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    llama = given.model.endswith(".gguf")
    importlib.import_module("llama_cpp" if llama else "onnxruntime")  # not part of the model's time
    wall, cpu = time.perf_counter(), time.process_time()
    engine = LlamaEngine(given.model) if llama else OnnxEngine(given.model, given.portable)
    first: Any = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    print(json.dumps(first), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(engine, json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main()
