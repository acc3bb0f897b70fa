"""`onnxcomp package` writes folders and says what is in them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.mark.parametrize("kind", ["dir", "triton"])
def test_the_object_is_the_manifest(
    onnxcomp: Run, small_model: Path, tmp_path: Path, kind: str
) -> None:
    compressed = tmp_path / "small.onnx"
    onnxcomp("optimize", small_model, "-o", compressed, "--no-verify")
    answer = onnxcomp("package", kind, compressed, "-o", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    document = answer.json
    assert document["kind"] == kind and document["portable"]
    assert (Path(document["path"]) / document["model"]).is_file()
    assert (Path(document["path"]) / document["library"]).is_file()
    assert "with the operator library (the model runs without it)" in answer.err
    refused = onnxcomp("package", kind, compressed, "-o", tmp_path / "out")
    assert refused.code == 2 and "--force" in refused.err
    again = onnxcomp("package", kind, compressed, "-o", tmp_path / "out", "--force", "--portable")
    assert again.code == 0 and "no operator library" in again.verdict


def test_a_missing_model_is_an_invalid_input(onnxcomp: Run, tmp_path: Path) -> None:
    assert onnxcomp("package", "dir", tmp_path / "m.onnx", "-o", tmp_path / "out").code == 5
    assert not (tmp_path / "out").exists()


def test_an_archive_is_restored(onnxcomp: Run, small_model: Path, tmp_path: Path) -> None:
    target, folder = tmp_path / "m.ocarc", tmp_path / "back"
    answer = onnxcomp("package", "archive", small_model, "-o", target, "--json")
    assert answer.code == 0, answer.err
    document = answer.json
    assert document["kind"] == "archive" and document["bytes"] == target.stat().st_size
    assert document["gain"] == pytest.approx(1 - document["bytes"] / document["model_bytes"])
    assert "% less" in answer.err
    back = onnxcomp("package", "restore", target, "-o", folder)
    assert back.code == 0, back.err
    assert (folder / small_model.name).read_bytes() == small_model.read_bytes()
    target.write_bytes(target.read_bytes()[:-9])
    damaged = onnxcomp("package", "restore", target, "-o", tmp_path / "other")
    assert damaged.code == 5 and "damaged" in damaged.err
