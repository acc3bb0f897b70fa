"""Run the wheels that build_wheels.py made for other systems, by emulators of these.

    python packaging/try_wheels.py [--wheels dist] [--home FOLDER]

For 64-bit ARM it needs qemu-aarch64 and the C library of Debian's cross compiler, for Windows wine.
The program of try_session.cc loads ONNX Runtime from its own wheel for that system, registers the
library of ours, and runs the demo's model at 4 bits. Its numbers have to be those of this machine,
within float32 rounding. ONNX Runtime is 1.20.1: 1.32 does not start under qemu, where it trips over
this machine's caches in /sys, and not under wine without DXGI.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import build_wheels
import numpy as np

import onnxcomp


@dataclasses.dataclass(frozen=True)
class System:
    """How to run programs of another system.

    Attributes:
        wheel: End of the name of our wheel.
        target: Zig's name of the system.
        runtime: Version and platform of the wheel of ONNX Runtime, and its library in there.
        emulator: Words before a command.
    """

    wheel: str
    target: str
    runtime: tuple[str, str, str]
    emulator: tuple[str, ...]


SYSTEMS = {
    "linux-aarch64": System(
        "aarch64.whl", build_wheels.LINUX["linux-aarch64"].zig or "",
        ("1.20.1", "manylinux_2_27_aarch64", "libonnxruntime.so.1.20.1"),
        ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"),
    ),
    "windows": System(
        "win_amd64.whl", build_wheels.WINDOWS.zig or "", ("1.20.1", "win_amd64", "onnxruntime.dll"),
        ("wine64",),
    ),
}  # fmt: skip


def unpack(system: System, wheels: Path, home: Path) -> tuple[Path, Path]:
    """Our library and the runtime of another system."""
    version, platform, name = system.runtime
    runtime = home / "onnxruntime" / "capi" / name
    if not runtime.is_file():
        words = ["-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(home)]
        words += ["--platform", platform, "--python-version", "3.11", f"onnxruntime=={version}"]
        subprocess.run([sys.executable, *words], check=True)
    (ours,) = wheels.glob(f"onnxcomp-*{system.wheel}")
    for path in (ours, *home.glob("onnxruntime-*.whl")):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(home)
    (library,) = (home / "onnxcomp" / "ops").glob("*onnxcomp_ops.*")
    return library, runtime


def numbers(system: System, wheels: Path, home: Path, model: Path) -> np.ndarray:
    """What the model says there."""
    home.mkdir(parents=True, exist_ok=True)
    library, runtime = unpack(system, wheels, home)
    folder = build_wheels.write_compiler(build_wheels.tools_environment(), system.target)
    program = home / "try_session.exe"
    source = Path(__file__).with_name("try_session.cc")
    command = [str(folder / "c++"), "-O1", "-std=c++17", "-Wall", "-Wextra", str(source)]
    subprocess.run([*command, "-o", str(program)], check=True)
    files = [str(path) for path in (program, runtime, library, model)]
    done = subprocess.run(
        [*system.emulator, *files], env={**os.environ, "WINEDEBUG": "-all"}, text=True,
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return np.array(done.stdout.split(), np.float32)


def main() -> None:
    """Run all that can be run, and fail where the numbers differ."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--wheels", type=Path, default=build_wheels.ROOT / "dist")
    parser.add_argument("--home", type=Path, default=build_wheels.WORK / "try")
    options = parser.parse_args()
    home = options.home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    model = home / "model.onnx"
    demo = build_wheels.ROOT / "models" / "character_kinds" / "model.onnx"
    onnxcomp.optimize(demo, model, bits=4, verify=False, force=True)
    feed = {"pairs": np.ones((1, 64), np.int64)}
    wanted = onnxcomp.InferenceSession(model).run(None, feed)[0].ravel()
    for name, system in SYSTEMS.items():
        emulator = shutil.which(system.emulator[0], path=os.environ["PATH"] + ":/usr/lib/wine")
        if emulator is None:
            print(f"{name}: skipped, {system.emulator[0]} is not installed")
            continue
        system = dataclasses.replace(system, emulator=(emulator, *system.emulator[1:]))
        if not list(options.wheels.glob(f"onnxcomp-*{system.wheel}")):
            print(f"{name}: skipped, no wheel in {options.wheels}")
            continue
        found = numbers(system, options.wheels, home / name, model)
        difference = float(np.abs(found - wanted).max())
        print(f"{name}: {found.size} numbers, largest difference {difference:.2g}")
        if difference > 1e-4:
            sys.exit(f"{name} says something else than this machine")


if __name__ == "__main__":
    main()
