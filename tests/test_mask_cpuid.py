"""benchmarks/mask_cpuid: programs that see AVX2 only."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
#include <cpuid.h>
#include <stdio.h>
int main(void) {
  unsigned a, b, c, d;
  __cpuid_count(7, 0, a, b, c, d);
  printf("%u %u\\n", b >> 5 & 1, b >> 16 & 1);
  return 0;
}
"""

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not all(map(shutil.which, ("cc", "objdump"))),
    reason="needs x86-64, a C compiler and objdump",
)


@pytest.fixture(scope="module")
def masked() -> ModuleType:
    """The launcher."""
    place = ROOT / "benchmarks" / "mask_cpuid" / "masked.py"
    spec = importlib.util.spec_from_file_location("masked", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that prints whether there is AVX2, and AVX-512."""
    path = tmp_path_factory.mktemp("cpuid") / "program"
    subprocess.run(["cc", "-x", "c", "-", "-o", str(path)], input=PROGRAM, text=True, check=True)
    return path


def answers(program: Path, **environment: str) -> str:
    run = subprocess.run(
        [str(program)], env={**os.environ, **environment}, capture_output=True, text=True
    )
    return run.stdout.strip() if run.returncode == 0 else f"signal {-run.returncode}"


def test_masked_programs_see_avx2_and_no_avx512(
    masked: ModuleType, program: Path, tmp_path: Path
) -> None:
    plain = answers(program)
    patched = Path(shutil.copy(program, tmp_path / "patched"))
    assert masked.patch(patched) >= 1
    assert answers(patched, LD_PRELOAD=str(masked.built_mask())) == f"{plain[0]} 0"
    assert answers(patched) == "signal 4"  # nobody answers


def test_an_invalid_instruction_of_the_program_itself_ends_it(
    masked: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "trap"
    source = "int main(void) { __builtin_trap(); }"
    subprocess.run(["cc", "-x", "c", "-", "-o", str(path)], input=source, text=True, check=True)
    assert answers(path, LD_PRELOAD=str(masked.built_mask())) == "signal 4"


def test_everything_that_has_a_switch_is_switched(
    masked: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(masked, "patched_copy", lambda _: tmp_path)
    found = masked.masked_environment({"PYTHONPATH": "src"})
    assert found["ONNXCOMP_ISA"] == "avx2"
    assert found["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), "src"]
    assert "-AVX512F" in found["GLIBC_TUNABLES"]
