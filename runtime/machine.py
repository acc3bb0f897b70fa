"""What this machine offers: processor, memory, graphics processors."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Literal

__all__ = ["ISA_VARIABLE", "Machine", "can_run", "current_isa", "isa_of", "look", "target_of"]

# Instruction sets each form of the kernels needs, best first; the rule of ops/hyper/select.cc.
_AVX2 = frozenset({"avx2", "fma", "f16c"})
_FORMS: tuple[tuple[str, frozenset[str]], ...] = (
    (
        "avx512",
        frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vnni"}),
    ),
    ("avx2vnni", _AVX2 | {"avx_vnni"}),
    ("avx2vnni", _AVX2 | {"avx512vl", "avx512_vnni"}),
    ("avx2", _AVX2),
    ("neondot", frozenset({"asimd", "asimddp"})),
    ("neon", frozenset({"asimd"})),
)
# Runs only where it is asked for.
_TILES = ("amx", _FORMS[0][1] | {"amx_tile", "amx_int8"})
_ARM = ("aarch64", "arm64")
# Names another form of the kernels than the best one.
ISA_VARIABLE = "ONNXCOMP_ISA"

# Classes of machines by the kernels that are fast there.
Class = Literal["avx2", "avx512", "neon"]

_SECONDS = 10  # that nvidia-smi may take


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """Facts about this machine.

    Attributes:
        processor: Its name.
        architecture: As Python names it: ``x86_64``.
        isa: The form of the kernels that runs here: "avx512", "avx2vnni", "avx2", "neondot",
            "neon" or "plain".
        cores: Processors this process may use.
        memory: Bytes of memory, or of the limit of the container; None where unknown.
        available: Bytes that are free for new programs; None where unknown.
        gpus: Name, memory and driver of each NVIDIA graphics processor.
        cuda: Newest CUDA version that the driver runs: "13.0"; None without a driver.
    """

    processor: str
    architecture: str
    isa: str
    cores: int
    memory: int | None
    available: int | None
    gpus: tuple[str, ...]
    cuda: str | None


def target_of(isa: str) -> Class | None:
    """The class of machines, a value of the option `target`; None where no kernel is fast."""
    classes: tuple[Class, ...] = ("avx2", "avx512", "neon")
    if isa == "amx":
        return "avx512"
    return next((known for known in classes if isa.startswith(known)), None)


def current_isa(machine: Machine) -> str:
    """The form of the kernels that runs: the machine's best one, or the one that is asked for."""
    return os.environ.get(ISA_VARIABLE) or machine.isa


def can_run(isa: str) -> bool:
    """Whether this processor runs a form of the kernels; true where the system does not tell."""
    _, flags = _processor()
    if isa == "plain" or not flags - {"asimd"}:
        return True
    return any(name == isa and needed <= flags for name, needed in (*_FORMS, _TILES))


def look() -> Machine:
    """Look at this machine."""
    processor, flags = _processor()
    memory = _meminfo("MemTotal:")
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    available = _meminfo("MemAvailable:")
    if memory is not None and limit is not None and limit < memory:
        memory = limit
        used = _number(Path("/sys/fs/cgroup/memory.current")) or 0
        available = min(available or limit, max(limit - used, 0))
    return Machine(
        processor, platform.machine(), isa_of(flags), _cores(), memory, available, _gpus(), _cuda()
    )


def isa_of(flags: frozenset[str]) -> str:
    """The form of the kernels that a processor with these flags runs."""
    return next((name for name, needed in _FORMS if needed <= flags), "plain")


def _processor() -> tuple[str, frozenset[str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    facts: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    flags = facts.get("flags") or facts.get("Features", "")
    # Every 64-bit ARM has NEON, also where the system does not tell.
    return name, frozenset(flags.split()) | ({"asimd"} if platform.machine() in _ARM else set())


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _meminfo(field: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none, or it says "max"."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _gpus() -> tuple[str, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(
            [program, *query], capture_output=True, text=True, timeout=_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in run.stdout.splitlines() if line.strip())


def _cuda() -> str | None:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
