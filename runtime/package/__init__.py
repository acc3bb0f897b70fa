"""Bundle a model with what it needs to be served: a folder, for Triton, or for generation."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from onnxcomp.errors import UsageError
from onnxcomp.runtime.package.archives import Archive, restore
from onnxcomp.runtime.package.archives import write_archive as archive
from onnxcomp.runtime.package.contents import Package, gather
from onnxcomp.runtime.package.services import SERVICES, write_service

if TYPE_CHECKING:
    from onnxcomp.runtime.stored_inputs import Data

__all__ = ["KINDS", "Archive", "Package", "archive", "package", "restore"]

PathLike = str | os.PathLike[str]

KINDS = ("dir", "triton", "genai", "hf", *SERVICES)


def package(
    model: PathLike,
    output: PathLike,
    kind: str = "dir",
    *,
    portable: bool = False,
    force: bool = False,
    data: Data | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    name: str | None = None,
    mount_prefix: str = "/models",
    max_batch_size: int = 0,
    model_version: int = 1,
    instances: int = 1,
    target: str = "cpu",
    like: PathLike | None = None,
    variant: str = "",
) -> Package:
    """Write a folder that holds a model, its data, the operator library, and how to use them.

    The folder appears complete or not at all. A manifest, ``onnxcomp.json``, lists its files with
    their hashes.

    Args:
        model: The model, compressed or not.
        output: The folder to write; for Triton the model repository, which may hold other models.
        kind: "dir", "triton", "genai", "hf", "litserve", "ray", "bentoml", "mlserver" or "kserve".
        portable: Leave the operator library out; the model runs by the definitions inside it.
        force: Replace an existing package. Other folders are never replaced.
        data: Example inputs for a plain folder, see `runtime.inputs.load_inputs`; None to make
            them up.
        shapes: Shapes of made-up inputs by name.
        name: Triton and services: name of the model; None for that of the file.
        mount_prefix: Triton: where the server sees the repository. The path of the library in the
            configuration begins with it, because Triton does not resolve paths.
        max_batch_size: Triton: most rows that requests are joined to; 0 for no batching.
            Services: most requests; 0 for 8.
        model_version: Triton: number of the version.
        instances: Triton: how many instances run at once.
        target: Triton: "cpu" or "cuda".
        like: onnxruntime-genai and Hugging Face: folder of the original model, with its
            ``genai_config.json`` or ``config.json`` and tokenizer; None for the folder of `model`.
        variant: Hugging Face: what stands behind ``model_`` in the name of the file, such as "q4".

    Raises:
        UsageError: The folder exists already, or the model cannot be served like that.
        ModelError: The model cannot be loaded.
        RuntimeMissingError: ONNX Runtime or the operator library is missing.
    """
    if kind not in KINDS:
        raise UsageError(
            f"package kind {kind!r} is unknown", hint=f"choose one of {', '.join(KINDS)}"
        )
    contents = gather(model, portable=portable)
    if kind == "hf":
        from onnxcomp.runtime.package.hugging_face import write_hf

        bare = dataclasses.replace(contents, library=None)
        return write_hf(bare, output, like, variant=variant, force=force)
    if kind == "dir":
        from onnxcomp.runtime.package.folder import write_folder

        return write_folder(contents, output, force=force, data=data, shapes=shapes)
    if kind == "genai":
        from onnxcomp.runtime.package.genai import write_genai

        return write_genai(contents, output, like, force=force)
    if kind in SERVICES:
        return write_service(
            contents, output, kind, name=name, max_batch_size=max_batch_size, force=force
        )
    from onnxcomp.runtime.package.triton import Server, write_triton

    server = Server(mount_prefix, max_batch_size, model_version, instances, target)
    return write_triton(contents, output, server, name=name, force=force)
