"""How the CUDA kernels are built, as far as no GPU is needed for it."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LISTING = """
Function : _ZN8onnxcomp3gpu5EnterINS0_12TiledProductINS_5hyper6SourceILi4ELi32ELNS3_6LookupE0EEELi16EEEEEvT_
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDS R29, [R29] ;
        /*0020*/                   SHF.R.W.U32 R10, R35, 0xc, R42 ;
        /*0030*/                   LDS.128 R4, [R2] ;
        /*0040*/               @P0 BRA 0x30 ;
        /*0050*/                   HMMA.16816.F32 R28, R28, R16, RZ ;
        /*0060*/              @!P1 IMAD.IADD R5, R40, 0x1, R5 ;
        /*0070*/               @P0 BRA 0x20 ;
        /*0080*/               @P0 BRA 0x10 ;
        /*0090*/                   EXIT ;
"""  # noqa: E501
USAGE = """
 Function _Z4name:
  REG:80 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:744 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_report")


def test_the_hot_loop_is_the_innermost_one_with_a_product(report: Any) -> None:
    ((name, code),) = report.listings(LISTING)
    assert report.readable(name) == "hyper k=4 twice, 128 columns"
    loop = report.hot_loop(code)
    assert [report.opcode(text) for text in loop] == ["SHF", "LDS", "BRA", "HMMA", "IMAD", "BRA"]
    assert report.usages(USAGE) == {"_Z4name": (80, 16)}


def test_a_missing_disassembler_exits_6(
    report: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        report.report(tmp_path / "library.so")
    assert caught.value.code == 6
    assert "cuobjdump and nvdisasm are needed" in capsys.readouterr().err


def configure(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    return subprocess.run(
        [cmake, "-S", str(ROOT), "-B", str(folder), *options],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDACXX": "/bin/false"},
        check=False,
    )


def test_a_broken_nvcc_leaves_a_library_for_cpus(tmp_path: Path) -> None:
    run = configure(tmp_path / "auto")
    assert run.returncode == 0, run.stderr
    assert "CUDA kernels: none" in run.stdout
    assert configure(tmp_path / "on", "-DONNXCOMP_CUDA=ON").returncode != 0


def test_the_header_is_c(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("needs a C compiler")
    header = ROOT / "ops" / "gpu" / "onnxcomp_cuda.h"
    command = [compiler, "-x", "c", "-std=c99", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    run = subprocess.run([*command, str(header)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_a_library_with_cuda_kernels_needs_no_cuda_to_load(library: Path) -> None:
    from onnxcomp.ops import cuda_architectures

    ldd = shutil.which("ldd")
    if ldd is None or not cuda_architectures():
        pytest.skip("needs ldd and a library with CUDA kernels")
    needed = subprocess.run([ldd, str(library)], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed and "libnv" not in needed
