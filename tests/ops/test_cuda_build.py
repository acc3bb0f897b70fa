"""How the CUDA kernels are built, as far as no GPU is needed for it."""

from __future__ import annotations

import importlib
import os
import re
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
    assert report.named(name) == ("hyper k=4 twice, 128 columns", 64)
    loop = report.hot_loop(code)
    assert [report.opcode(text) for text in loop] == ["SHF", "LDS", "BRA", "HMMA", "IMAD", "BRA"]
    assert report.usages(USAGE) == {"_Z4name": (80, 16)}


def test_kernels_are_named_by_what_they_do(report: Any) -> None:
    enter, table = "_ZN8onnxcomp3gpu5EnterINS_5hyper", "9PairTableILNS2_8PairFormE"
    for inside, name, weights in (
        (
            f"7FewRowsINS2_{table}2ELi4ELi7ELi5EEELi20ELi1ELi2ELi2EEEEEvT_",
            "hyper k=4 L=7 int8 pairs x32, few rows, 20 warps, 1 panels, 2 stages",
            128,
        ),
        (
            f"8SomeRowsINS2_{table}0ELi2ELi8ELi5EEELi64ELi3ELi3EEEEEvT_",
            "hyper k=2 L=8 float16 pairs x32, 64 columns, Hopper",
            128,
        ),
        (
            f"11DecodePairsINS2_{table}0ELi4ELi7ELi3EEELi4EEEEEvT_",
            "hyper k=4 L=7 float16 pairs x8, decode, 4 stages",
            64,
        ),
    ):
        assert report.named(enter + inside) == (name, weights)
    assert report.named("_ZN8onnxcomp3gpu5EnterINS0_12PrepareGroupILi16EEEEEvT_") == (
        "PrepareGroup 16 columns",
        0,
    )


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


def test_hopper_kernels_compile_without_warnings(tmp_path: Path) -> None:
    """The library that is built by default has none of them."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    command = [
        *(nvcc, "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a"),
        *("-DONNXCOMP_CUDA_HOPPER", f"-I{ROOT / 'ops'}", "-Xcompiler=-Wall,-Wextra"),
        *("-Werror=all-warnings", "-Xptxas=-v", "-O3", "-c", "-o", str(tmp_path / "hopper.o")),
    ]
    source = str(ROOT / "ops" / "hyper" / "hopper.cu")
    run = subprocess.run([*command, source], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    spills = re.findall(r"(\d+) bytes spill stores", run.stderr)
    assert len(spills) > 30
    assert set(spills) == {"0"}
    assert (
        "serialized" not in run.stderr
    )  # what ptxas says of wgmma that it could not leave running
