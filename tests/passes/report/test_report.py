"""Reports: their JSON, the schema in the docs, and the numbers that are computed here."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from onnxcomp.errors import UsageError
from onnxcomp.passes.report.report import (
    InputFile,
    OutputFile,
    Report,
    SiteReport,
    coverage,
    versions,
)
from onnxcomp.runtime.memory import peak_rss

SCHEMA = json.loads(
    (Path(__file__).parents[3] / "docs" / "result.schema.json").read_text(encoding="utf-8")
)


def site(name: str, before: int, method: str = "hyper", dtype: str = "float32") -> SiteReport:
    compressed = method == "hyper"
    return SiteReport(
        name=name,
        shape=(before // 4,),
        dtype=dtype,
        uses=("MatMul",),
        method=method,
        params={"bits": 4} if compressed else {},
        mode="fused" if compressed else "",
        bytes_before=before,
        bytes_after=before // 8 if compressed else before,
        weight_error=0.07 if compressed else None,
        reason="" if compressed else "why",
    )


@pytest.fixture
def report() -> Report:
    metrics = {"rel_l2": 0.01, "max_abs": 0.2, "cosine": 0.999, "snr_db": 40.0}
    passed = {"passed": True, "outputs": {"y": metrics}}
    return Report(
        input=InputFile("m.onnx", 1000, "0" * 64),
        output=OutputFile("s.onnx", 125, "f" * 64, ("s.onnx", "s.onnx.data")),
        ratio=8.0,
        coverage=0.5,
        sites=(site("a", 400), site("b", 400, "dense")),
        verify={**passed, "portable": passed},
        seconds={"encode": 1.5, "total": 2.0},
        peak_rss_bytes=peak_rss(),
        versions=versions(),
        config={"bits": 4},
        target={"bytes": 125, "met": True},
    )


def test_a_report_fits_the_schema(report: Report) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(report.to_json(), SCHEMA)
    bare = dataclasses.replace(report, verify=None, target=None)
    jsonschema.validate(bare.to_json(), SCHEMA)


def spoil(values: dict[str, Any], path: str, wrong: object) -> dict[str, Any]:
    *parents, last = path.split(".")
    place: Any = values
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = wrong
    return values


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ("coverage", 1.5),
        ("sites.0.mode", "fast"),
        ("sites.0.weight_error", -1),
        ("output.sha256", "abc"),
        ("verify.passed", "yes"),
        ("seconds", {}),
        ("extra", 1),
    ],
)
def test_the_schema_refuses_what_is_wrong(report: Report, path: str, wrong: object) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spoil(report.to_json(), path, wrong), SCHEMA)


def test_a_report_comes_back_from_json(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    report.save(path)
    again = Report.from_json(json.loads(path.read_text(encoding="utf-8")))
    assert again == report
    assert again.dumps() == report.dumps()


@pytest.mark.parametrize("wrong", [{}, {"input": {}}, {"sites": 3}])
def test_other_json_is_refused(report: Report, wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="not the result of optimize"):
        Report.from_json({**report.to_json(), **wrong} if wrong else {})


def test_coverage_counts_bytes_of_weights_of_the_minimum_size() -> None:
    sites = [
        site("a", 3000),
        site("b", 1000, "dense"),
        site("small", 99, "dense"),
        site("positions", 5000, "dense", "int64"),
    ]
    assert coverage(sites, 100) == pytest.approx(0.75)
    assert coverage(sites, 0) == pytest.approx(3000 / 4099)
    assert coverage([], 100) == 1.0


def test_the_peak_is_that_of_this_process() -> None:
    before = peak_rss()
    assert 1 << 20 < before < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    block = bytearray(64 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])
    assert peak_rss() >= before
    assert peak_rss() > 64 << 20
