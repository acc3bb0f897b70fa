"""A folder for onnxruntime-genai: the files of the original, the compressed model its decoder.

onnxruntime-genai loads an operator library from the folder of the model, named in the session
options of the decoder; so it lies there, under its bare name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.runtime.package.contents import (
    MODEL,
    Contents,
    Package,
    staged,
    write_manifest,
)
from onnxcomp.runtime.package.genai_config import (
    CONFIG,
    is_hugging_face,
    made_config,
    tokenizer_config,
)
from onnxcomp.runtime.package.originals import original_files, read_json, without_weights
from onnxcomp.runtime.structure import data_files, read_structure

__all__ = ["write_genai"]

_LIBRARY_KEY = "custom_ops_library"


def write_genai(
    contents: Contents,
    output: str | os.PathLike[str],
    like: str | os.PathLike[str] | None,
    *,
    force: bool,
) -> Package:
    """Write the folder.

    Args:
        contents: The compressed decoder.
        output: The folder to write.
        like: The folder of the original; None for the one the compressed model lies in.
        force: Replace a package that is there already.

    Raises:
        UsageError: There is no configuration, it is of a kind that is not supported, or the model
            has other inputs and outputs than the original.
    """
    source = contents.model.parent if like is None else Path(like)
    made = is_hugging_face(source)
    config = made_config(contents, source) if made else _read_config(source)
    decoder = _decoder(config, source)
    original = source / str(decoder.get("filename", MODEL))
    if not made:
        _check_interface(contents, original)
    tokenizer = tokenizer_config(source, config) if made else None
    decoder["filename"] = MODEL
    options = decoder.setdefault("session_options", {})
    if contents.library is not None:
        options[_LIBRARY_KEY] = contents.library.name
    target = Path(os.path.abspath(output))
    with staged(target, force=force) as folder:
        if made:
            kept = without_weights(source, contents.model)
        else:
            kept = list(_kept_files(source, (original, contents.model)))
        for file in kept:
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        _check_free(contents, folder)
        contents.copy_into(folder)
        text = json.dumps(config, indent=4, ensure_ascii=False) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            text = json.dumps(tokenizer, indent=4, ensure_ascii=False) + "\n"
            (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
        manifest = write_manifest(contents, folder, "genai", folder / MODEL)
    return Package(Path(output), manifest, _notes(Path(output), made=made))


def _notes(output: Path, *, made: bool) -> tuple[str, ...]:
    """What is worth knowing of a configuration that was made."""
    if not made:
        return ()
    notes = [f"{CONFIG} was made from config.json"]
    if not (output / "tokenizer_config.json").exists():
        notes.append("onnxruntime-genai reads a tokenizer_config.json, which the original lacks")
    return tuple(notes)


def _read_config(source: Path) -> dict[str, Any]:
    hint = f"name the folder of the original model, with its {CONFIG}, by --like"
    return read_json(source / CONFIG, hint)


def _decoder(config: dict[str, Any], source: Path) -> dict[str, Any]:
    """The part of the configuration about the decoder."""
    model = config.get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(decoder, dict):
        raise UsageError(f"{source / CONFIG} does not describe a decoder")
    if "pipeline" in decoder:
        raise UsageError(
            f"the decoder of {source} is a pipeline of several models",
            hint=f"compress its parts, and set {_LIBRARY_KEY} in the session options of each",
        )
    if decoder.get("session_options", {}).get(_LIBRARY_KEY):
        raise UsageError(
            f"the decoder of {source} has an operator library already: "
            f"{decoder['session_options'][_LIBRARY_KEY]}",
            hint="onnxruntime-genai loads one library for each model",
        )
    return decoder


def _check_interface(contents: Contents, original: Path) -> None:
    """Refuse a model that the configuration does not describe."""
    if not original.is_file():
        return
    graph = read_structure(original).graph
    given = {tensor.name for tensor in graph.initializer}
    for what, before, after in (
        ("input", {value.name for value in graph.input} - given, contents.inputs),
        ("output", {value.name for value in graph.output}, contents.outputs),
    ):
        differing = sorted(before ^ {value.name for value in after})
        if differing:
            raise UsageError(
                f"{contents.model} and {original} differ in the {what} {differing[0]!r}",
                hint="name the folder of the model that was compressed by --like",
            )


def _kept_files(source: Path, models: Sequence[Path]) -> Iterator[Path]:
    """Files of the original folder, without some models and the data that only they refer to."""
    files = original_files(source)
    replaced = {model.resolve() for model in models}
    others = [f for f in files if f.suffix == ".onnx" and f.resolve() not in replaced]
    shared = {(f.parent / name).resolve() for f in others for name in data_files(f)}
    for model in models:
        if model.is_file():
            replaced |= {(model.parent / name).resolve() for name in data_files(model)} - shared
    for file in files:
        if file.resolve() not in replaced and file.name != CONFIG:
            yield file


def _check_free(contents: Contents, folder: Path) -> None:
    """Refuse to put a file of the compressed model over one of another model."""
    for name in (MODEL, *contents.data):
        if (folder / name).exists():
            raise UsageError(
                f"{name!r} belongs to another model of the folder",
                hint="write the compressed model under another name, and package that",
            )
