"""The NEON kernels, cross-compiled and run by an emulator: ONNX Runtime itself is not needed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder for 64-bit ARM with the operator library and the conformance program."""
    for tool in (COMPILER, EMULATOR, "cmake", "ninja"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    folder = tmp_path_factory.mktemp("arm")
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_EXE_LINKER_FLAGS": "-static",
        "CMAKE_CXX_FLAGS_RELEASE": "-O2",
        "ONNXCOMP_WERROR": "ON",
    }
    options = [f"-D{name}={value}" for name, value in settings.items()]
    commands = [
        ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *options],
        ["cmake", "--build", str(folder), "--target", "onnxcomp_ops", "onnxcomp_conformance"],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def emulate(build: Path, cpu: str, *names: str) -> subprocess.CompletedProcess[str]:
    """Compare kernels by name on an emulated processor."""
    program = build / "ops" / "onnxcomp_conformance"
    command = [EMULATOR, "-cpu", cpu, str(program), *names]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_neon_kernels_equal_plain_ones_bit_by_bit(build: Path) -> None:
    assert (build / "ops" / "libonnxcomp_ops.so").exists()
    done = emulate(build, "max", "neon", "neondot")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["neon", "neondot"]


def test_processors_without_the_dot_product_do_without_it(build: Path) -> None:
    done = emulate(build, "cortex-a53", "neondot")
    assert (done.returncode, done.stdout) == (1, "neondot: this machine cannot run it\n")
