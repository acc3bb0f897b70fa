"""Folders that model servers of Python start with their own commands, as `SERVICES` says."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

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
    without_library,
    write_manifest,
)

__all__ = ["SERVICES", "Service", "write_service"]

_OPEN_PROTOCOL = "/v2/models/{name}/infer"
# Element types in ONNX Runtime's words, and in those of the Open Inference Protocol.
_PROTOCOL_TYPES = {
    "bool": "BOOL", "float": "FP32", "float16": "FP16", "double": "FP64", "string": "BYTES",
    "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64",
    "uint8": "UINT8", "uint16": "UINT16", "uint32": "UINT32", "uint64": "UINT64",
}  # fmt: skip
_SETTINGS = "model-settings.json"  # of MLServer, which joins requests itself


@dataclasses.dataclass(frozen=True, slots=True)
class Service:
    """How one server starts and is asked.

    Attributes:
        title: Its name.
        requirements: Packages beside onnxruntime and numpy.
        command: What starts it, in the folder; `{name}` is that of the model.
        port: The port it listens on by itself.
        health: Path that answers with 200 when the model can be asked.
        predict: Path of requests.
        body: What a request looks like: "inputs", "requests", or "v2" for the Open Inference
            Protocol.
        files: Other files: contents by name, with `{name}` and `{max_batch_size}`.
    """

    title: str
    requirements: tuple[str, ...]
    command: str
    port: int
    health: str
    predict: str
    body: str
    files: Mapping[str, Any] = dataclasses.field(default_factory=dict)


SERVICES: Mapping[str, Service] = MappingProxyType(
    {
        "litserve": Service(
            "LitServe", ("litserve>=0.2.10",), "python service.py", 8000, "/health", "/predict",
            "inputs",
        ),
        "ray": Service(
            "Ray Serve", ("ray[serve]>=2.40",), "serve run service:app", 8000, "/-/healthz", "/",
            "inputs",
        ),
        "bentoml": Service(
            "BentoML", ("bentoml>=1.4",), "bentoml serve service:Service", 3000, "/readyz",
            "/predict", "requests",
        ),
        "mlserver": Service(
            "MLServer", ("mlserver>=1.6",), "mlserver start .", 8080, "/v2/health/ready",
            _OPEN_PROTOCOL, "v2",
            {
                "settings.json": {"host": "127.0.0.1", "parallel_workers": 0, "debug": False},
                _SETTINGS: {
                    "name": "{name}", "implementation": "service.Service",
                    "max_batch_size": "{max_batch_size}", "max_batch_time": 0.01,
                },
            },
        ),
        "kserve": Service(
            "KServe", ("kserve>=0.15",), "python service.py", 8080, "/v2/health/ready",
            _OPEN_PROTOCOL, "v2",
        ),
    }
)  # fmt: skip


def write_service(
    contents: Contents,
    output: str | os.PathLike[str],
    kind: str,
    *,
    name: str | None,
    max_batch_size: int,
    force: bool,
) -> Package:
    """Write the folder of a service.

    Args:
        contents: The model.
        output: The folder to write.
        kind: A key of `SERVICES`.
        name: What the server calls the model; None for the name of its file.
        max_batch_size: Most requests that run at once; 0 for 8.
        force: Replace a package that is there already.

    Raises:
        UsageError: The folder exists already, the name does not fit into a path, or a value of
            the model is none that the service can send.
    """
    service = SERVICES[kind]
    _check_types(contents, service)
    name = checked_name(contents, name)
    target = Path(os.path.abspath(output))
    size = str(max_batch_size or 8)
    texts = {
        "model.py": template("services/model.py").replace("@MAX_BATCH@", size),
        "service.py": template(f"services/{kind}.py").replace("@NAME@", name),
        "requirements.txt": "\n".join((*service.requirements, "onnxruntime>=1.20", "numpy", "")),
        "README.md": _readme(contents, service, name, size),
    }
    for file, content in service.files.items():
        if file == _SETTINGS and not _joins(contents):  # MLServer joins whatever it is told to
            content = {**content, "max_batch_size": 0, "max_batch_time": 0}
        text = json.dumps(content, indent=2).replace("{name}", name)
        texts[file] = text.replace('"{max_batch_size}"', size) + "\n"
    with staged(target, force=force) as folder:
        contents.copy_into(folder)
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        manifest = write_manifest(contents, folder, kind, folder / MODEL)
    return Package(Path(output), manifest, copied_weights(contents))


def _check_types(contents: Contents, service: Service) -> None:
    """Refuse values that are no arrays of numpy, before the service fails at them."""
    for value in (*contents.inputs, *contents.outputs):
        if _kind(value) not in _PROTOCOL_TYPES:
            raise UsageError(
                f"a service of {service.title} cannot take or send {value.name!r}, a {value.type}",
                hint="it serves tensors of numbers, booleans and text",
            )


def _kind(value: Value) -> str:
    """Element type of a tensor, in ONNX Runtime's words."""
    return value.type.removeprefix("tensor(").removesuffix(")")


def _joins(contents: Contents) -> bool:
    """Whether rows are independent: one free size is the first of everything, as in model.py."""
    session = contents.session
    first = [value.shape[:1] for value in (*session.get_inputs(), *session.get_outputs())]
    return all(size == first[0] and size and isinstance(size[0], str) for size in first)


def _readme(contents: Contents, service: Service, name: str, size: str) -> str:
    library = (
        "The model needs no operator library."
        if contents.library is None
        else f"`{contents.library.name}` has the operators of the domain com.onnxcomp; `model.py` "
        "registers it."
    )
    return template(
        "services/README.md",
        name=name,
        title=service.title,
        command=service.command,
        health=f"http://127.0.0.1:{service.port}{service.health}",
        predict=f"http://127.0.0.1:{service.port}{service.predict.format(name=name)}",
        body=json.dumps(_body(contents.inputs, service.body), indent=2),
        max_batch_size=size,
        batching=f"`max_batch_size` in `{_SETTINGS}`"
        if _SETTINGS in service.files
        else "`MAX_BATCH` in its environment",
        library=library,
        without=without_library(contents),
    )


def _body(inputs: tuple[Value, ...], form: str) -> dict[str, Any]:
    """A request with a zero for each value, and 1 for sizes that are free."""
    shapes = {value.name: [size or 1 for size in value.shape] for value in inputs}
    if form == "v2":
        return {
            "inputs": [
                {
                    "name": value.name,
                    "shape": shapes[value.name],
                    "datatype": _PROTOCOL_TYPES[_kind(value)],
                    "data": [0] * _count(shapes[value.name]),
                }
                for value in inputs
            ]
        }
    lists = {name: _zeros(shape) for name, shape in shapes.items()}
    return {form: [lists] if form == "requests" else lists}


def _count(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _zeros(shape: list[int]) -> Any:
    return [_zeros(shape[1:]) for _ in range(shape[0])] if shape else 0
