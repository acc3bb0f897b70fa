"""The table of all clients, on made-up results, and why an engine refused a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LOADED = {"load_s": 0.5, "peak_bytes": 100, "error": 0.0}
TWICE = {"load_s": 1.0, "peak_bytes": 150, "error": 1e-6}
WEB = {
    "onnxruntime-web": "1.0",
    "rows": [
        {"form": "dense", "load_ms": 10, "peak_bytes": 10},
        {"form": "4 bits", "failed": "no memory"},
    ],
}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    if not BENCHMARKS.exists():
        pytest.skip("an installation has no benchmarks")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_engines
    import client_summary

    yield bench_engines, client_summary
    for name in ("bench_engines", "client_summary", "page_parts", "environments", "results"):
        sys.modules.pop(name, None)


def rows(summary: Any, monkeypatch: pytest.MonkeyPatch, **engines: Any) -> list[tuple[str, ...]]:
    """The table where engines alone were run."""
    named = {name.replace("_", "-"): engine for name, engine in engines.items()}
    documents = {"engines": {"engines": named}, "web": WEB}
    monkeypatch.setattr(summary, "read", lambda name: documents.get(name, {"rows": []}))
    return list(summary.rows())


def test_an_engine_has_a_row_with_both_forms(
    modules: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = modules[1]
    forms = {"dense": LOADED, "functions": TWICE, summary.LIBRARY: LOADED}
    engine, web = rows(summary, monkeypatch, runtime_1={"version": "1.18.1", "forms": forms})
    assert engine == (
        "runtime 1.18.1", "error 0e+00", "error 1e-06", "1.0 x / 2.0 x", "1.0 x / 1.5 x",
    )  # fmt: skip
    assert web == ("onnxruntime-web 1.0, Chromium", "takes no library", "failed", "", "")


def test_an_engine_that_refuses_functions_shows_the_inlined_form_and_why(
    modules: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = {"dense": LOADED, "functions": {"failed": "a | b"}, "inlined": TWICE}
    row = rows(modules[1], monkeypatch, tract={"version": "1.0", "forms": forms})[0]
    assert row[1:3] == ("takes no library", "inlined: error 1e-06; functions: refused, `a and b`")
    assert row[3:] == ("2.0 x", "1.5 x")


def test_an_engine_that_does_not_install_says_so(
    modules: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = rows(modules[1], monkeypatch, runtime_node={"line": "", "failed": "no package"})[0]
    assert row == ("runtime-node", "", "not installed: no package", "", "")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["-- No rule for HyperGather", "RuntimeError: above"], "No rule for HyperGather"),
        (["  Unimplemented(HyperGather)", "0: <anyhow::Error>::msg"], "Unimplemented(HyperGather)"),
        (["Traceback", "ValueError: 3"], "ValueError: 3"),
        (["killed"], ""),
    ],
)
def test_the_reason_names_the_operator_before_the_error(
    modules: tuple[Any, Any], lines: list[str], reason: str
) -> None:
    assert modules[0].reason(lines) == reason
