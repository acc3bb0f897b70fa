"""Run an application and keep what it feeds its ONNX Runtime sessions, one file for each model."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxcomp.errors import UsageError
from onnxcomp.runtime.clients.recorder import MODEL, write_npz
from onnxcomp.runtime.stored_inputs import SETS

__all__ = ["Recorded", "collected", "spool"]

Array = npt.NDArray[Any]
Sample = dict[str, Array]


@dataclasses.dataclass(frozen=True, slots=True)
class Recorded:
    """What was recorded of one model.

    Attributes:
        model: Its path; for a model that was loaded from memory, the SHA-256 of its bytes.
        path: The file with its inputs.
        runs: How often it was run.
        samples: How many inputs are in the file.
        nbytes: Bytes of their arrays.
        shapes: Of each input, the least and the largest size of each axis; None where samples
            differ in the number of axes.
        left_out: Inputs that were chosen and are not in the file, by reason.
    """

    model: str
    path: Path
    runs: int
    samples: int
    nbytes: int
    shapes: Mapping[str, tuple[tuple[int, int], ...] | None]
    left_out: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "model": self.model,
            "path": str(self.path),
            "runs": self.runs,
            "samples": self.samples,
            "bytes": self.nbytes,
            "shapes": {
                name: axes if axes is None else [list(axis) for axis in axes]
                for name, axes in self.shapes.items()
            },
            "left_out": dict(self.left_out),
        }


@dataclasses.dataclass
class _Model:
    """What all processes have recorded of one model.

    Attributes:
        name: Its path, or the hash of its bytes.
        stem: What its file is to be named after.
        ranks: Number of axes of each input, as the model says; 0 where it does not.
        reservoirs: Of each process, the number of runs and the samples.
    """

    name: str
    stem: str
    ranks: Mapping[str, int]
    reservoirs: list[tuple[int, list[Path]]]
    left_out: dict[str, int]
    samples: list[Sample] = dataclasses.field(default_factory=list)

    @property
    def runs(self) -> int:
        """How often it was run."""
        return sum(runs for runs, _ in self.reservoirs)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays of its samples."""
        return sum(_nbytes(sample) for sample in self.samples)


def _nbytes(sample: Sample) -> int:
    return sum(array.nbytes for array in sample.values())


class spool:  # noqa: N801 - a context manager, used like a function
    """A temporary folder beside the output, for the application's processes to write to.

    Raises:
        UsageError: The output is no .npz file in a folder that can be written to.
    """

    def __init__(self, output: Path) -> None:
        if output.suffix != ".npz":
            raise UsageError(f"{output} is no .npz file", hint="name it calib.npz, for example")
        if output.exists() and not output.is_file():
            raise UsageError(f"{output} is no regular file")
        try:
            folder = tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.absolute().parent)
        except OSError as error:
            raise UsageError(f"cannot write {output}: {error.strerror}") from error
        self.path = Path(folder)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        # A process of the application may still be writing.
        shutil.rmtree(self.path, ignore_errors=True)


def collected(
    folder: Path, output: Path, *, samples: int, max_bytes: int, seed: int
) -> list[Recorded]:
    """Write what the processes of an application have recorded.

    Args:
        folder: Where they have put it: beside the output.
        output: The file for the inputs of a single model; those of several are named after it
            and the model.
        samples: How many samples are kept of each model: each run is as likely to be one.
        max_bytes: Bytes of all samples together.
        seed: Decides between samples of several processes.

    Returns:
        What there is of each model, the one that ran first in front; empty if none was run.
    """
    rng = random.Random(seed)
    models = _read(folder)
    for model in models:
        chosen = _drawn(model.reservoirs, samples, rng)
        model.samples = [_load(path) for path in chosen]
    _limit(models, max_bytes, rng)
    models = [model for model in models if model.runs]
    names = _names(output, [model for model in models if model.samples])
    return [_written(model, next(names) if model.samples else output, folder) for model in models]


def _read(folder: Path) -> list[_Model]:
    """Models, in the order of their first runs."""
    found: dict[str, _Model] = {}
    for path in sorted(folder.glob(f"*/*/{MODEL}")):
        facts = json.loads(path.read_text(encoding="utf-8"))
        name = facts["model"]
        if name not in found:
            stem = Path(name).stem if facts["path"] else f"model-{name[:8]}"
            ranks = {entry["name"]: entry["rank"] for entry in facts["inputs"]}
            found[name] = _Model(name, stem, ranks, [], {})
        model = found[name]
        model.reservoirs.append((_count(path, "runs"), sorted(path.parent.glob("*.npz"))))
        for reason in ("unsupported", "large"):
            count = _count(path, reason)
            if count:
                model.left_out[reason] = model.left_out.get(reason, 0) + count
    return list(found.values())


def _count(path: Path, name: str) -> int:
    """The number in a file that has a byte for each."""
    counter = path.with_name(name)
    return counter.stat().st_size if counter.exists() else 0


def _load(path: Path) -> Sample:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _drawn(
    reservoirs: Sequence[tuple[int, list[Path]]], count: int, rng: random.Random
) -> list[Path]:
    """A sample of the runs of all processes, from uniform samples of the runs of each.

    A process is drawn as often as it would be if its runs were drawn one by one, without putting
    them back.
    """
    left = [runs for runs, _ in reservoirs]
    stored = [rng.sample(paths, len(paths)) for _, paths in reservoirs]
    drawn: list[Path] = []
    while len(drawn) < count and any(stored):
        # A process that was killed may have stored a sample of a run that it has not counted.
        weights = [
            max(n, len(paths)) if paths else 0 for n, paths in zip(left, stored, strict=True)
        ]
        (index,) = rng.choices(range(len(stored)), weights)
        drawn.append(stored[index].pop())
        left[index] -= 1
    return sorted(drawn)


def _limit(models: Sequence[_Model], max_bytes: int, rng: random.Random) -> None:
    """Give up samples, of the model with most bytes each time; every model keeps one if it can."""
    while sum(model.nbytes for model in models) > max_bytes:
        several = [model for model in models if len(model.samples) > 1] or models
        largest = max(several, key=lambda model: model.nbytes)
        largest.samples.pop(rng.randrange(len(largest.samples)))
        if not largest.samples:
            largest.left_out["large"] = largest.left_out.get("large", 0) + 1


def _names(output: Path, models: Sequence[_Model]) -> Iterator[Path]:
    """Files for the models: the output itself for one, else with the model's name in them."""
    if len(models) == 1:
        yield output
        return
    stems = [model.stem for model in models]
    used: set[str] = set()
    for model in models:
        stem = model.stem
        if stems.count(stem) > 1:  # many are called model.onnx
            stem = f"{Path(model.name).parent.name}-{stem}"
        stem = re.sub(r"[^\w.-]", "_", stem)
        numbered, number = stem, 1
        while numbered in used:
            number += 1
            numbered = f"{stem}-{number}"
        used.add(numbered)
        yield output.with_name(f"{output.stem}-{numbered}.npz")


def _written(model: _Model, path: Path, folder: Path) -> Recorded:
    if model.samples:
        write_npz(str(folder / "complete"), _arrays(model))
        os.replace(folder / "complete", path)
    return Recorded(
        model.name, path, model.runs, len(model.samples), model.nbytes, _shapes(model.samples),
        model.left_out,
    )  # fmt: skip


def _arrays(model: _Model) -> Iterator[tuple[str, Array]]:
    """The samples stacked; as sets where shapes vary or the model does not say them."""
    sets: dict[tuple[Any, ...], list[Sample]] = {}
    for sample in model.samples:
        # Text has the width of the longest: it does not tell samples apart.
        kinds = ((n, a.shape, a.dtype.kind, a.dtype.name[:3]) for n, a in sorted(sample.items()))
        sets.setdefault(tuple(kinds), []).append(sample)
    first = model.samples[0]
    plain = len(sets) == 1 and all(first[n].ndim == rank for n, rank in model.ranks.items())
    if not plain:
        yield SETS, np.asarray(len(sets))
    for number, stack in enumerate(sets.values()):
        for name in stack[0]:
            mark = "" if plain else f"{number}/"
            yield mark + name, np.stack([sample[name] for sample in stack])


def _shapes(samples: Sequence[Sample]) -> dict[str, tuple[tuple[int, int], ...] | None]:
    """The least and the largest size of each axis of each input."""
    found: dict[str, tuple[tuple[int, int], ...] | None] = {}
    for name in samples[0] if samples else ():
        shapes = {sample[name].shape for sample in samples}
        axes = zip(*shapes, strict=True) if len({len(shape) for shape in shapes}) == 1 else None
        found[name] = None if axes is None else tuple((min(axis), max(axis)) for axis in axes)
    return found
