"""A package of somebody else adds a codec and a pass, and both run by name."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from onnxcomp import plugins
from onnxcomp.errors import UsageError
from onnxcomp.passes.transforms import registry
from onnxcomp.passes.transforms.pass_manager import GraphPass

TINY = Path(__file__).parent / "plugins" / "tiny"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the package is installed."""
    folder = tmp_path_factory.mktemp("site")
    source = folder / "source"
    shutil.copytree(TINY, source, ignore=shutil.ignore_patterns("__pycache__"))
    target = folder / "installed"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command += ["--no-build-isolation", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--target", str(target), str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return target


def onnxcomp(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line, with the package installed."""
    path = os.pathsep.join([str(site), *sys.path])
    return subprocess.run(
        [sys.executable, "-m", "onnxcomp", *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def test_codec_and_pass_of_another_package_run_by_name(
    site: Path, demo_model_path: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small.onnx"
    done = onnxcomp(
        site, "optimize", str(demo_model_path), "-o", str(small), "-m", "tinycodec", "-v", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert "tinypass: 1 changes" in done.stderr
    report = json.loads(done.stdout)
    codecs = {site["method"] for site in report["sites"]} - {"dense"}
    assert codecs == {"tinycodec"}
    assert report["ratio"] > 3
    assert report["verify"]["passed"]
    model = onnx.load(small)
    assert {entry.key: entry.value for entry in model.metadata_props}["tinypass"] == "was here"


def test_a_pass_runs_only_where_it_is_wanted(
    site: Path, demo_model_path: Path, tmp_path: Path
) -> None:
    done = onnxcomp(
        site, "optimize", str(demo_model_path), "-o", str(tmp_path / "small.onnx"), "-v"
    )
    assert done.returncode == 0, done.stderr
    assert "canonicalize: " in done.stderr and "tinypass" not in done.stderr


def test_codecs_lists_it(site: Path) -> None:
    done = onnxcomp(site, "codecs")
    assert done.returncode == 0, done.stderr
    assert "tinycodec" in done.stdout and "one byte for each weight" in done.stdout


class Late(GraphPass):
    """Runs behind a pass of another package."""

    name = "late"
    requires = ("early", "canonicalize")


class Early(GraphPass):
    name = "early"


class Broken(GraphPass):
    name = "broken"

    def __init__(self) -> None:
        raise RuntimeError("out of order")


class Lost(GraphPass):
    name = "lost"
    requires = ("nowhere",)


class Boasting(GraphPass):
    name = "boasting"
    ensures = ("peace",)


class Taken(GraphPass):
    name = "prune"


class Empty:
    """No pass."""


def point(name: str, value: str = "") -> metadata.EntryPoint:
    return metadata.EntryPoint(name, f"{__name__}:{value or name.title()}", registry.GROUP)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Let entry points exist."""

    def put(*points: metadata.EntryPoint) -> None:
        monkeypatch.setattr(metadata, "entry_points", lambda group: points)
        monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(**globals()))
        registry.graph_passes.cache_clear()

    yield put
    registry.graph_passes.cache_clear()


def names() -> list[str]:
    return [graph_pass.name for graph_pass in registry.graph_passes()]


OURS = [graph_pass.name for graph_pass in registry.GRAPH_PASSES]


def test_passes_run_right_behind_what_they_require(install) -> None:
    install(point("late"), point("early"))
    place = OURS.index("canonicalize") + 1
    assert names() == ["early", *OURS[:place], "late", *OURS[place:]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", "does not load: RuntimeError: out of order"),
        ("absent", "does not load: AttributeError"),
        ("lost", "requires 'nowhere', which there is not"),
        ("boasting", "ensures 'peace', which is no predicate"),
        ("prune", "has a pass named 'prune', which is taken"),
    ],
)
def test_a_pass_that_cannot_run_is_warned_of_and_left_out(install, caplog, name, message) -> None:
    install(point(name, {"prune": "Taken"}.get(name, "")), point("early"))
    with caplog.at_level(logging.WARNING):
        assert names() == ["early", *OURS]
    assert [message in record.getMessage() for record in caplog.records] == [True]


def test_what_is_no_pass_or_has_another_name_is_refused(install) -> None:
    install()
    with pytest.raises(UsageError, match="has no ensures, functions, name, requires, run"):
        plugins.load(point("empty"), "pass", plugins.members(GraphPass))
    with pytest.raises(UsageError, match=r"the entry point 'early' of .* is the pass 'late'"):
        plugins.load(point("early", "Late"), "pass", ("name",))
