"""Files of the folder that a model came from: what a package takes over from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.runtime.package.contents import MANIFEST
from onnxcomp.runtime.structure import data_files

__all__ = ["original_files", "read_json", "without_weights"]

# Weights of other frameworks and forms, which the compressed model stands for.
_WEIGHTS = frozenset(
    (".bin", ".ckpt", ".gguf", ".h5", ".mlmodel", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pb",
     ".pt", ".pth", ".safetensors", ".tflite")
)  # fmt: skip
_FOLDERS = frozenset({"onnx", "openvino", "coreml", ".git", ".cache", "__pycache__"})


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """A file with one JSON object.

    Raises:
        UsageError: It cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}", hint=hint
        ) from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} does not hold a JSON object")
    return found


def original_files(source: Path) -> list[Path]:
    """All files below a folder, but for packages that were written into it."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    packages = {f.parent for f in files if f.name == MANIFEST and f.parent != source}
    return [f for f in files if f.name != MANIFEST and not packages.intersection(f.parents)]


def without_weights(source: Path, compressed: Path) -> list[Path]:
    """Files of a folder of Hugging Face without models, in whatever form, and their data.

    Args:
        source: The folder.
        compressed: The compressed model, which may lie there, too.
    """
    files = [
        f for f in original_files(source) if not _FOLDERS & set(f.relative_to(source).parts[:-1])
    ]
    models = [f for f in files if f.suffix == ".onnx"]
    dropped = {(f.parent / name).resolve() for f in models for name in data_files(f)}
    dropped.add(compressed.resolve())
    return [f for f in files if f.suffix not in _WEIGHTS and f.resolve() not in dropped]
