"""tract, by its Python package."""

from __future__ import annotations

from typing import Any

import tract
from harness import measure


def load(path: str) -> Any:
    return tract.onnx().load(path).into_model().into_runnable()


if __name__ == "__main__":
    measure(load, lambda model, feeds: model.run(list(feeds.values()))[0].to_numpy())
