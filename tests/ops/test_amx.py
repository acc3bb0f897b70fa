"""The kernels for tile units, on a model of the units: no machine of the project has them."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build_folder(fresh: Path) -> Path:
    """The folder that built this tree's wheel, whose objects serve here too, or a new one."""
    for cache in sorted((ROOT / "build").glob("*/CMakeCache.txt")):
        if f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" in cache.read_text():
            return cache.parent
    options = ["-DONNXCOMP_CUDA=OFF", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
    done = subprocess.run(
        ["cmake", "-S", str(ROOT), "-B", str(fresh), *options],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return fresh


@pytest.fixture(scope="module")
def conformance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that compares kernels."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("tile units are asked for on Linux on x86-64 only")
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    if "avx512_vnni" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("weights are decoded with AVX-512, which this machine has not")
    folder = build_folder(tmp_path_factory.mktemp("amx"))
    done = subprocess.run(
        ["cmake", "--build", str(folder), "--target", "onnxcomp_conformance", "-j2"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "ops" / "onnxcomp_conformance"


def test_products_on_tile_units_equal_plain_ones_bit_by_bit(conformance: Path) -> None:
    command = [str(conformance), "amx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    name, cases = done.stdout.split(": ")
    assert name == "amx"
    assert int(cases.split()[0]) > 300
