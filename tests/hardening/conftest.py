"""Small models, commands in processes of their own, and folders compared before and after."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

from onnxcomp.cli import main

Array = np.ndarray[Any, Any]


# What lines of progress begin with, on slow machines.
PROGRESS = ("encoding: ", "now: ")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command said.

    Attributes:
        code: Its exit code.
        out: Its stdout.
        err: Its stderr.
    """

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Lines of stderr that are neither progress nor empty."""
        lines = self.err.splitlines()
        return [line for line in lines if line.strip() and not line.startswith(PROGRESS)]

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def refused(self, code: int) -> str:
        """The error line of a command that had to fail with this exit code, and nothing else."""
        assert self.code == code, (self.code, self.out, self.err)
        assert "Traceback" not in self.err
        lines = [line for line in self.lines if not line.startswith("hint: ")]
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        assert len(self.lines) == 2, f"no hint: {self.err}"
        return lines[0]


@pytest.fixture
def onnxcomp() -> Callable[..., Answer]:
    """Run a command inside this process."""

    def run(*words: object) -> Answer:
        result = CliRunner().invoke(main, [str(word) for word in words])
        return Answer(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def command() -> Callable[..., Any]:
    """Start a command in a process of its own: `subprocess.Popen` with text pipes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def start(*words: object, **options: Any) -> subprocess.Popen[str]:
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        line = [sys.executable, "-m", "onnxcomp", *map(str, words)]
        return subprocess.Popen(line, text=True, env=environment, **options)

    return start


@pytest.fixture(scope="session")
def spawn(command: Callable[..., Any]) -> Callable[..., Answer]:
    """Run a command in a process of its own."""

    def run(*words: object, **options: Any) -> Answer:
        process = command(*words, **options)
        out, err = process.communicate(timeout=120)
        return Answer(process.returncode, out or "", err or "")

    return run


def two_products(
    first: Array | None = None, *, opset: int | None = 17, ir_version: int = 8, seed: int = 0
) -> onnx.ModelProto:
    """``y = relu(x @ w) @ v`` with w (64, 256) and v (256, 64)."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((64, 256)).astype(np.float32) if first is None else first
    v = rng.standard_normal((256, 64)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
            helper.make_node("Relu", ["h"], ["r"], "between"),
            helper.make_node("MatMul", ["r", "v"], ["y"], "second"),
        ],
        "products",
        [helper.make_tensor_value_info("x", 1, ["n", w.shape[0]])],
        [helper.make_tensor_value_info("y", 1, ["n", 64])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(v, "v")],
    )
    imports = [] if opset is None else [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def contents(folder: Path) -> Mapping[str, str]:
    """Every file, link and folder below a folder, with a hash of what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        is_file = path.is_file() and not path.is_symlink()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if is_file else ""
        found[str(path.relative_to(folder))] = digest
    return found


class Tools:
    """Functions of this file, for tests that cannot import it."""

    two_products = staticmethod(two_products)
    contents = staticmethod(contents)

    @staticmethod
    def save(folder: Path, model: onnx.ModelProto | bytes, *, external: bool = False) -> Path:
        """Write ``model.onnx`` (and ``model.data``) into a new folder."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "model.onnx"
        if isinstance(model, bytes):
            path.write_bytes(model)
        elif external:
            options: dict[str, Any] = {"location": "model.data", "size_threshold": 0}
            onnx.save(model, path, save_as_external_data=True, **options)
        else:
            path.write_bytes(model.SerializeToString())
        return path


@pytest.fixture(scope="session")
def tools() -> Any:
    return Tools


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is compressed in a moment."""
    return Tools.save(tmp_path_factory.mktemp("small"), two_products())


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with external data that takes seconds to compress."""
    rng = np.random.default_rng(5)
    weights = [rng.standard_normal((1024, 1024)).astype(np.float32) for _ in range(6)]
    nodes = [
        helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(len(weights))
    ]
    graph = helper.make_graph(
        nodes,
        "slow",
        [helper.make_tensor_value_info("x0", 1, ["n", 1024])],
        [helper.make_tensor_value_info(f"x{len(weights)}", 1, ["n", 1024])],
        [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return Tools.save(tmp_path_factory.mktemp("slow"), model, external=True)
