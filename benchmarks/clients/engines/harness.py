"""Runs one engine on one file, in the engine's environment, and prints what came of it.

Nothing of onnxcomp is imported here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["MARK", "measure", "status_bytes"]

MARK = "RESULT "

Feeds = Mapping[str, Any]


def status_bytes(key: str) -> int:
    """A number of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key)), 0)


def measure(load: Callable[[str], Any], run: Callable[[Any, Feeds], Any]) -> None:
    """Print load time, memory and the largest error of the outputs, as one line of JSON.

    The command line says the model and a file with its inputs and the output to compare with.

    Args:
        load: Opens the model of a path.
        run: Gives the first output.
    """
    model, inputs = sys.argv[1:3]
    data = dict(np.load(inputs))
    wanted = data.pop("wanted")
    before, start = status_bytes("VmRSS"), time.process_time()
    session = load(model)
    facts = {"load_s": time.process_time() - start, "peak_bytes": status_bytes("VmHWM") - before}
    run(session, data)
    start = time.process_time()
    found = np.asarray(run(session, data))
    seconds = time.process_time() - start
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    print(MARK + json.dumps({**facts, "run_s": seconds, "error": error}), flush=True)
