"""What pruning reports, as the JSON of plans and results."""

import json

import pytest

from onnxcomp.errors import UsageError
from onnxcomp.passes.analysis.prune_report import Cost, FitReport, GroupReport, PruneReport

REPORT = PruneReport(
    asked=0.3,
    reached=0.31,
    unit="parameters",
    score="obs",
    calibrated=True,
    before=Cost(100, 2000, 0),
    after=Cost(69, 1400, 0),
    groups=(GroupReport("w", "heads", 8, 6, ("w", "b")),),
    fits=(FitReport("v", 0.2, 0.1, "fit"),),
    norms=(),
    inputs=(("past", "[1, 8, 64]", "[1, 6, 64]"),),
    kept=(("u", "it is an output"),),
)


def test_json_gives_the_report_back() -> None:
    text = json.dumps(REPORT.to_json())
    again = PruneReport.from_json(json.loads(text))
    assert again == REPORT
    assert json.dumps(again.to_json()) == text
    assert json.loads(text)["met"] and json.loads(text)["groups"][0]["weights"] == ["w", "b"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("before", None), ("groups", [{"name": "w"}]), ("kept", [{"name": "w"}]), ("colour", 1)],
)
def test_what_is_missing_or_unknown_is_refused(key: str, value: object) -> None:
    with pytest.raises(UsageError, match="not what pruning reports"):
        PruneReport.from_json({**REPORT.to_json(), key: value})
    plain = REPORT.to_json()
    del plain["before"]
    with pytest.raises(UsageError, match="'before'"):
        PruneReport.from_json(plain)
