"""What a run did, with its numbers: the JSON object of `optimize` and the rows of its table."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.passes.analysis.constants import EXACT
from onnxcomp.passes.analysis.weight_sites import COMPRESSED_PART

__all__ = [
    "InputFile",
    "OutputFile",
    "Report",
    "SiteReport",
    "coverage",
    "versions",
]


@dataclasses.dataclass(frozen=True, slots=True)
class InputFile:
    """The model that was read.

    Attributes:
        path: Its path; None for a model in memory.
        bytes: Bytes of the file and its external data.
        sha256: Hash of the .onnx file; None for a model in memory.
    """

    path: str | None
    bytes: int
    sha256: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class OutputFile:
    """The model that was written.

    Attributes:
        path: Its path.
        bytes: Bytes of all its files; of a dry run: as planned.
        sha256: Hash of the .onnx file; None for a dry run.
        files: Paths of all its files; empty for a dry run.
    """

    path: str | None
    bytes: int
    sha256: str | None
    files: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SiteReport:
    """What became of one weight tensor.

    Attributes:
        name: Name of the tensor.
        shape: Its shape.
        dtype: Its element type.
        uses: Operators that use it.
        method: Codec that stores it; "dense" when it is stored as it was.
        params: Settings of the codec.
        mode: How its uses are served; empty when it stays as it was.
        bytes_before: Bytes of the dense tensor.
        bytes_after: Bytes of what is stored for it.
        weight_error: Measured relative Frobenius error; None when nothing was encoded.
        output_error: Relative error of its products on held-out calibration inputs; None where it
            was not measured, or where scales were tuned after that.
        reason: Why it is stored like this, or stays as it was.
        note: What is to be said about its calibration; mostly empty.
        spectrum: Singular values of a weight stored as low-rank factors, relative to the largest,
            each with its number from 1; None for other weights.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    uses: tuple[str, ...]
    method: str
    params: Mapping[str, Any]
    mode: str
    bytes_before: int
    bytes_after: int
    weight_error: float | None = None
    output_error: float | None = None
    reason: str = ""
    note: str = ""
    spectrum: Sequence[tuple[int, float]] | None = None

    @property
    def compressed(self) -> bool:
        """Whether something smaller stands for the tensor."""
        return self.method != "dense"


# Element types of indices, sizes, masks and texts: tensors of these are no weights.
_NO_WEIGHTS = frozenset({"int32", "int64", "uint32", "uint64", "bool", "string"})


def coverage(sites: Iterable[SiteReport], min_size: int) -> float:
    """Bytes of compressed weight tensors over bytes of all of `min_size` or more; 1 without any.

    Parts of weights that were compressed before are not weights. Constants that are kept exactly on
    purpose count as compressed.
    """
    weights = [
        site
        for site in sites
        if site.dtype not in _NO_WEIGHTS and not site.reason.startswith(COMPRESSED_PART)
    ]
    large = [site for site in weights if site.bytes_before >= min_size]
    total = sum(site.bytes_before for site in large)
    covered = sum(s.bytes_before for s in large if s.compressed or s.reason.startswith(EXACT))
    return covered / total if total else 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Everything one run of `optimize` did.

    Attributes:
        input: The model that was read.
        output: The model that was written.
        ratio: Bytes of the input over bytes of the output.
        coverage: Share of the weight bytes that is compressed.
        sites: One entry for each weight tensor, in the order of the model.
        verify: Result of the fidelity gate; None when it did not run.
        seconds: Wall-clock seconds by stage.
        peak_rss_bytes: Largest resident size of the process so far.
        versions: Versions of this package and of what it stands on.
        config: Settings in effect.
        target: Bytes asked for and whether they were met; None when none were.
        evaluation: Scores of both models by the user's own measure; None without one.
        prune: What pruning did; None where there was none.
        speed: Times of both models; None where they did not matter.
        division: Where pruning and codes share one budget: what was tried, the chosen one first.
    """

    input: InputFile
    output: OutputFile
    ratio: float
    coverage: float
    sites: tuple[SiteReport, ...]
    verify: Mapping[str, Any] | None
    seconds: Mapping[str, float]
    peak_rss_bytes: int
    versions: Mapping[str, str]
    config: Mapping[str, Any]
    target: Mapping[str, Any] | None = None
    evaluation: Mapping[str, Any] | None = None
    prune: Mapping[str, Any] | None = None
    speed: Mapping[str, Any] | None = None
    division: Sequence[Mapping[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """The report as plain values; ``docs/result.schema.json`` describes them."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Report:
        """Inverse of `to_json`.

        Raises:
            UsageError: Something is missing or unknown.
        """
        try:
            return cls(**{**values, **_typed(values)})
        except (KeyError, TypeError) as error:
            raise UsageError(f"this is not the result of optimize: {error}") from error

    def dumps(self) -> str:
        """The report as JSON text."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write `dumps` to a file."""
        Path(path).write_text(self.dumps(), encoding="utf-8")


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    output = values["output"]
    return {
        "input": InputFile(**values["input"]),
        "output": OutputFile(**{**output, "files": tuple(output["files"])}),
        "sites": tuple(
            SiteReport(
                **{
                    **site,
                    "shape": tuple(site["shape"]),
                    "uses": tuple(site["uses"]),
                    "spectrum": _spectrum(site.get("spectrum")),
                }
            )
            for site in values["sites"]
        ),
    }


def _spectrum(values: Sequence[Sequence[Any]] | None) -> tuple[tuple[int, float], ...] | None:
    return None if values is None else tuple((int(n), float(value)) for n, value in values)


def versions() -> dict[str, str]:
    """Versions of what a result depends on; packages that are not installed are left out."""
    from importlib import metadata

    from onnxcomp.version import __version__

    found = {"onnxcomp": __version__, "python": platform.python_version()}
    for name in ("numpy", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
