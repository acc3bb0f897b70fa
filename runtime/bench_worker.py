"""The process that `bench` starts for one model. Speaks JSON lines on stdin and stdout."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcomp.errors import CompressionError, RuntimeMissingError
from onnxcomp.runtime.evaluate import Feed, runner
from onnxcomp.runtime.language.steps import GENERATION
from onnxcomp.runtime.memory import peak_rss
from onnxcomp.runtime.session import import_runtime, open_session

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["main", "resident_bytes"]


def resident_bytes() -> dict[str, int]:
    """Resident memory of this process, now and at its peak."""
    peak = peak_rss()
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return {"rss_bytes": peak, "peak_rss_bytes": peak}
    pages = int(statm.read_text().split()[1])
    return {"rss_bytes": pages * os.sysconf("SC_PAGE_SIZE"), "peak_rss_bytes": peak}


def _serve(setting: dict[str, Any], answer: Any) -> None:
    import_runtime()
    start = time.perf_counter()
    session = open_session(setting["model"], library=setting["library"], threads=setting["threads"])
    loaded = time.perf_counter() - start
    wanted = setting["providers"][0]
    if wanted not in session.get_providers():
        raise RuntimeMissingError(
            f"this ONNX Runtime cannot run models on {wanted}",
            hint="install onnxcomp[gpu] instead of onnxcomp[cpu]",
        )
    answer({"load_ms": loaded * 1e3})
    feeds = itertools.cycle([_restored(path, session) for path in setting["inputs"]])
    run = runner(session)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "memory":
            answer(resident_bytes())
        elif command in GENERATION:
            answer(GENERATION[command](session, *map(int, arguments)))
        else:
            answer([_timed(run, next(feeds)) for _ in range(int(arguments[0]))])


def _restored(path: str, session: onnxruntime.InferenceSession) -> Feed:
    """Arrays of a file in the types of the session's inputs."""
    kinds = {value.name: value.type for value in session.get_inputs()}
    with np.load(path, allow_pickle=False) as arrays:
        feed = dict(arrays)
    for name, array in feed.items():
        if "bfloat16" in kinds[name]:
            import ml_dtypes

            feed[name] = array.astype(ml_dtypes.bfloat16)
        elif "string" in kinds[name]:
            feed[name] = array.astype(object)
    return feed


def _timed(run: Callable[[Feed], Any], feed: Feed) -> tuple[float, float]:
    """Seconds by the clock, and of processor time of all threads."""
    start, spent = time.perf_counter(), time.process_time()
    run(feed)
    return time.perf_counter() - start, time.process_time() - spent


def main() -> None:
    """Load the model named by the JSON object of the first argument, and answer commands."""
    # Whatever a library prints goes to stderr: stdout carries answers alone.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        out.write(json.dumps(value) + "\n")
        out.flush()

    try:
        _serve(json.loads(sys.argv[1]), answer)
    except CompressionError as error:
        answer({"error": type(error).__name__, "message": error.message, "hint": error.hint})
    except BrokenPipeError:
        os._exit(1)  # nobody listens any more: the run was interrupted


if __name__ == "__main__":
    main()
