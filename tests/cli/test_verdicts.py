"""What is said about speed at the end of a run."""

from typing import Any

import pytest

from onnxcomp.cli.verdicts import speed_lines
from onnxcomp.passes.verification.clock import Clock

SITE = {"method": "hyper", "mode": "fused", "uses": ["MatMul"]}
USUAL = {"bits": 4, "state_bits": 7, "group": 128}


def report(slowdown: float | None, params: dict[str, Any] = USUAL, **config: Any) -> dict[str, Any]:
    verify = None if slowdown is None else {"slowdown": slowdown}
    return {"verify": verify, "config": config, "sites": [{**SITE, "params": params}]}


def test_a_slow_result_is_warned_of_with_what_helps() -> None:
    (line,) = speed_lines(report(1.4), "avx512")
    assert line.startswith("warning: it ran 1.4 times as long") and "--max-slowdown 1" in line
    for quiet in (report(1.1), report(None), report(1.4, max_slowdown=2.0)):
        assert not list(speed_lines(quiet, "avx512"))


def test_codes_that_suit_the_machine_are_named() -> None:
    (line,) = speed_lines(report(0.8), "avx2")
    assert line.endswith("--target avx2")
    (line,) = speed_lines(report(None), "neon")
    assert line.endswith("--target neon")


@pytest.mark.parametrize(
    "suited",
    [
        report(0.8, target="avx512"),
        report(0.8, {**USUAL, "table": "structured"}),
        report(0.8, {**USUAL, "bits": 5}),
        report(0.8, {**USUAL, "state_bits": 12}),
    ],
)
def test_nothing_is_said_where_other_codes_would_not_help(suited: dict[str, Any]) -> None:
    assert not list(speed_lines(suited, "avx2"))
    folded = report(0.8)
    folded["sites"][0]["mode"] = "folded"
    assert not list(speed_lines(folded, "avx2"))
    assert not list(speed_lines(report(0.8), None))


def test_a_clock_compares_runs_on_equal_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 9.0, 0.0, 2.0, 0.0, 8.0, 0.0, 3.0, 0.0, 1.0])
    monkeypatch.setattr("time.process_time", lambda: next(times))
    clock = Clock()
    for _ in range(2):
        with clock.running():
            pass
    clock.turn()
    assert clock.ratio is None
    for _ in range(2):
        with clock.running():
            pass
    assert clock.ratio == 1.5  # first runs do not count
    with clock.running():
        pass
    assert clock.ratio is None
