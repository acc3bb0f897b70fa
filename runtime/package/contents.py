"""What goes into a package, and how it gets to its place."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.resources
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.ops import library_path
from onnxcomp.runtime.session import FOLDED, open_session
from onnxcomp.runtime.structure import (
    DOMAIN,
    custom_operators,
    data_files,
    model_bytes,
    read_structure,
)

__all__ = [
    "MANIFEST",
    "MODEL",
    "Contents",
    "Package",
    "Value",
    "checked_name",
    "copied_weights",
    "gather",
    "staged",
    "template",
    "unwritable",
    "without_library",
    "write_manifest",
]

MANIFEST = "onnxcomp.json"
MODEL = "model.onnx"
_FORMAT = 1
# Names of our own files: external data under one of them would get lost.
_RESERVED = frozenset(
    {MODEL, MANIFEST, "README.md", "config.pbtxt", "inputs.npz", "run.py", "model.py", "service.py",
     "requirements.txt", "settings.json", "model-settings.json"}
)  # fmt: skip
_CHUNK = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """One input or output, as a session sees it.

    Attributes:
        name: Its name.
        type: ONNX Runtime's word for its type: ``tensor(float)``.
        shape: Sizes; None where free.
    """

    name: str
    type: str
    shape: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Contents:
    """A model and what belongs to it.

    Attributes:
        model: The .onnx file.
        data: Files of external data, as the model names them.
        library: The operator library; None where the package does without it.
        operators: Calls of operators of com.onnxcomp, by name.
        portable: Whether the model runs without the library.
        inputs: What a session must be given.
        outputs: What it returns.
        session: A session of the model, with the library if it is part of the package.
    """

    model: Path
    data: tuple[str, ...]
    library: Path | None
    operators: Mapping[str, int]
    portable: bool
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    session: Any

    def copy_into(self, folder: Path) -> None:
        """Copy model, data and library; links are followed, so that the package has none."""
        shutil.copyfile(self.model, folder / MODEL)
        for name in self.data:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.model.parent / name, folder / name)
        if self.library is not None:
            shutil.copyfile(self.library, folder / self.library.name)


@dataclasses.dataclass(frozen=True, slots=True)
class Package:
    """What was written.

    Attributes:
        path: The folder.
        manifest: Contents of its ``onnxcomp.json``.
        notes: What is worth knowing before it is used.
    """

    path: Path
    manifest: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes of all files, without the manifest."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``onnxcomp package``."""
        return {"path": str(self.path), **self.manifest, "notes": list(self.notes)}


def gather(model: str | os.PathLike[str], *, portable: bool) -> Contents:
    """Read what a package of the model holds, and load the model as its users will.

    Raises:
        ModelError: The model or its data cannot be read or loaded.
        UsageError: Without the library the model cannot run: it holds no definitions.
        RuntimeMissingError: ONNX Runtime or the operator library is missing.
    """
    path = Path(model)
    operators = custom_operators(path)
    proto = read_structure(path)
    bodies = {function.name for function in proto.functions if function.domain == DOMAIN}
    runs_alone = operators.keys() <= bodies
    if portable and not runs_alone:
        raise UsageError(
            f"{path} holds no definitions of {', '.join(sorted(operators.keys() - bodies))}",
            hint="package it with the operator library, or compress it again as portable",
        )
    data = data_files(path)
    for name in data:
        _check_inside(path, name)
    model_bytes(path)  # every file is there
    needed = any(not name.endswith(FOLDED) for name in operators) and not portable
    session = open_session(path, library=needed)
    library = library_path() if needed else None
    inputs, outputs = (
        tuple(_value(value) for value in values)
        for values in (session.get_inputs(), session.get_outputs())
    )
    return Contents(path, data, library, operators, runs_alone, inputs, outputs, session)


def _value(value: Any) -> Value:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return Value(value.name, value.type, shape)


def _check_inside(model: Path, name: str) -> None:
    """Refuse data that would be copied from or to somewhere else than a model's folder."""
    normal = os.path.normpath(name)
    if os.path.isabs(name) or normal.startswith("..") or normal in _RESERVED:
        raise ModelError(
            f"external data of {model} cannot be packaged: its location is {name!r}",
            hint="save the model again: onnxcomp optimize MODEL -o OUT --method dense",
        )


@contextlib.contextmanager
def staged(target: Path, *, force: bool) -> Iterator[Path]:
    """A folder to fill that becomes `target` when the block ends without an error.

    Raises:
        UsageError: `target` exists already and may not be replaced, or cannot be written.
    """
    _check_target(target, force=force)
    token = secrets.token_hex(4)
    stage, old = (target.with_name(f".{target.name[:40]}.{token}{end}") for end in ("", ".old"))
    try:
        stage.mkdir()
        yield stage
        if target.exists():
            target.rename(old)
        stage.rename(target)
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        if isinstance(error, OSError):
            raise unwritable(target, error) from error
        raise
    finally:
        for folder in (stage, old):
            shutil.rmtree(folder, ignore_errors=True)


def unwritable(target: Path, error: OSError) -> UsageError:
    """The error of a place that cannot be written to."""
    return UsageError(
        f"cannot write {target}: {error.strerror or error}",
        hint="choose a writable folder with enough free space",
    )


def _check_target(target: Path, *, force: bool) -> None:
    if not target.parent.is_dir():
        raise UsageError(
            f"the folder {str(target.parent)!r} does not exist", hint="create it first"
        )
    if not target.exists() and not target.is_symlink():
        return
    if target.is_dir() and not target.is_symlink() and not any(target.iterdir()):
        return
    if not (target / MANIFEST).is_file() or target.is_symlink():
        raise UsageError(
            f"{target} exists already and is not a package of onnxcomp",
            hint="choose another folder, or remove it yourself",
        )
    if not force:
        raise UsageError(f"{target} exists already", hint="--force replaces it")


def write_manifest(contents: Contents, folder: Path, kind: str, model: Path) -> dict[str, Any]:
    """Write the manifest of a filled folder and return what is in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    home = model.parent.relative_to(folder)
    manifest = {
        "format": _FORMAT,
        "kind": kind,
        "onnxcomp": _version(),
        "model": model.relative_to(folder).as_posix(),
        "library": None if contents.library is None else (home / contents.library.name).as_posix(),
        "platform": f"{platform.system().lower()}-{platform.machine()}",
        "portable": contents.portable,
        "operators": dict(contents.operators),
        "inputs": [dataclasses.asdict(value) for value in contents.inputs],
        "outputs": [dataclasses.asdict(value) for value in contents.outputs],
        "files": {
            path.relative_to(folder).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": _hash(path),
            }
            for path in files
        },
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    plain: dict[str, Any] = json.loads(text)
    return plain


def template(file: str, /, **values: str) -> str:
    """A text of the package's templates with values filled in."""
    folder = importlib.resources.files("onnxcomp.runtime.package") / "templates"
    text = (folder / file).read_text(encoding="utf-8")
    return text.format(version=_version(), **values) if values else text


def checked_name(contents: Contents, name: str | None) -> str:
    """What a server calls the model: the given name, else what is left of that of the file.

    Raises:
        UsageError: The given name does not fit into a path.
    """
    if name is None:
        return re.sub(r"[^A-Za-z0-9_.-]+", "_", contents.model.stem).lstrip(".-") or "model"
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be the name of a model",
            hint="use letters, digits, underscores, dots and hyphens",
        )
    return name


def copied_weights(contents: Contents) -> tuple[str, ...]:
    """A note for servers, where compressed weights lie inside the .onnx file."""
    if contents.data or contents.library is None:
        return ()
    return (
        "each session copies the weights, which lie in the .onnx file; compress with "
        "--external-data always, and all sessions and processes of a machine share one copy",
    )


def without_library(contents: Contents) -> str:
    """How the model runs without the operator library, for the README of a package."""
    if contents.portable:
        return (
            "Without it the same model runs in any ONNX Runtime, by the definitions inside the "
            "file:\nwith more memory, and slower for products."
        )
    return "The model has no definitions of its operators inside and does not run without it."


def _version() -> str:
    from onnxcomp.version import __version__

    return __version__


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()
