"""Load time, latency and memory of models, each in a process of its own, taking turns.

Turns matter: on a machine that is doing other things, or whose clock changes, models that run one
after the other are not comparable.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp import errors
from onnxcomp.runtime.inputs import Data, Feed, load_inputs, synthesize_inputs
from onnxcomp.runtime.session import needs_library
from onnxcomp.runtime.signature import fits, read_signature
from onnxcomp.runtime.structure import model_bytes

__all__ = ["PROVIDERS", "Worker", "bench", "check_request", "forms_of", "load_model"]

PathLike = str | os.PathLike[str]

# Execution providers of ONNX Runtime, in its order of preference.
PROVIDERS = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"],
}

# Seconds that one model runs in one turn, and in all.
_TURN, _TOTAL = 0.05, 2.0
_LEAST_RUNS = 5


def bench(
    models: Sequence[PathLike],
    *,
    data: Data | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    threads: int | None = None,
    portable: bool = False,
    provider: str = "cpu",
    seed: int = 0,
    seconds: float = _TOTAL,
) -> dict[str, Any]:
    """Measure models on the same inputs.

    Args:
        models: The models. Those whose inputs differ from the first one's get inputs of their own.
        data: Inputs to run; None to make one up.
        shapes: Shapes of made-up inputs by name.
        threads: Threads of one operator; None for ONNX Runtime's choice.
        portable: Whether compressed models are measured without the operator library as well.
        provider: Where models run: "cpu" or "cuda".
        seed: Of made-up inputs.
        seconds: How long each model runs, and at least five times.

    Returns:
        The JSON object of ``onnxcomp bench``: for each model ``path``, ``form`` ("library",
        "portable", or "standard" for a model without own operators), ``load_ms``, quantiles of the
        latency of one run in ms, ``cpu_ms`` (median of its processor time, all threads together),
        ``rss_bytes`` (resident memory of the process after the runs), ``peak_rss_bytes`` and
        ``file_bytes``; and ``threads``, ``shapes``, ``provider``.

    Raises:
        ModelError: A model cannot be read, loaded or run.
        RuntimeMissingError: ONNX Runtime or the operator library is missing.
        UsageError: `data` or `shapes` do not fit the first model.
    """
    check_request(models, provider)
    feeds = _feeds(models[0], data, shapes, seed)
    forms = [(model, form) for model in models for form in forms_of(model, portable)]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = [
            stack.enter_context(
                Worker(model, form, _stored(model, feeds, folder, number, seed), threads, provider)
            )
            for number, (model, form) in enumerate(forms)
        ]
        _take_turns(workers, seconds)
        results = [worker.result() for worker in workers]
    return {
        "models": results,
        "threads": threads,
        "shapes": {name: list(array.shape) for name, array in feeds[0].items()},
        "provider": provider,
    }


def check_request(models: Sequence[PathLike], provider: str) -> None:
    """Refuse to measure nothing, or somewhere unknown."""
    if not models:
        raise errors.UsageError("no model is given to measure")
    if provider not in PROVIDERS:
        raise errors.UsageError(
            f"provider {provider!r} is unknown", hint=f"choose one of {', '.join(PROVIDERS)}"
        )


def load_model(model: PathLike, *, library: bool) -> dict[str, float]:
    """Load a model in a process of its own.

    Returns:
        ``load_ms``, and ``rss_bytes`` and ``peak_rss_bytes`` of the process.

    Raises:
        ModelError: It does not load, or ends the process.
        RuntimeMissingError: ONNX Runtime or the operator library is missing.
    """
    with Worker(model, "library" if library else "portable", [], None, "cpu") as worker:
        return worker.loading()


def _feeds(
    model: PathLike,
    data: Data | None,
    shapes: Mapping[str, Sequence[int]] | None,
    seed: int,
) -> list[Feed]:
    if data is not None:
        return load_inputs(data, model)
    return synthesize_inputs(model, shapes=shapes, seed=seed)


def forms_of(model: PathLike, portable: bool) -> tuple[str, ...]:
    """The forms in which a model is measured."""
    if not needs_library(model):
        return ("standard",)
    return ("library", "portable") if portable else ("library",)


def _stored(
    model: PathLike, feeds: Sequence[Feed], folder: Path, number: int, seed: int
) -> list[Path]:
    """Files with the inputs of one model."""
    specs = {spec.name: spec for spec in read_signature(model)}
    fitting = all(
        set(feed) == set(specs)
        and all(fits(specs[name], array.shape) for name, array in feed.items())
        for feed in feeds
    )
    result = []
    for index, feed in enumerate(feeds if fitting else synthesize_inputs(model, seed=seed)):
        path = folder / f"{number}.{index}.npz"
        # The .npy format knows no bfloat16 and no text objects; the worker restores them.
        plain = {"V": np.float32, "O": np.str_}
        arrays = {
            name: array.astype(plain.get(array.dtype.kind, array.dtype))
            for name, array in feed.items()
        }
        with path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its flag has a name of its own
        result.append(path)
    return result


def _take_turns(workers: Sequence[Worker], seconds: float) -> None:
    for worker in workers:
        worker.run(1)
        worker.forget()  # the first run allocates
    pending = list(workers)
    while pending:
        for worker in pending:
            worker.run(worker.runs_in(_TURN))
        pending = [worker for worker in pending if not worker.done(seconds)]


class Worker(contextlib.AbstractContextManager["Worker"]):
    """A process that has loaded one model and runs it when told to."""

    def __init__(
        self,
        model: PathLike,
        form: str,
        inputs: Sequence[Path],
        threads: int | None,
        provider: str,
    ) -> None:
        self._model, self._form = model, form
        self._times: list[float] = []
        self._spent: list[float] = []
        self._last = 0.0
        setting = {
            "model": os.fspath(model),
            "inputs": [str(path) for path in inputs],
            "library": form == "library",
            "threads": threads,
            "providers": PROVIDERS[provider],
        }
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "onnxcomp.runtime.bench_worker", json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,  # an interrupt is for us; the worker ends with its pipe
        )
        try:
            self._loaded = self._answer()
        except BaseException:
            self._stop()
            raise

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._stop()
        self._process.communicate()

    def _stop(self) -> None:
        """End the process in the middle of its work, if it still runs."""
        self._process.kill()
        self._process.wait()

    def ask(self, command: str) -> Any:
        """What the process answers to a command.

        Raises:
            ModelError: It failed, or has ended; errors of other kinds pass, too.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise errors.ModelError(f"the process that ran {self._model} ended with code {code}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            self._process.communicate()
            kind = getattr(errors, answer["error"])
            raise kind(answer["message"], hint=answer["hint"])
        return answer

    @property
    def about(self) -> dict[str, Any]:
        """The model, its form, and what loading took."""
        return {
            "path": os.fspath(self._model),
            "form": self._form,
            "load_ms": round(self._loaded["load_ms"], 3),
        }

    def loading(self) -> dict[str, float]:
        """What loading took."""
        return {**self._loaded, **self.ask("memory")}

    def run(self, count: int) -> None:
        """Run the model that many times."""
        answer = self.ask(f"run {count}")
        times = [by_clock for by_clock, _ in answer]
        self._last = sum(times) / len(times)
        self._times += times
        self._spent += [spent for _, spent in answer]

    def forget(self) -> None:
        """Drop the times so far."""
        self._times.clear()
        self._spent.clear()

    def runs_in(self, seconds: float) -> int:
        """How many runs fit into this time, at least one."""
        return max(1, int(seconds / max(self._last, 1e-9)))

    def done(self, seconds: float) -> bool:
        """Whether it has run that long."""
        return len(self._times) >= _LEAST_RUNS and sum(self._times) >= seconds

    def result(self) -> dict[str, Any]:
        """What was measured."""
        low, median, high = np.quantile(self._times, [0.1, 0.5, 0.9]) * 1e3
        return {
            **self.about,
            "median_ms": round(float(median), 4),
            "p10_ms": round(float(low), 4),
            "p90_ms": round(float(high), 4),
            "cpu_ms": round(float(np.median(self._spent)) * 1e3, 4),
            **self.ask("memory"),
            "file_bytes": model_bytes(self._model),
        }
