"""Sessions of models with their way back: large, opened once, run for one input after the other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxcomp.passes.weight import Array, Feed

__all__ = ["lean_session", "run_into"]


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


def run_into(session: Any, feed: Feed, into: Mapping[str, Array]) -> dict[str, Array]:
    """Run a session once, with some of its outputs put where there is room for them.

    Args:
        session: The session.
        feed: Arrays by input name, of types that numpy has.
        into: Float32 arrays by output name, of the outputs' shapes.

    Returns:
        All outputs by name, those of `into` among them.

    Raises:
        ModelError: ONNX Runtime refuses the input or fails.
    """
    from onnxcomp.runtime.evaluate import cannot_run

    names = [output.name for output in session.get_outputs()]
    try:
        binding = session.io_binding()
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for name in names:
            if name in into:
                room = into[name]
                binding.bind_output(name, "cpu", 0, room.dtype, room.shape, room.ctypes.data)
            else:
                binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        found = dict(zip(names, binding.get_outputs(), strict=True))
    except Exception as error:  # the classes differ between versions and share no base
        raise cannot_run(error) from error
    return {n: into[n] if n in into else np.asarray(value.numpy()) for n, value in found.items()}
