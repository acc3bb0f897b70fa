"""What the command line reads and writes: pipes, links, closed streams, other locales."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

K = 64


@pytest.fixture
def model(tmp_path: Path) -> Path:
    weight = np.random.default_rng(0).standard_normal((K, K)).astype(np.float32) / 8
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "Wä"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", K])],
        [numpy_helper.from_array(weight, "Wä")],
    )
    imports = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def shell(line: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line of shell in which ``onnxcomp`` is the command of this tree."""
    line = line.replace("onnxcomp ", f"{sys.executable} -m onnxcomp ")
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "link to a file", "dangling link"])
@pytest.mark.parametrize("verb", ["optimize", "expand"])
def test_only_regular_files_are_replaced(model: Path, verb: str, kind: str) -> None:
    output = model.with_name("out.onnx")
    target = model.with_name("target")
    if kind == "link to a file":
        target.write_text("old")
    elif kind == "link to a pipe":
        os.mkfifo(target)
    if kind == "pipe":
        os.mkfifo(output)
    else:
        output.symlink_to(target.name)
    before = os.lstat(output)
    done = shell(f"onnxcomp {verb} m.onnx -o out.onnx", model.parent)
    assert done.returncode == 2, done.stderr
    assert "link to" in done.stderr or "no regular file" in done.stderr
    after = os.lstat(output)
    assert (before.st_mode, before.st_ino) == (after.st_mode, after.st_ino)
    assert kind != "link to a file" or target.read_text() == "old"


@pytest.mark.parametrize(
    "words", ["plan m.onnx -o", "optimize m.onnx -o o.onnx --report", "config init -o"]
)
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "missing folder"])
def test_pages_and_plans_are_not_written_into_pipes(model: Path, words: str, kind: str) -> None:
    os.mkfifo(model.with_name("pipe"))
    model.with_name("link").symlink_to("pipe")
    output = {"pipe": "pipe", "link to a pipe": "link", "missing folder": "none/out"}[kind]
    done = shell(f"onnxcomp {words} {output}", model.parent)
    assert done.returncode == 2, done.stderr
    assert not model.with_name("o.onnx").exists()


def test_a_model_from_a_pipe_says_what_to_do(model: Path) -> None:
    done = shell("cat m.onnx | onnxcomp inspect /dev/stdin", model.parent)
    assert done.returncode == 5
    assert "from a pipe" in done.stderr


@pytest.mark.parametrize(
    "line", ["inspect m.onnx", "optimize m.onnx -o o.onnx --min-size 0 --json"]
)
def test_a_closed_stdout_is_no_error(model: Path, line: str) -> None:
    done = shell(f"onnxcomp {line} >&-", model.parent)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    before = model.read_bytes()
    shell(f"onnxcomp {line} >&- 2>&- <&-", model.parent)
    assert model.read_bytes() == before


def test_a_reader_that_goes_away_is_no_traceback(model: Path) -> None:
    done = shell("onnxcomp codecs | true; echo ${PIPESTATUS[0]}", model.parent)
    assert done.stdout.strip() in ("0", "141")
    assert not done.stderr


@pytest.mark.parametrize("json_option", ["", "--json"])
def test_other_locales_print_what_they_can(model: Path, json_option: str) -> None:
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    line = f"onnxcomp inspect m.onnx {json_option}"
    done = shell(line, model.parent, **variables, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    if json_option:
        assert json.loads(done.stdout)
    else:
        assert "W\\xe4" in done.stdout


@pytest.mark.parametrize("shape", [(0, K), (0, 3, K), (2, 0, K)])
def test_data_without_rows_is_refused(model: Path, shape: tuple[int, ...]) -> None:
    np.save(model.with_name("x.npy"), np.zeros(shape, np.float32))
    done = shell("onnxcomp optimize m.onnx -o o.onnx --min-size 0 --data x=x.npy", model.parent)
    assert done.returncode == 2, done.stderr
    assert not model.with_name("o.onnx").exists()


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_empty_files_are_no_data(model: Path, name: str) -> None:
    model.with_name(name).write_bytes(b"")
    data = f"x={name}" if name.endswith("npy") else name
    done = shell(f"onnxcomp verify m.onnx m.onnx --data {data}", model.parent)
    assert done.returncode == 2 and "cannot read" in done.stderr


def test_shapes_without_rows_are_refused(model: Path) -> None:
    done = shell("onnxcomp optimize m.onnx -o o.onnx --min-size 0 --shape x:0,64", model.parent)
    assert done.returncode == 2 and "empty outputs" in done.stderr
    assert not model.with_name("o.onnx").exists()


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1", "soon"])
def test_times_are_finite_and_positive(model: Path, seconds: str) -> None:
    done = shell(f"onnxcomp bench m.onnx --seconds {seconds}", model.parent)
    assert done.returncode == 2, done.stderr
    assert "--seconds" in done.stderr


def test_the_verdict_says_what_was_judged(model: Path) -> None:
    run = "onnxcomp optimize m.onnx -o o.onnx --min-size 0"
    assert "runs; loss not judged (inputs made up)" in shell(run, model.parent).stdout
    assert shell(f"{run} --tolerance 0.5", model.parent).stdout.strip().endswith("verified")
    again = shell("onnxcomp optimize o.onnx -o p.onnx --min-size 0", model.parent).stdout
    assert "already compressed" in again.splitlines()[-1]
    missed = shell(f"{run} --target-size 300", model.parent)
    assert missed.returncode == 3
    assert "target MISSED" in missed.stdout.splitlines()[-1]


def test_bisection_says_what_it_wrote(model: Path) -> None:
    shell("onnxcomp optimize m.onnx -o o.onnx --min-size 0 --bits 2", model.parent)
    line = "onnxcomp verify m.onnx o.onnx --bisect --tolerance 0.05 -o fixed.onnx"
    last = shell(line, model.parent).stdout.splitlines()[-1]
    assert last.startswith("wrote fixed.onnx: ")
    assert last.endswith("1 weight dense again")
