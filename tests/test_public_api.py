"""The names users import, and what importing them costs."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import onnxcomp

ROOT = Path(__file__).parents[1]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_public_name_can_be_imported() -> None:
    for name in onnxcomp.__all__:
        assert getattr(onnxcomp, name) is not None
        assert name in dir(onnxcomp)


def test_every_public_name_is_documented() -> None:
    for name in onnxcomp.__all__:
        if name != "__version__":
            assert getattr(onnxcomp, name).__doc__, name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'optimise'"):
        _ = onnxcomp.optimise  # type: ignore[attr-defined]


def test_the_version_is_that_of_the_package() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"$', text, re.MULTILINE)
    assert found is not None
    assert onnxcomp.__version__ == found[1]


def test_importing_the_package_is_cheap() -> None:
    loaded = run(
        """
        import sys, time
        start = time.thread_time()
        import onnxcomp
        spent = time.thread_time() - start
        heavy = {"numpy", "onnx", "onnx_ir", "onnxruntime", "torch", "rich", "click"}
        print(sorted(heavy & sys.modules.keys()), spent < 0.05)
        """
    )
    assert loaded == "[] True"


def test_planning_needs_no_runtime_and_no_framework() -> None:
    loaded = run(
        """
        import sys
        import onnxcomp
        onnxcomp.plan
        print(sorted({"onnxruntime", "torch", "rich", "click"} & sys.modules.keys()))
        """
    )
    assert loaded == "[]"
