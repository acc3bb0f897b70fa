"""SIGINT and SIGTERM at any moment: the right code, no stray files, whole files or none."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def _wait_for(folder: Path, process: subprocess.Popen[str]) -> None:
    """Until the run has begun to work in a folder, or has ended."""
    while process.poll() is None and not list(folder.iterdir()):
        time.sleep(0.005)


@pytest.mark.parametrize("number", CODES)
def test_a_signal_while_weights_are_encoded_ends_the_run_and_cleans_up(
    command: Callable[..., Any], tools: Any, slow: Path, tmp_path: Path, number: signal.Signals
) -> None:
    before = tools.contents(slow.parent)
    words = (
        "optimize",
        slow,
        "-o",
        tmp_path / "out.onnx",
        "--bits",
        6,
        "--external-data",
        "always",
    )
    process = command(*words)
    _wait_for(tmp_path, process)
    time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == CODES[number], (out, err)
    lines = [line for line in err.splitlines() if line and not line.startswith("encoding")]
    assert lines == [f"error: {WORDS[number]}"]
    assert not list(tmp_path.iterdir())
    assert tools.contents(slow.parent) == before


def test_signals_at_random_moments_leave_all_files_or_none(
    command: Callable[..., Any], small: Path, tmp_path: Path
) -> None:
    rng = random.Random(3)
    for attempt in range(4):
        number = rng.choice(list(CODES))
        folder = tmp_path / str(attempt)
        folder.mkdir()
        words = ("optimize", small, "-o", folder / "out.onnx", "--external-data", "always")
        process = command(*words)
        _wait_for(folder, process)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(number)
        if rng.random() < 0.5:  # somebody impatient
            process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert "Traceback" not in err
        files = sorted(path.name for path in folder.iterdir())
        if process.returncode == 0:
            assert files == ["out.onnx", "out.onnx.data"]
        else:
            # A signal after the files were published leaves them: they are whole.
            assert process.returncode in (CODES[number], -number), err
            # A second signal may kill the process while its gates run: the model is kept then.
            unverified = ["out.unverified.onnx", "out.unverified.onnx.data"]
            assert files in ([], ["out.onnx", "out.onnx.data"], unverified)


def test_an_older_output_survives_an_interrupted_run(
    command: Callable[..., Any], tools: Any, slow: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    for name in ("out.onnx", "out.onnx.data"):
        (tmp_path / "out" / name).write_text("an older result")
    before = tools.contents(tmp_path)
    process = command("optimize", slow, "-o", tmp_path / "out" / "out.onnx", "--bits", 6)
    while process.poll() is None and len(list((tmp_path / "out").iterdir())) == 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert tools.contents(tmp_path) == before


def test_uninterrupted_blocks_are_finished_first() -> None:
    from onnxcomp.passes.ir.atomic import uninterrupted

    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("the rest of the block")
    assert done == ["the rest of the block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", CODES)
def test_a_signal_where_errors_are_dropped_comes_again(number: signal.Signals) -> None:
    from onnxcomp.cli.app import Interruption, interruptions

    class Forgotten:
        def __del__(self) -> None:
            signal.raise_signal(number)
            done.append("not reached")

    done: list[str] = []
    before = sys.unraisablehook
    with pytest.raises(Interruption) as caught, interruptions():
        found = Forgotten()
        del found
        done.append("behind it")
        time.sleep(20)
    assert caught.value.number == number and done == ["behind it"]
    assert sys.unraisablehook is before


def test_other_errors_that_are_dropped_are_told() -> None:
    from onnxcomp.cli.app import interruptions

    class Forgotten:
        def __del__(self) -> None:
            raise ValueError("nobody sees it")

    found: list[Any] = []
    with mock.patch.object(sys, "unraisablehook", found.append), interruptions():
        Forgotten()
    assert [lost.exc_value.args for lost in found] == [("nobody sees it",)]
