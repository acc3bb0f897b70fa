"""A folder as the libraries around the Hugging Face hub load it.

Tokenizer, configuration and modules are the original's; the model lies where sentence-transformers,
optimum, fastembed and transformers.js look for it: ``onnx/model.onnx``, or with a variant
``onnx/model_q4.onnx``. These libraries open sessions of their own, so the operator library is not
part of the folder: `onnxcomp.patch_onnxruntime` gives it to them.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.runtime.package.contents import Contents, Package, staged, template, write_manifest
from onnxcomp.runtime.package.originals import read_json, without_weights
from onnxcomp.runtime.structure import nested_tensors, read_structure

__all__ = ["write_hf"]

_CONFIG = "config.json"
_README, _ORIGINAL_README = "README.md", "README.original.md"
_VARIANT = re.compile(r"[a-z0-9]*")
# What transformers.js calls its variants: the name of a file behind `model_`, by `dtype`.
_DTYPES = {"": "fp32", "quantized": "q8"}


def write_hf(
    contents: Contents,
    output: str | os.PathLike[str],
    like: str | os.PathLike[str] | None,
    *,
    variant: str,
    force: bool,
) -> Package:
    """Write the folder.

    Args:
        contents: The compressed model.
        output: The folder to write.
        like: The folder of the original, from the hub or by optimum; None for that of the model.
        variant: What stands behind ``model_`` in the name of the file: "q4"; "" for none.
        force: Replace a package that is there already.

    Raises:
        UsageError: There is no configuration in the folder, or its model is in several files.
    """
    source = contents.model.parent if like is None else Path(like)
    hint = f"name the folder of the original model, with its {_CONFIG}, by --like"
    config = read_json(source / _CONFIG, hint)
    if not _VARIANT.fullmatch(variant):
        raise UsageError(f"the variant {variant!r} is not of small letters and digits")
    if len(contents.data) > 1:
        raise UsageError(
            f"the data of {contents.model} are in {len(contents.data)} files",
            hint="save it again: onnxcomp optimize writes one",
        )
    name = f"model_{variant}.onnx" if variant else "model.onnx"
    target = Path(os.path.abspath(output))
    with staged(target, force=force) as folder:
        for file in without_weights(source, contents.model):
            relative = file.relative_to(source)
            if str(relative) == _README:
                relative = Path(_ORIGINAL_README)
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / relative)
        (folder / "onnx").mkdir()
        _place_model(contents, folder / "onnx" / name)
        text = _readme(contents, target.name, folder, config, name, variant)
        (folder / _README).write_text(text, encoding="utf-8")
        manifest = write_manifest(contents, folder, "hf", folder / "onnx" / name)
    return Package(Path(output), manifest, _notes(contents, name))


def _notes(contents: Contents, name: str) -> tuple[str, ...]:
    if contents.portable or not contents.operators:
        return ()
    return (f"onnx/{name} does not run without the operator library, so not in a browser",)


def _place_model(contents: Contents, path: Path) -> None:
    """Copy the model; its data get the name that transformers.js and optimum expect."""
    if not contents.data:
        shutil.copyfile(contents.model, path)
        return
    (name,) = contents.data
    data = path.with_name(f"{path.name}_data")
    shutil.copyfile(contents.model.parent / name, data)
    proto = read_structure(contents.model)
    for tensor in nested_tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = data.name
    path.write_bytes(proto.SerializeToString())


def _readme(
    contents: Contents, title: str, folder: Path, config: dict[str, Any], name: str, variant: str
) -> str:
    """The front page, with a snippet for each library that can load the folder."""
    outputs = {value.name: value for value in contents.outputs}
    values = {
        "file": f"onnx/{name}",
        "name": name,
        "dtype": _DTYPES.get(variant, variant),
        "external": "true" if contents.data else "false",
        "size": str(config.get("hidden_size", 0)),
        "kind": _optimum_class(outputs, config),
    }
    parts = []
    if "last_hidden_state" in outputs:
        if (folder / "modules.json").is_file():
            parts.append("sentence_transformers")
        parts += ["optimum", "fastembed", "transformers_js"]
    elif values["kind"]:
        parts.append("optimum")
    snippets = [template(f"hf/{part}.md") for part in parts] or [template("hf/session.md")]
    for key, value in values.items():
        snippets = [snippet.replace(f"@{key.upper()}@", value) for snippet in snippets]
    library = template("hf/library.md") if contents.operators else ""
    original = ""
    if (folder / _ORIGINAL_README).is_file():
        original = f"The page of the original is `{_ORIGINAL_README}`; its licence holds.\n"
    return template("hf/README.md", name=title, file=values["file"], original=original) + "\n".join(
        [*snippets, library]
    )


def _optimum_class(outputs: dict[str, Any], config: dict[str, Any]) -> str:
    """Class of optimum that loads the model; empty where its outputs do not tell."""
    if "last_hidden_state" in outputs:
        return "ORTModelForFeatureExtraction"
    if "logits" not in outputs:
        return ""
    if any(name.startswith("present") for name in outputs):
        return "ORTModelForCausalLM"
    named = str((config.get("architectures") or [""])[0])
    for word in ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM"):
        if named.endswith(f"For{word}"):
            return f"ORTModelFor{word}"
    return ""
