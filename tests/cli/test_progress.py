"""Every stage that lasts says what it is at."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onnxcomp.cli import progress as shown
from onnxcomp.runtime.activity import activity, shown_by

Run = Callable[..., Any]


def test_what_is_being_done_is_told_to_whoever_listens() -> None:
    told: list[Any] = []
    activity("nobody listens")
    with shown_by(lambda *now: told.append(now)):
        activity("planning", 1, 3, "w")
    activity("nobody listens")
    assert told == [("planning", 1, 3, "w")]
    assert shown.activity_text(*told[0]) == "planning: 1 of 3, w"
    assert shown.activity_text("verify", 0, 0, "") == "verify"


def test_a_long_step_is_shown_while_it_lasts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shown, "_PAUSE", 0.02)
    with shown._lines("encoding", "") as show:
        activity("preparing the graph", item="fold-linear-chains")
        time.sleep(0.2)
        show(500, 2000, "w")
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert "now: preparing the graph: fold-linear-chains" in lines
    assert "encoding: 500 B of 2.00 KB, w" in lines


@pytest.mark.parametrize("data", [False, True])
def test_every_stage_of_a_run_is_shown(
    data: bool, onnxcomp: Run, small_model: Path, tmp_path: Path
) -> None:
    import onnxcomp as oc

    told: set[str] = set()
    options = {"ratio": 5.0, "prune_ratio": 0.1}
    if data:
        import numpy as np

        ids = np.random.default_rng(0).integers(0, 500, (8, 12))
        np.savez(tmp_path / "ids.npz", ids=ids)
        options |= {"data": tmp_path / "ids.npz"}
    with shown_by(lambda what, *_: told.add(what)):
        oc.optimize(small_model, tmp_path / "out.onnx", external_data="always", **options)
    wanted = {"load", "plan", "preparing the graph", "looking for constants", "planning", "encode",
              "write", "writing", "verify", "verifying"}  # fmt: skip
    assert wanted | ({"running the model"} if data else set()) <= told
    assert all(re.fullmatch("[a-z ]+", what) for what in told)
