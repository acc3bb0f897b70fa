"""A finished model outlives gates that do not finish."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxcomp as oc
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.ir.model import load, save
from onnxcomp.passes.ir.unverified import kept_unverified
from onnxcomp.runtime.evaluate import run_model


def test_a_run_that_is_killed_in_its_gates_leaves_the_model(
    command: Callable[..., Any], slow: Path, tmp_path: Path
) -> None:
    folder, marker, score = tmp_path / "out", tmp_path / "marker", tmp_path / "score.py"
    folder.mkdir()
    score.write_text(
        "import time\n\n\ndef slow(_):\n"
        f"    open({str(marker)!r}, 'w').close()\n    time.sleep(120)\n    return 1.0\n"
    )
    output = folder / "out.onnx"
    words = ("optimize", slow, "-o", output, "--bits", 3, "--external-data", "always")
    process = command(*words, "--no-verify", "--eval", f"{score}:slow")
    while process.poll() is None and not marker.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    kept = folder / "out.unverified.onnx"
    assert kept.exists() and not output.exists()
    assert (folder / "out.unverified.onnx.data").exists()

    oc.optimize(slow, output, bits=3, verify=False, external_data="always")
    feeds = [{"x0": np.random.default_rng(0).standard_normal((2, 1024)).astype(np.float32)}]
    (first,), (second,) = run_model(kept, feeds), run_model(output, feeds)
    np.testing.assert_array_equal(first["x6"], second["x6"])
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert not hidden, "the workspace of the killed run is left"


@pytest.mark.parametrize("external", ["always", "never"])
@pytest.mark.parametrize(
    ("error", "stays"),
    [(ModelError("no memory"), True), (MemoryError(), True), (UsageError("no rows"), False),
     (KeyboardInterrupt(), False), (None, False)],
)  # fmt: skip
def test_what_ends_the_gates_decides_what_stays(
    slow: Path, tmp_path: Path, error: BaseException | None, stays: bool, external: Any
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    files = save(load(slow), work / "small.onnx", external_data=external).files
    earlier = tmp_path / "small.unverified.onnx"
    earlier.write_bytes(b"of an earlier run")
    kept = tmp_path / "small.unverified-2.onnx"
    seen = False
    try:
        with kept_unverified(files, tmp_path / "small.onnx") as model:
            seen = model == kept
            onnx.checker.check_model(str(model))
            if error is not None:
                raise error
    except BaseException as raised:  # as it was raised
        assert raised is error
    assert seen
    assert earlier.read_bytes() == b"of an earlier run"
    assert kept.exists() == stays
    assert kept.with_name(f"{kept.name}.data").exists() == (stays and len(files) > 1)
    assert files[-1].exists() != stays


def test_two_runs_with_one_output_do_not_take_each_others_model(slow: Path, tmp_path: Path) -> None:
    output = tmp_path / f"{'o' * 240}.onnx"  # with a mark it would be too long
    files = []
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        files.append(save(load(slow), tmp_path / str(number) / output.name).files)
    with kept_unverified(files[0], output) as first, kept_unverified(files[1], output) as second:
        assert first != second
        assert first.exists() and second.exists()
    assert all(file.exists() for pair in files for file in pair)
    assert not list(tmp_path.glob("*unverified*"))
