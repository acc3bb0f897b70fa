"""The wheels: joining libraries of macOS, and what packaging/build_wheels.py made, where it ran."""

from __future__ import annotations

import importlib.util
import os
import re
import struct
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from onnxcomp import ops
from onnxcomp.errors import RuntimeMissingError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "packaging"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def universal(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.delitem(sys.modules, "universal", raising=False)
    return load("universal")


def library(processor: int, size: int) -> bytes:
    return struct.pack("<III", 0xFEEDFACF, processor, 3) + bytes(range(256)) * (size // 256)


INTEL, ARM = 0x01000007, 0x0100000C


def test_a_universal_library_holds_both_at_whole_pages(universal: ModuleType) -> None:
    parts = [library(INTEL, 5120), library(ARM, 40960)]
    joined = universal.join_libraries(*parts)
    magic, count = struct.unpack_from(">II", joined)
    assert (magic, count) == (0xCAFEBABE, 2)
    for i, (part, processor) in enumerate(zip(parts, (INTEL, ARM), strict=True)):
        kind, variant, place, size, bits = struct.unpack_from(">IIIII", joined, 8 + 20 * i)
        assert (kind, variant, bits, place % (1 << bits)) == (processor, 3, 14, 0)
        assert joined[place : place + size] == part
    with pytest.raises(ValueError, match="two libraries are for the processor"):
        universal.join_libraries(parts[0], parts[0])
    with pytest.raises(ValueError, match="magic number"):
        universal.join_libraries(joined)


def wheel(path: Path, code: bytes, processor: int) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("p/__init__.py", code)
        archive.writestr("p/lib.dylib", library(processor, 512))
        archive.writestr("p-1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-x\n")
        archive.writestr("p-1.dist-info/RECORD", "")
    return path


def test_wheels_of_two_processors_become_one(universal: ModuleType, tmp_path: Path) -> None:
    one = wheel(tmp_path / "p-1-py3-none-a.whl", b"x = 1\n", INTEL)
    two = wheel(tmp_path / "p-1-py3-none-b.whl", b"x = 1\n", ARM)
    made = universal.join_wheels(one, two, "macosx_11_0_universal2", tmp_path / "out")
    assert made.name == "p-1-py3-none-macosx_11_0_universal2.whl"
    with zipfile.ZipFile(made) as archive:
        assert archive.testzip() is None
        assert archive.read("p/lib.dylib")[:4] == bytes.fromhex("cafebabe")
        assert b"Tag: py3-none-macosx_11_0_universal2\n" in archive.read("p-1.dist-info/WHEEL")
        record = archive.read("p-1.dist-info/RECORD").decode()
        assert {line.split(",")[0] for line in record.splitlines()} == set(archive.namelist())
    other = wheel(tmp_path / "p-1-py3-none-c.whl", b"x = 2\n", ARM)
    with pytest.raises(ValueError, match=r"differ in p/__init__\.py"):
        universal.join_wheels(one, other, "macosx_11_0_universal2", tmp_path / "out")


def test_all_packages_have_one_version_and_the_extra_names_it() -> None:
    found = {
        re.search(r'^version = "(.+?)"', path.read_text(), re.MULTILINE)[1]
        for path in (ROOT / "pyproject.toml", *FOLDER.glob("*/pyproject.toml"))
    }
    (version,) = found
    assert f'"onnxcomp-cuda=={version}"' in (ROOT / "pyproject.toml").read_text()


def test_the_library_of_the_cuda_package_is_taken_where_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONNXCOMP_OPS_LIBRARY", raising=False)
    package = tmp_path / "onnxcomp_cuda"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / ops._FILE).touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert ops._cuda_library() is None  # a folder, not an installed package
    info = tmp_path / "onnxcomp_cuda-0.dist-info"
    info.mkdir()
    text = "Metadata-Version: 2.1\nName: onnxcomp-cuda\nVersion: {}\n"
    (info / "METADATA").write_text(text.format(ops.__version__))
    assert ops.library_path() == package / ops._FILE
    (info / "METADATA").write_text(text.format("0.0.1"))
    with pytest.raises(RuntimeMissingError, match=r"onnxcomp-cuda 0\.0\.1 does not fit"):
        ops.library_path()


def test_the_release_builds_every_package_on_every_system() -> None:
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    matrix = flow["jobs"]["onnxcomp"]["strategy"]["matrix"]
    kinds = {name.split("-")[0] for name in matrix["system"]}
    assert kinds == {"ubuntu", "windows", "macos"}
    assert all((ROOT / name / "pyproject.toml").is_file() for name in matrix["project"])
    assert set(flow["jobs"]["publish"]["needs"]) == {"onnxcomp", "sdist", "cuda"}


def test_what_the_release_names_is_in_the_repository() -> None:
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text())
    steps = [step for job in flow["jobs"].values() for step in job["steps"]]
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"build", "dist"}
    words = {word for step in steps for word in step.get("run", "").split()}
    named = {word for word in words if word.split("/")[0] in folders}
    assert named == {"packaging/onnxcomp-cuda"}
    assert all((ROOT / word).exists() for word in named)
    for project in flow["jobs"]["onnxcomp"]["strategy"]["matrix"]["project"]:
        text = (ROOT / project / "pyproject.toml").read_text()
        assert "[tool.cibuildwheel" in text and "test-command" in text
    # Wheels are put where the steps after look for them.
    uploads = [step["with"]["path"] for step in steps if "upload-artifact" in step.get("uses", "")]
    assert sorted(uploads) == ["dist/*.tar.gz", "wheelhouse/*.whl", "wheelhouse/*.whl"]


# What packaging/build_wheels.py wrote.

LIBRARIES = {
    "manylinux": ("lib{}.so", b"\x7fELF"),
    "macosx": ("lib{}.dylib", bytes.fromhex("cafebabe")),
    "win": ("{}.dll", b"MZ"),
}


def wheels() -> list[Path]:
    folder = os.environ.get("ONNXCOMP_WHEELS")
    return sorted(Path(folder).glob("onnxcomp-*.whl")) if folder else []


@pytest.mark.skipif(not wheels(), reason="set ONNXCOMP_WHEELS to where build_wheels.py wrote")
def test_each_wheel_holds_the_libraries_of_its_system_alone() -> None:
    for path in wheels():
        system = re.match(r"[a-z]+", path.stem.split("-")[-1])
        assert system is not None
        pattern, magic = LIBRARIES[system[0]]
        with zipfile.ZipFile(path) as archive:
            found = [n for n in archive.namelist() if n.endswith((".so", ".dylib", ".dll"))]
            assert [Path(name).name for name in sorted(found)] == [
                pattern.format("onnxcomp_ops"),
                pattern.format("onnxcomp_encoders"),
            ]
            for name in found:
                content = archive.read(name)
                assert content.startswith(magic)
                assert b"onnxcomp_cuda_architectures" not in content
        twin = path.with_name(path.name.replace("onnxcomp-", "onnxruntime_ep_onnxcomp-"))
        with zipfile.ZipFile(path) as one, zipfile.ZipFile(twin) as other:
            name = pattern.format("onnxcomp_ops")
            plugin = other.read(f"onnxruntime_ep_onnxcomp/{name}")
            assert one.read(f"onnxcomp/ops/{name}") == plugin
            assert not [name for name in other.namelist() if name.startswith("onnxcomp/")]
