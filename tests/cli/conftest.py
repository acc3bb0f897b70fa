"""Running commands inside the test process, and models to run them on."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from onnxcomp.cli import main


@dataclasses.dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        return json.loads(self.out)

    @property
    def verdict(self) -> str:
        return self.out.splitlines()[-1]


@pytest.fixture
def onnxcomp() -> Callable[..., Answer]:
    def run(*words: object) -> Answer:
        result = CliRunner().invoke(main, [str(word) for word in words])
        return Answer(result.exit_code, result.stdout, result.stderr)

    return run


@dataclasses.dataclass(frozen=True)
class Application:
    """A script, and how to start it below a command of ours.

    Attributes:
        path: The script.
        folder: Where it is started.
    """

    path: Path
    folder: Path

    def command(self, *words: object, by: Sequence[object] = ("exec",)) -> list[str]:
        """Words that start it by a command of ours."""
        return [
            *(sys.executable, "-m", "onnxcomp", *map(str, by), "--"),
            *(sys.executable, str(self.path), *map(str, words)),
        ]

    def __call__(
        self, *words: object, by: Sequence[object] = ("exec",), **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run it."""
        return subprocess.run(
            self.command(*words, by=by), env=self.environment(**variables), cwd=self.folder,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    def environment(self, **variables: str) -> dict[str, str]:
        """Variables with which it finds what the tests find."""
        paths = [variables.pop("PYTHONPATH", ""), *sys.path]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **variables}


@pytest.fixture
def application(tmp_path: Path) -> Callable[[str], Application]:
    """Writes a script."""

    def write(program: str) -> Application:
        path = tmp_path / "application.py"
        path.write_text(textwrap.dedent(program))
        return Application(path, tmp_path)

    return write


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer perceptron on token embeddings; 0.3 MB, compiled in a moment."""
    import numpy as np

    rng = np.random.default_rng(7)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 8, name)

    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["x"], "look_up"),
            helper.make_node("MatMul", ["x", "up"], ["h"], "first"),
            helper.make_node("Relu", ["h"], ["r"], "relu"),
            helper.make_node("MatMul", ["r", "down"], ["y"], "second"),
        ],
        "perceptron",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "length", 64])],
        [weight("table", 500, 64), weight("up", 64, 256), weight("down", 256, 64)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path_factory.mktemp("models") / "perceptron.onnx"
    onnx.save(model, path)
    return path
