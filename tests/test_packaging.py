"""What an installed package and its archives hold."""

import os
import re
import tarfile
import zipfile
from importlib import metadata, resources
from pathlib import Path

import pytest

LIBRARIES = (
    "onnxcomp/ops/libonnxcomp_ops.so",
    "onnxcomp/passes/codecs/hyper/libonnxcomp_encoders.so",
)
MODEL = "onnxcomp/models/character_kinds"


@pytest.fixture(scope="module")
def dist() -> Path:
    """The folder where .ci/run built a wheel and a source distribution from a copy of the tree."""
    folder = os.environ.get("ONNXCOMP_DIST")
    if not folder:
        pytest.skip("no archives: set ONNXCOMP_DIST to a folder with a wheel and an sdist")
    return Path(folder)


def installed_files() -> list[str]:
    try:
        files = metadata.files("onnxcomp")
    except metadata.PackageNotFoundError:
        pytest.skip("onnxcomp is on the path, not installed")
    names = [str(file) for file in files or ()]
    if not any(name.startswith("onnxcomp/cli/") for name in names):
        pytest.skip("onnxcomp is installed in editable mode")
    return names


def check_contents(names: list[str]) -> None:
    for wanted in (
        *LIBRARIES,
        "onnxcomp/py.typed",
        "onnxcomp/errors.py",
        "onnxcomp/runtime/clients/start/sitecustomize.py",
        "onnxcomp/runtime/package/templates/run.py",
        "onnxcomp/runtime/package/templates/triton.md",
        "onnxcomp/passes/latency/tables/avx2.json",
        "onnxcomp/passes/report/page/page.html",
        "onnxcomp/passes/report/page/page.css",
        "onnxcomp/passes/report/page/page.js",
        f"{MODEL}/model.onnx",
        f"{MODEL}/held_out.npz",
        f"{MODEL}/LICENSE-UNICODE",
    ):
        assert wanted in names
    assert not [name for name in names if name.endswith((".cc", ".h", ".cu", "CMakeLists.txt"))]


def test_the_installation_holds_libraries_and_model_and_no_native_source() -> None:
    check_contents(installed_files())


def test_the_wheel_holds_libraries_and_model_and_no_native_source(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        check_contents(archive.namelist())


def test_one_wheel_serves_every_python(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    assert re.fullmatch(r"onnxcomp-[\w.]+-py3-none-(linux|manylinux)\w+\.whl", wheel.name)


def test_the_source_distribution_holds_sources_and_links_resolved(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    for name in ("CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md", "ops/registry.cc"):
        assert members[name].isreg()
    # Whoever unpacks it without symbolic links still gets a package.
    assert members["src/onnxcomp/ops/registry.cc"].isreg()
    assert not [name for name in members if name.endswith((".so", ".pyc"))]


def test_typed_marker_and_model_are_found_as_resources() -> None:
    package = resources.files("onnxcomp")
    assert package.joinpath("py.typed").is_file()
    model = package / "models" / "character_kinds" / "model.onnx"
    assert 500_000 < len(model.read_bytes()) <= 2_000_000
