"""Whole models in ONNX Runtime's CUDA execution provider: outputs, copies, memory and speed."""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CUDA", "SessionRow", "compare_models", "placement"]

Array = np.ndarray[Any, Any]
CUDA = "CUDAExecutionProvider"
_RUNS = 30
_TOKENS = 64


@dataclasses.dataclass(frozen=True)
class SessionRow:
    """One model.

    Attributes:
        model: File name.
        error: Largest difference to the CPU's output, relative to the largest output.
        copies: Nodes that ONNX Runtime added to copy between CPU and GPU.
        elsewhere: Nodes of com.onnxcomp that did not run on the provider that was asked for.
        device_mb: Memory of the GPU that the session took; None without torch.
        ms: Median time of a run.
        tokens_per_second: Positions of the input in a second.
    """

    model: str
    error: float
    copies: int
    elsewhere: tuple[str, ...]
    device_mb: float | None
    ms: float
    tokens_per_second: float


def _shape(dims: list[Any], rank: int) -> tuple[int, ...]:
    free = [1, *[_TOKENS] * (rank - 1)]
    return tuple(dim if isinstance(dim, int) else free[place] for place, dim in enumerate(dims))


def _feeds(session: Any) -> dict[str, Array]:
    """Made-up inputs: small integers, ones for masks, noise."""
    rng = np.random.default_rng(0)
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    feeds: dict[str, Array] = {}
    for value in session.get_inputs():
        shape = _shape(value.shape, len(value.shape))
        if value.type in kinds:
            feeds[value.name] = rng.normal(size=shape).astype(kinds[value.type])
        elif "mask" in value.name:
            feeds[value.name] = np.ones(shape, np.int64)
        else:
            feeds[value.name] = rng.integers(0, 100, shape)
    return feeds


def _open(model: Path, provider: str, library: Path, profile: Path | None = None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    providers = [provider] if provider != CUDA else [CUDA, "CPUExecutionProvider"]
    return onnxruntime.InferenceSession(str(model), options, providers=providers)


def placement(events: list[Mapping[str, Any]], provider: str) -> tuple[int, tuple[str, ...]]:
    """Copies between CPU and GPU, and our nodes that ran elsewhere, of a profile's events."""
    copies, elsewhere = set(), set()
    for event in events:
        facts = event.get("args") or {}
        name = str(facts.get("op_name", ""))
        if name.startswith("Memcpy"):
            copies.add(event["name"])
        ours = name.startswith(("Hyper", "Hash"))
        if ours and facts.get("provider") not in (None, provider):
            elsewhere.add(str(event["name"]).removesuffix("_kernel_time"))
    return len(copies), tuple(sorted(elsewhere))


def _free_memory() -> int | None:
    try:
        import torch
    except ImportError:
        return None
    return int(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None


def compare_models(
    models: list[Path], provider: str, library: Path, folder: Path
) -> list[SessionRow]:
    """Run each model on the CPU and by the provider; profiles go to the folder."""
    rows = []
    for model in models:
        reference = _open(model, "CPUExecutionProvider", library)
        feeds = _feeds(reference)
        want = reference.run(None, feeds)
        before = _free_memory()
        session = _open(model, provider, library, folder / model.stem)
        got = session.run(None, feeds)
        after = _free_memory()
        copies, elsewhere = placement(
            json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")), provider
        )
        times = []
        for _ in range(_RUNS):
            start = time.perf_counter()
            session.run(None, feeds)
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times)
        error = max(
            float(np.abs(a.astype(np.float64) - b).max() / max(np.abs(b).max(), 1e-30))
            for a, b in zip(got, want, strict=True)
        )
        taken = None if before is None or after is None else (before - after) / 1e6
        tokens = max((array.size for array in feeds.values()), default=1)
        rows.append(
            SessionRow(model.name, error, copies, elsewhere, taken, seconds * 1e3, tokens / seconds)
        )
    return rows
