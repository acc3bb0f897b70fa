"""`onnxcomp doctor` prints findings, and exits 6 when something is missing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def test_findings_for_people_and_machines(onnxcomp: Run, small_model: Path) -> None:
    answer = onnxcomp("doctor", small_model)
    assert answer.code == 0, answer.out
    assert any(line.startswith("ok      model loads: in ") for line in answer.out.splitlines())
    document = onnxcomp("doctor", "--json").json
    assert document["ok"]
    assert {"name", "status", "text", "hint", "facts"} == document["findings"][0].keys()


def test_a_missing_library_exits_6(
    onnxcomp: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ONNXCOMP_OPS_LIBRARY", str(tmp_path / "absent.so"))
    answer = onnxcomp("doctor")
    assert answer.code == 6 and "PROBLEM operator library" in answer.out
    assert answer.verdict.startswith("1 problem")


def test_a_file_that_is_no_model_exits_5(onnxcomp: Run, tmp_path: Path) -> None:
    assert onnxcomp("doctor", tmp_path / "absent.onnx").code == 5


def test_ops_info_says_which_gpus_the_library_and_the_machine_have(onnxcomp: Run) -> None:
    answer = onnxcomp("ops", "info")
    assert answer.code == 0 and "cuda_architectures" in answer.out
    document = onnxcomp("ops", "info", "--json").json
    assert isinstance(document["cuda_architectures"], list) and isinstance(document["gpus"], list)
    assert document["cuda_kernels"] is None or "rows" in document["cuda_kernels"]
    assert document["cuda_driver"] is None or isinstance(document["cuda_driver"], str)
