"""Run a Python program as if this processor had AVX2 and nothing wider.

    benchmarks/mask_cpuid/masked.py benchmarks/bench_matmul.py --out ...
    benchmarks/mask_cpuid/masked.py --check

ONNX Runtime chooses its kernels by CPUID and has no switch, so on a machine with AVX-512 its
figures are those of wider vectors than an AVX2 machine has. Here it runs from a private copy in
which every `cpuid` instruction is an invalid one; a preloaded library answers instead
(masked_cpuid.c). Two more switches do the rest: GLIBC_TUNABLES for the C library's copies,
ONNXCOMP_ISA for our own kernels.

What this cannot change is the processor: its units, ports and caches are those of a newer machine.
So figures name it, and the masking (`ONNXCOMP_MASKED`, read by `bench_matmul.cpu_name`).

`--check` runs a float32, an int8 and a MatMulNBits product with and without the mask, samples which
instructions run, and fails where a masked sample is near a zmm register or an unmasked one is not.
"""

from __future__ import annotations

import collections
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CPUID, REPLACEMENT = b"\x0f\xa2", b"\x37\xa2"

# Features that glibc 2.36 and newer leave out of its choice of string functions.
_GLIBC = ("AVX512F", "AVX512VL", "AVX512BW", "AVX512CD", "AVX512DQ", "AVX512ER", "AVX512PF")

# A sample counts as AVX-512 where this many bytes from it on mention a zmm register.
_NEAR = 96


def runtime_folder() -> Path:
    """The installed package onnxruntime."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise SystemExit("onnxruntime is not installed")
    return Path(spec.origin).parent


def places(library: Path) -> Iterator[int]:
    """Addresses of the `cpuid` instructions of a library, from its disassembly."""
    command = ["objdump", "-d", "--no-show-raw-insn", os.fspath(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.endswith("cpuid\n") or line.rstrip().endswith("\tcpuid"):
                yield int(line.split(":")[0], 16)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")


def segments(library: Path) -> list[tuple[int, int, int]]:
    """Loaded parts of a library: first address, address behind the last, place in the file."""
    listing = subprocess.run(
        ["objdump", "-p", os.fspath(library)], check=True, capture_output=True, text=True
    ).stdout
    pattern = r"LOAD off\s+(\S+) vaddr (\S+) .*\n\s+filesz (\S+)"
    found = [tuple(int(part, 16) for part in match) for match in re.findall(pattern, listing)]
    return [(start, start + size, offset) for offset, start, size in found]


def patch(library: Path) -> int:
    """Replace every `cpuid` of a library; how many there were."""
    parts, content, count = segments(library), bytearray(library.read_bytes()), 0
    for address in places(library):
        start, _, offset = next(part for part in parts if part[0] <= address < part[1])
        at = address - start + offset
        if content[at : at + 2] != CPUID:
            raise SystemExit(f"{library}: no cpuid at {address:#x}; the disassembly is off")
        content[at : at + 2] = REPLACEMENT
        count += 1
    if count:
        library.write_bytes(content)
    return count


def patched_copy(package: Path) -> Path:
    """A folder with a copy of the package whose libraries ask the mask; made once."""
    libraries = sorted(package.rglob("*.so*"))
    facts = "".join(f"{path}{path.stat().st_size}{path.stat().st_mtime_ns}" for path in libraries)
    name = hashlib.sha256(facts.encode()).hexdigest()[:16]
    folder = ROOT / "build" / "masked" / name
    if folder.exists():
        return folder
    part = folder.with_name(f"{name}.{os.getpid()}.part")
    shutil.copytree(package, part / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    total = sum(patch(path) for path in sorted(part.rglob("*.so*")))
    if not total:
        raise SystemExit(f"no library of {package} has a cpuid instruction")
    print(f"{total} cpuid instructions of onnxruntime replaced", file=sys.stderr)
    part.rename(folder)
    return folder


def built_mask() -> Path:
    """The preloaded library, compiled where its source is newer."""
    source, library = HERE / "masked_cpuid.c", ROOT / "build" / "masked" / "masked_cpuid.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        library.parent.mkdir(parents=True, exist_ok=True)
        flags = ["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        part = library.with_suffix(f".{os.getpid()}.part")
        subprocess.run(["cc", *flags, str(source), "-o", str(part), "-ldl"], check=True)
        part.rename(library)
    return library


def masked_environment(base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a program that is to see AVX2 only."""
    tunables = "glibc.cpu.hwcaps=" + ",".join(f"-{name}" for name in _GLIBC)
    copy = patched_copy(runtime_folder())
    return {
        **base,
        "LD_PRELOAD": ":".join(filter(None, (str(built_mask()), base.get("LD_PRELOAD")))),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(copy), base.get("PYTHONPATH")))),
        "GLIBC_TUNABLES": ":".join(filter(None, (base.get("GLIBC_TUNABLES"), tunables))),
        "ONNXCOMP_ISA": base.get("ONNXCOMP_ISA", "avx2"),
        "ONNXCOMP_MASKED": "AVX2 only, by masking CPUID",
    }


_PRODUCTS = """
import sys, time
sys.path.insert(0, {benchmarks!r})
import numpy as np, onnxruntime, bench_matmul as b
print(onnxruntime.__file__, file=sys.stderr)
kinds = dict(fp32=b.float_product, int8=b.dynamic_product, nbits4=b.nbits_product(4, 128))
for rows in (1, 128):
    x = np.random.default_rng(0).standard_normal((rows, 1024), np.float32)
    for name, make in kinds.items():
        session = b.open_session(b.build(make, 1024, 1024, 0)[0], 1, False)
        start = time.thread_time()
        for _ in range({runs} // rows):
            session.run(None, dict(x=x))
        print(name, rows, (time.thread_time() - start) / ({runs} // rows))
"""


def sampled(environment: Mapping[str, str]) -> tuple[dict[str, float], float, int]:
    """Seconds of some products, and the share of samples near a zmm register, of how many."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples"
        code = _PRODUCTS.format(benchmarks=str(HERE.parent), runs=12800)
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, "MASKED_CPUID_SAMPLES": str(path)},
            check=True,
            capture_output=True,
            text=True,
        )
        counts = collections.Counter(path.read_text().splitlines())
    times = {f"{n} M={m}": float(t) for n, m, t in map(str.split, run.stdout.splitlines())}
    own = {line: count for line, count in counts.items() if "/onnxruntime/" in line}
    kept = dict(collections.Counter(own).most_common(200))
    wide = sum(count for line, count in kept.items() if near_zmm(*line.rsplit(" ", 1)))
    return times, wide / sum(kept.values()), sum(kept.values())


def near_zmm(library: str, offset: str) -> bool:
    """Whether the instructions from a place on use 512-bit registers."""
    start = int(offset, 16)
    command = ["objdump", "-d", f"--start-address={start}", f"--stop-address={start + _NEAR}"]
    return (
        "%zmm"
        in subprocess.run([*command, library], capture_output=True, text=True, check=True).stdout
    )


def check() -> None:
    """Compare runs with and without the mask."""
    plain_environment = {**os.environ, "LD_PRELOAD": str(built_mask())}
    plain, plain_wide, plain_samples = sampled(plain_environment)
    masked, masked_wide, masked_samples = sampled(masked_environment(os.environ))
    for name, seconds in plain.items():
        ratio = masked[name] / seconds
        print(
            f"{name:14} {seconds * 1e6:9.1f} us, masked {masked[name] * 1e6:9.1f} us: {ratio:.2f}x"
        )
    print(f"samples near zmm: {plain_wide:.1%} of {plain_samples}, "
          f"masked {masked_wide:.1%} of {masked_samples}")  # fmt: skip
    if masked_wide > 0.001:
        raise SystemExit("ONNX Runtime still runs AVX-512 under the mask")
    if plain_wide < 0.5:
        raise SystemExit("this machine runs no AVX-512 without the mask; there is nothing to mask")


def main(arguments: Sequence[str]) -> None:
    if not arguments:
        raise SystemExit(__doc__)
    if arguments[0] == "--check":
        check()
        return
    program = [sys.executable, *arguments]
    os.execve(program[0], program, masked_environment(os.environ))


if __name__ == "__main__":
    main(sys.argv[1:])
