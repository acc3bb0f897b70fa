"""A self-contained folder: model, data, operator library, an example, a manifest."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnxcomp.errors import UsageError
from onnxcomp.runtime.evaluate import run_session
from onnxcomp.runtime.inputs import Feed, load_inputs, synthesize_inputs
from onnxcomp.runtime.package.contents import (
    MODEL,
    Contents,
    Package,
    staged,
    template,
    without_library,
    write_manifest,
)

if TYPE_CHECKING:
    from onnxcomp.runtime.stored_inputs import Data

__all__ = ["write_folder"]

_INPUTS = "inputs.npz"

# Types that .npz files hold; text is stored as such and turned into objects when it is read.
_PLAIN = "fiubcO"


def write_folder(
    contents: Contents,
    output: str | os.PathLike[str],
    *,
    force: bool,
    data: Data | None,
    shapes: Mapping[str, Sequence[int]] | None,
) -> Package:
    """Write the folder.

    Raises:
        UsageError: It is there already, or `data` or `shapes` do not fit the model.
    """
    target = Path(os.path.abspath(output))
    notes: list[str] = []
    feed = _inputs(contents, data, shapes, notes)
    with staged(target, force=force) as folder:
        contents.copy_into(folder)
        (folder / "run.py").write_text(template("run.py"), encoding="utf-8")
        if feed is not None:
            arrays = {n: a.astype(np.str_) if a.dtype.kind == "O" else a for n, a in feed.items()}
            with (folder / _INPUTS).open("wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]  # its flag has a name of its own
        text = template(
            "folder.md",
            name=target.name,
            inputs="inputs of your own" if feed is None else f"`{_INPUTS}`",
            library=_library_text(contents),
        )
        (folder / "README.md").write_text(text, encoding="utf-8")
        manifest = write_manifest(contents, folder, "dir", folder / MODEL)
    return Package(Path(output), manifest, tuple(notes))


def _library_text(contents: Contents) -> str:
    """What a user must know about the operator library."""
    if contents.library is None:
        return "The model needs no operator library."
    return template(
        "library.md",
        file=contents.library.name,
        platform=f"{platform.system()} on {platform.machine()}",
        without=without_library(contents),
    ).rstrip()


def _inputs(
    contents: Contents,
    data: Data | None,
    shapes: Mapping[str, Sequence[int]] | None,
    notes: list[str],
) -> Feed | None:
    """One example input; None, with a note, where none can be made up or stored."""
    try:
        if data is not None:
            feed = load_inputs(data, contents.model)[0]
        else:
            trial = functools.partial(run_session, contents.session)
            feed = synthesize_inputs(contents.model, shapes=shapes, trial=trial)[0]
    except UsageError as error:
        if data is not None or shapes:
            raise
        notes.append(f"no example inputs: {error.message}")
        return None
    strange = [name for name, array in feed.items() if array.dtype.kind not in _PLAIN]
    if strange:
        notes.append(f"no example inputs: {strange[0]!r} has a type that .npz files do not hold")
        return None
    return feed
