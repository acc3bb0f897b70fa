"""Tokens per second of decoders: prompts, and one token after the other behind a KV cache."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from onnxcomp.errors import UsageError
from onnxcomp.runtime.bench import Worker, check_request, forms_of
from onnxcomp.runtime.signature import read_signature
from onnxcomp.runtime.structure import model_bytes

__all__ = ["CONTEXTS", "PROMPT", "bench_generation"]

PathLike = str | os.PathLike[str]

# Tokens of the prompt, and positions in the cache when decoding begins.
PROMPT, CONTEXTS = 128, (64, 512)

# Seconds that one model works on one task in one turn, and in all; the fewest runs of a task.
_TURN, _TOTAL, _LEAST = 0.1, 2.0, 5

# Tokens decoded at most in one turn: the context is what it is said to be.
_STEPS = 16

# Tokens are drawn below this number where the model does not say how many it knows.
_KNOWN = 256


class _Task:
    """One model at one task: a prompt, or decoding at a context."""

    def __init__(self, worker: Worker, kind: str, size: int, vocabulary: int, seed: int) -> None:
        self._worker, self.kind, self.size = worker, kind, size
        self._last = (vocabulary, seed)
        self._times: dict[str, list[float]] = {"wall": [], "cpu": []}

    def warm(self) -> None:
        """Run once: the first run allocates."""
        self._ask(1)

    def turn(self) -> None:
        """Run for a moment."""
        known = self._times["wall"][-1:] or [_TURN]
        count = max(1, min(_STEPS, int(_TURN / max(known[0], 1e-9))))
        for name, found in self._ask(count).items():
            self._times[name] += found

    def done(self, seconds: float) -> bool:
        """Whether it has run that long."""
        return len(self._times["wall"]) >= _LEAST and sum(self._times["wall"]) >= seconds

    def _ask(self, count: int) -> dict[str, list[float]]:
        numbers = " ".join(map(str, (self.size, count, *self._last)))
        answer: dict[str, list[float]] = self._worker.ask(f"{self.kind} {numbers}")
        return answer

    def result(self) -> dict[str, float]:
        """Medians: tokens per second by the clock, and what a token takes of processors."""
        tokens = self.size if self.kind == "prompt" else 1
        wall, cpu = (float(np.median(self._times[name])) / tokens for name in ("wall", "cpu"))
        return {
            "context" if self.kind == "decode" else "tokens": self.size,
            "tokens_per_second": round(1 / wall, 3),
            "ms_per_token": round(1e3 * wall, 4),
            "cpu_ms_per_token": round(1e3 * cpu, 4),
        }


def bench_generation(
    models: Sequence[PathLike],
    *,
    prompt: int = PROMPT,
    contexts: Sequence[int] = CONTEXTS,
    threads: int | None = None,
    portable: bool = False,
    provider: str = "cpu",
    seed: int = 0,
    seconds: float = _TOTAL,
) -> dict[str, Any]:
    """Measure how fast decoders read a prompt and write, each in a process, taking turns.

    Args:
        models: The models; those without a KV cache are timed on the prompt alone.
        prompt: Tokens of the prompt.
        contexts: Positions in the cache when decoding begins.
        threads: Threads of one operator; None for ONNX Runtime's choice.
        portable: Whether compressed models are measured without the operator library as well.
        provider: Where models run: "cpu" or "cuda".
        seed: Of the tokens.
        seconds: How long each model works on each task, and at least five times.

    Returns:
        The JSON object of ``onnxcomp bench --generate``: for each model ``path``, ``form``,
        ``load_ms``, ``rss_bytes``, ``peak_rss_bytes``, ``file_bytes``, ``prompt`` and ``decode``;
        and ``threads`` and ``provider``.

    Raises:
        ModelError: A model is no decoder, or cannot be read, loaded or run.
        RuntimeMissingError: ONNX Runtime or the operator library is missing.
        UsageError: Numbers make no sense.
    """
    check_request(models, provider)
    if prompt < 1 or any(context < 1 for context in contexts):
        raise UsageError(f"a prompt of {prompt} tokens and contexts of {list(contexts)} are none")
    with contextlib.ExitStack() as stack:
        tasks: dict[Worker, list[_Task]] = {}
        sizes: dict[Worker, int] = {}
        for model in models:
            for form in forms_of(model, portable):
                worker = stack.enter_context(Worker(model, form, [], threads, provider))
                tasks[worker] = _tasks(worker, model, prompt, contexts, seed)
                sizes[worker] = model_bytes(model)
        _take_turns([task for mine in tasks.values() for task in mine], seconds)
        results = [_result(worker, mine, sizes[worker]) for worker, mine in tasks.items()]
    return {"models": results, "threads": threads, "provider": provider}


def _tasks(
    worker: Worker, model: PathLike, prompt: int, contexts: Sequence[int], seed: int
) -> list[_Task]:
    specs = read_signature(model)
    vocabulary = min((s.bound for s in specs if s.bound is not None), default=_KNOWN)
    cached = any(len(spec.dims) >= 3 for spec in specs)
    asked = [("prompt", prompt), *(("decode", size) for size in contexts if cached)]
    return [_Task(worker, kind, size, vocabulary, seed) for kind, size in asked]


def _take_turns(tasks: Sequence[_Task], seconds: float) -> None:
    """Run tasks one kind after the other, and the models of a kind in turns."""
    for kind in dict.fromkeys((task.kind, task.size) for task in tasks):
        pending = [task for task in tasks if (task.kind, task.size) == kind]
        for task in pending:
            task.warm()
        while pending:
            for task in pending:
                task.turn()
            pending = [task for task in pending if not task.done(seconds)]


def _result(worker: Worker, tasks: Sequence[_Task], size: int) -> dict[str, Any]:
    """What was measured of one model."""
    found: Mapping[str, list[dict[str, float]]] = {
        kind: [task.result() for task in tasks if task.kind == kind]
        for kind in ("prompt", "decode")
    }
    (read,) = found["prompt"]
    measured = {"prompt": read, "decode": found["decode"]}
    return {**worker.about, **measured, **worker.ask("memory"), "file_bytes": size}
