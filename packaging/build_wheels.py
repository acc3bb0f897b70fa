"""Build the wheels of onnxcomp, on a machine that needs no compiler.

    python packaging/build_wheels.py [--target NAME ...] [--outdir dist]

The compiler is zig's, a package of PyPI that makes libraries for every system on any of them. It
and the other tools go into an environment of their own, build/wheels/tools. Targets:

    linux-x86_64, linux-aarch64     manylinux_2_28: glibc 2.28 and newer
    macos                           universal2, macOS 11 and newer
    windows                         64-bit x86
    native                          this machine, by its own compiler
    cuda                            onnxcomp-cuda for this machine, by nvcc and its own compiler

Without --target it is the one of this machine. All but cuda are two wheels with one binary in both:
onnxcomp and the plugin execution provider.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from universal import join_wheels

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "wheels"
PROJECTS = (ROOT, ROOT / "packaging" / "onnxruntime-ep-onnxcomp")
CUDA = (ROOT / "packaging" / "onnxcomp-cuda",)
TOOLS = (
    "build", "scikit-build-core>=1.0", "cmake>=3.24", "ninja", "wheel", "ziglang==0.17.1",
    "auditwheel>=6.4",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Target:
    """What to compile for, and the name of the result.

    Attributes:
        zig: The target in zig's words, with the oldest C library; None for this machine's compiler.
        system: CMake's name of the system.
        processor: CMake's name of the processor.
        tag: Platform tag of the wheel; None for the one that the build chooses.
    """

    zig: str | None = None
    system: str = platform.system()
    processor: str = platform.machine()
    tag: str | None = None

    def definitions(self, tools: Path) -> Iterator[tuple[str, str]]:
        """Definitions for CMake."""
        yield "ONNXCOMP_STATIC_RUNTIME", "ON"
        if self.zig is None:
            return
        folder = write_compiler(tools, self.zig)
        yield "ONNXCOMP_CUDA", "OFF"
        yield "CMAKE_CXX_COMPILER", str(folder / "c++")
        yield "CMAKE_AR", str(folder / "ar")
        yield "CMAKE_RANLIB", str(folder / "ranlib")
        yield "CMAKE_SHARED_LINKER_FLAGS", "-s"
        yield "CMAKE_SYSTEM_NAME", self.system
        yield "CMAKE_SYSTEM_PROCESSOR", self.processor
        if self.system == "Darwin":
            yield "CMAKE_OSX_ARCHITECTURES", self.processor


GLIBC, MACOS = "2.28", "11.0"
LINUX = {
    f"linux-{processor}": Target(
        f"{processor}-linux-gnu.{GLIBC}", "Linux", processor,
        f"manylinux_{GLIBC.replace('.', '_')}_{processor}",
    )
    for processor in ("x86_64", "aarch64")
}  # fmt: skip
# Both processors of macOS are built apart, and joined.
APPLE = tuple(
    Target(f"{zig}-macos.{MACOS}", "Darwin", processor, f"macosx_11_0_{processor}")
    for zig, processor in (("x86_64", "x86_64"), ("aarch64", "arm64"))
)
WINDOWS = Target("x86_64-windows-gnu", "Windows", "AMD64", "win_amd64")
NAMES = (*LINUX, "macos", "windows", "native", "cuda")


def write_compiler(tools: Path, target: str) -> Path:
    """Programs with the names that CMake calls, each a word of zig's, and return their folder."""
    folder = WORK / target / "compiler"
    folder.mkdir(parents=True, exist_ok=True)
    for name, words in (("c++", f"c++ -target {target} -g0"), ("ar", "ar"), ("ranlib", "ranlib")):
        if os.name == "nt":
            path = folder / f"{name}.cmd"
            path.write_text(f'@"{tools}" -m ziglang {words} %*\n', encoding="utf-8")
        else:
            path = folder / name
            path.write_text(f'#!/bin/sh\nexec "{tools}" -m ziglang {words} "$@"\n', "utf-8")
            path.chmod(0o755)
    return folder


def tools_environment() -> Path:
    """The interpreter of an environment with the tools, made the first time."""
    home = WORK / "tools"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = home / "installed.txt"
    wanted = "\n".join(TOOLS)
    if not done.is_file() or done.read_text(encoding="utf-8") != wanted:
        venv.create(home, with_pip=True, clear=True)
        run([python, "-m", "pip", "install", "--quiet", *TOOLS])
        done.write_text(wanted, encoding="utf-8")
    return python


def run(command: Sequence[str | Path], more: Mapping[str, str] | None = None) -> None:
    """Run a command, and end with its status where it fails."""
    done = subprocess.run([str(word) for word in command], env={**os.environ, **(more or {})})
    if done.returncode != 0:
        sys.exit(done.returncode)


def build(tools: Path, target: Target, projects: Sequence[Path], outdir: Path) -> list[Path]:
    """Build wheels for one target and return where they are."""
    made = []
    for project in projects:
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            words = ["-m", "build", "--wheel", "--no-isolation", "--outdir", folder]
            if target.zig is not None:  # all projects share one build, and so one binary
                words += [f"-Cbuild-dir={WORK / target.zig / 'cmake'}", "-Cinstall.strip=false"]
            words += [f"-Ccmake.define.{name}={value}" for name, value in target.definitions(tools)]
            # scripts of the tools' environment, such as cmake and ninja, are found first
            path = os.pathsep.join([str(tools.parent), os.environ.get("PATH", "")])
            run([tools, *words, project], {"PATH": path})
            if target.tag is not None:
                tag = ["--platform-tag", target.tag, "--remove"]
                run([tools, "-m", "wheel", "tags", *tag, *Path(folder).glob("*.whl")])
            (wheel,) = Path(folder).glob("*.whl")
            outdir.mkdir(parents=True, exist_ok=True)
            made.append(Path(shutil.move(wheel, outdir / wheel.name)))
    return made


def build_named(tools: Path, name: str, outdir: Path) -> list[Path]:
    """Build the wheels of one name in `NAMES`."""
    if name == "cuda":
        return build(tools, Target(), CUDA, outdir)
    if name != "macos":
        target = {**LINUX, "windows": WINDOWS, "native": Target()}[name]
        return build(tools, target, PROJECTS, outdir)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        halves = [build(tools, target, PROJECTS, Path(folder)) for target in APPLE]
        pairs = zip(*halves, strict=True)
        return [join_wheels(*pair, "macosx_11_0_universal2", outdir) for pair in pairs]


def check(tools: Path, wheel: Path, target: str) -> None:
    """Let auditwheel say that a wheel for Linux needs nothing newer than its name promises."""
    if target not in LINUX:
        return
    command = [str(tools), "-m", "auditwheel", "show", str(wheel)]
    said = subprocess.run(command, capture_output=True, text=True)
    text = " ".join((said.stdout + said.stderr).split())
    found = re.search(r'platform tag: "manylinux_(\d+)_(\d+)_', text)
    if found is None or f"{int(found[1])}.{int(found[2]):02}" > GLIBC:
        sys.exit(f"auditwheel does not take {wheel.name} for what it is:\n{text}")


def this_machine() -> str:
    """The target whose wheels can be installed here."""
    names = {"Darwin": "macos", "Windows": "windows"}
    name = names.get(platform.system(), f"linux-{platform.machine()}")
    return name if name in NAMES else "native"


def main() -> None:
    """Build what is asked for and print where it is."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--target", choices=NAMES, action="append", help="Repeat for several.")
    parser.add_argument("--outdir", type=Path, default=ROOT / "dist", metavar="FOLDER")
    options = parser.parse_args()
    tools = tools_environment()
    for name in options.target or [this_machine()]:
        for wheel in build_named(tools, name, options.outdir.resolve()):
            check(tools, wheel, name)
            print(wheel)


if __name__ == "__main__":
    main()
