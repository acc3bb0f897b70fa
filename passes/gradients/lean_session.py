"""Sessions of models with their way back: large, opened once, run for one input after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["lean_session"]


def lean_session(path: Path) -> Any:
    """A session that keeps no second copy of weights, and gives memory back after each run."""
    from onnxcomp.runtime.session import import_runtime, open_session

    options = import_runtime().SessionOptions()
    options.log_severity_level = 4
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return open_session(path, session_options=options)
