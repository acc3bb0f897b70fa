"""A model in the repository of a Triton Inference Server.

The rules are those of Triton's ONNX Runtime backend: dimensions of outputs must be those that the
session reports, exactly; with a maximal batch size above 0 the first dimension of everything must
be free and is left out; a scalar has the dimensions [1]; the path of the operator library is handed
on as it stands. With inputs and outputs given, nothing is completed by the server.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

from onnxcomp.errors import UsageError
from onnxcomp.runtime.package.contents import (
    MODEL,
    Contents,
    Package,
    Value,
    checked_name,
    copied_weights,
    staged,
    template,
    unwritable,
    without_library,
    write_manifest,
)
from onnxcomp.runtime.structure import read_structure

__all__ = ["Server", "config_text", "write_triton"]

_TYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "bfloat16": "BF16",
    "float": "FP32",
    "double": "FP64",
    "string": "STRING",
}
_KINDS = {"cpu": "KIND_CPU", "cuda": "KIND_GPU"}


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """How Triton is to run the model; see `package`."""

    mount_prefix: str = "/models"
    max_batch_size: int = 0
    model_version: int = 1
    instances: int = 1
    target: str = "cpu"

    def __post_init__(self) -> None:
        if not os.path.isabs(self.mount_prefix):
            raise UsageError(
                f"the mount prefix {self.mount_prefix!r} is not an absolute path",
                hint="name the folder where the server sees the repository, such as /models",
            )
        for name, least in (("max_batch_size", 0), ("model_version", 1), ("instances", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}", hint=f"at least {least}")
        if self.target not in _KINDS:
            raise UsageError(f"target {self.target!r} is unknown", hint="choose cpu or cuda")


def write_triton(
    contents: Contents,
    repository: str | os.PathLike[str],
    server: Server,
    *,
    name: str | None,
    force: bool,
) -> Package:
    """Write ``REPOSITORY/NAME`` with the configuration, a version of the model, and a README.

    Raises:
        UsageError: The model is there already, or Triton cannot serve it.
    """
    root = Path(os.path.abspath(repository))
    name = checked_name(contents, name)
    config = config_text(contents, server, name)
    made = not root.exists()
    if made and root.parent.is_dir():
        try:
            root.mkdir()
        except OSError as error:
            raise unwritable(root, error) from error
    try:
        with staged(root / name, force=force) as folder:
            version = folder / str(server.model_version)
            version.mkdir()
            contents.copy_into(version)
            (folder / "config.pbtxt").write_text(config, encoding="utf-8")
            text = _readme(contents, server, name)
            (folder / "README.md").write_text(text, encoding="utf-8")
            manifest = write_manifest(contents, folder, "triton", version / MODEL)
    except BaseException:
        if made and root.is_dir() and not any(root.iterdir()):
            root.rmdir()
        raise
    return Package(Path(repository) / name, manifest, tuple(_notes(contents, server)))


def _readme(contents: Contents, server: Server, name: str) -> str:
    library = ""
    if contents.library is not None:
        library = template(
            "triton_library.md",
            prefix=server.mount_prefix,
            platform=f"{platform.system()} on {platform.machine()}",
            without=without_library(contents),
        )
    return template("triton.md", name=name, prefix=server.mount_prefix, library=library)


def _notes(contents: Contents, server: Server) -> Iterator[str]:
    values = (*contents.inputs, *contents.outputs)
    if contents.library is not None:
        yield f"the server must see the repository at {server.mount_prefix}"
    if not server.max_batch_size and all(v.shape and v.shape[0] is None for v in values):
        yield "if the first dimension is a batch, --max-batch-size 8 lets Triton join requests"
    yield from copied_weights(contents)


def config_text(contents: Contents, server: Server, name: str) -> str:
    """The model configuration in protobuf's text format.

    Raises:
        UsageError: Triton cannot serve a value of the model, or the batching asked for.
    """
    _check_ranks(contents)
    lines = [
        f"name: {_quoted(name)}",
        'backend: "onnxruntime"',
        f"default_model_filename: {_quoted(MODEL)}",
        f"max_batch_size: {server.max_batch_size}",
    ]
    for kind, values in (("input", contents.inputs), ("output", contents.outputs)):
        lines.append(f"{kind} [")
        lines.append(",\n".join(_value_text(value, kind, server) for value in values))
        lines.append("]")
    lines.append(
        f"instance_group [ {{ count: {server.instances} kind: {_KINDS[server.target]} }} ]"
    )
    if server.max_batch_size > 1:
        lines.append("dynamic_batching { }")
    if contents.library is not None:
        folder = f"{server.mount_prefix.rstrip('/')}/{name}/{server.model_version}"
        path = _quoted(f"{folder}/{contents.library.name}")
        lines.append(f"model_operations {{ op_library_filename: [ {path} ] }}")
    return "\n".join(lines) + "\n"


def _check_ranks(contents: Contents) -> None:
    """Refuse values of unknown rank: to the backend they look like scalars."""
    graph = read_structure(contents.model).graph
    for value in (*graph.input, *graph.output):
        if not value.type.tensor_type.HasField("shape"):
            found = next(
                (v for v in (*contents.inputs, *contents.outputs) if v.name == value.name), None
            )
            if found is not None and not found.shape and found.type.startswith("tensor"):
                raise UsageError(
                    f"Triton needs to know how many dimensions {value.name!r} has",
                    hint="export the model with the shapes of its inputs and outputs",
                )


def _value_text(value: Value, kind: str, server: Server) -> str:
    inner = re.fullmatch(r"tensor\((\w+)\)", value.type)
    if inner is None or inner[1] not in _TYPES:
        raise UsageError(
            f"Triton cannot serve {kind} {value.name!r}, a {value.type}",
            hint="it serves tensors of numbers, booleans and text",
        )
    shape = value.shape
    if server.max_batch_size:
        if not shape or shape[0] is not None:
            raise UsageError(
                f"{kind} {value.name!r} has the fixed shape {_shown(shape)}: "
                "requests cannot be joined along its first dimension",
                hint="leave --max-batch-size at 0, or export the model with a free batch dimension",
            )
        shape = shape[1:]
    if 0 in shape:
        raise UsageError(f"Triton cannot serve {kind} {value.name!r} of shape {_shown(shape)}")
    dims = [-1 if size is None else size for size in shape] or [1]
    # One row of a batch that is a scalar has no dimensions; a configuration must have one.
    reshape = "  reshape { shape: [ ] }" if server.max_batch_size and not shape else ""
    sizes = ", ".join(map(str, dims))
    return (
        f"  {{ name: {_quoted(value.name)}  data_type: TYPE_{_TYPES[inner[1]]}  "
        f"dims: [ {sizes} ]{reshape} }}"
    )


def _shown(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def _quoted(text: str) -> str:
    """A string of protobuf's text format."""
    return f'"{"".join(map(_escaped, text))}"'


def _escaped(char: str) -> str:
    if char.isprintable() and char not in '"\\':
        return char
    return "".join(f"\\{byte:03o}" for byte in char.encode())
