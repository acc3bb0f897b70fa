"""What nvcc made of the CUDA kernels: registers, stack, and the instructions of their hot loops.

Needs no GPU, but cuobjdump and nvdisasm (from CUDA, or `pip install nvidia-cuda-cuobjdump
nvidia-cuda-nvdisasm`) and a library with machine code for one architecture. A stack means that
registers did not suffice. The hot loop is the innermost one that multiplies, on tensor cores or by
bytes, and of several the one that looks up most often; beside its instructions stands how many
there are for each weight that a thread takes.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from gpu_calls import Calls
from results import print_table, write_results

MISSING = 6  # the exit code of onnxcomp for what is missing on a machine
_LOOKUPS = ("twice", "direct", "leveled", "pairs")
_FORMS = ("float16 pairs", "singles", "int8 pairs")
# Instructions that multiply; those of each line only where there are none of the line before.
_PRODUCTS = (("HMMA", "IMMA", "HGMMA", "IDP"), ("FFMA",))
_BRANCH = re.compile(r"\bBRA\b.*?(0x[0-9a-f]+)")
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
        name: "hyper k=4 twice, 8 columns".
        registers: Of a thread.
        stack: Bytes of a thread's stack.
        loop: Instructions of the hot loop; 0 where nothing is multiplied.
        per_weight: Of them for each weight of a thread; 0 where that is not known.
        classes: How many there are of each kind.
    """

    name: str
    registers: int
    stack: int
    loop: int
    per_weight: float
    classes: dict[str, int]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"Li(\d+)E", text)]


def _pairs(mangled: str) -> tuple[str, int] | None:
    """Name of a kernel with a table of pairs, and weights of a thread in its loop."""
    found = re.search(
        r"(FewRows|SomeRows|ManyRows|DecodePairs)INS\d?_9PairTableILNS\d?_8PairFormE(\d)E(.*?)EEE(.*)",
        mangled,
    )
    if found is None:
        return None
    bits, states, copies = _numbers(found[3] + "E")
    rest = _numbers(found[4])
    table = f"hyper k={bits} L={states} {_FORMS[int(found[2])]} x{1 << copies}"
    if found[1] == "FewRows":
        warps, panels, stages, _ = rest
        return f"{table}, few rows, {warps} warps, {panels} panels, {stages} stages", 128 * panels
    if found[1] == "DecodePairs":
        return f"{table}, decode, {rest[0]} stages", 64
    some = found[1] == "SomeRows"
    return f"{table}, {rest[0]} columns, Hopper", 128 if some else 64


def named(mangled: str) -> tuple[str, int]:
    """A short name for a kernel, from its mangled one, and weights of a thread in its loop or 0."""
    pairs = _pairs(mangled)
    if pairs is not None:
        return pairs
    product = re.search(r"(Small|Tiled)ProductI", mangled)
    tiles = re.search(r"EELi(\d+)EEEEEv", mangled)
    columns = 8 * int(tiles[1]) if product and product[1] == "Tiled" and tiles else 8
    source = re.search(r"hyper6SourceILi(\d)ELi(\d+)ELNS\d?_6LookupE(\d)", mangled)
    if source:
        short = ", runs of 8" if source[2] == "8" else ""
        name = f"hyper k={source[1]} {_LOOKUPS[int(source[3])]}{short}, {columns} columns"
        return name, 2 * int(source[2])
    shared = re.search(r"hash6SourceINS\d?_(\d)(\w+?)ELb(\d)", mangled)
    if shared:
        kind = {"Halves": "float16", "Bytes": "int8"}[shared[2][: int(shared[1])]]
        name = f"hash {kind}, {'tiles' if shared[3] == '1' else 'chunks'}, {columns} columns"
        return name, 64
    if "OneRowBytes" in mangled:
        return "hash int8, tiles, one row", 256
    if "OneRowHalves" in mangled:
        return "hash float16, tiles, one row", 128
    names = re.findall(
        r"\d(DecodeAll|GatherRows|PlainProduct|PrepareGroup|Prepare|AddSplits|Probe)", mangled
    )
    numbers = re.search(r"Li(\d+)ELi(\d+)|GroupILi(\d+)", mangled)
    name = names[0] if names else mangled
    if numbers:
        name += f" {numbers[3]} columns" if numbers[3] else f" k={numbers[1]} run={numbers[2]}"
    return name, 0


def usages(text: str) -> dict[str, tuple[int, int]]:
    """Registers and stack of each kernel, from what cuobjdump lists."""
    found, name = {}, ""
    for line in text.splitlines():
        function = re.search(r"Function (\S+):", line)
        usage = _USAGE.search(line)
        if function:
            name = function[1]
        elif usage and name:
            found[name] = (int(usage[1]), int(usage[2]))
    return found


def listings(text: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Name and instructions, (address, text), of each kernel of a disassembly."""
    for part in text.split("Function : ")[1:]:
        name, _, rest = part.partition("\n")
        matches = map(_LINE.match, rest.splitlines())
        yield name.strip(), [(int(match[1], 16), match[2]) for match in matches if match]


def hot_loop(code: list[tuple[int, str]]) -> list[str]:
    """Of the innermost loops that multiply the one that loads from shared memory most often."""
    every = []
    for end, text in code:
        branch = _BRANCH.search(text)
        if branch and int(branch[1], 16) < end:
            start = int(branch[1], 16)
            every.append((start, end, [one for at, one in code if start <= at <= end]))
    for kinds in _PRODUCTS:
        loops = [one for one in every if any(opcode(text) in kinds for text in one[2])]
        innermost = [
            body
            for start, end, body in loops
            if not any(start <= a and b <= end and (a, b) != (start, end) for a, b, _ in loops)
        ]
        if innermost:
            return max(innermost, key=_density)
    return []


def _density(body: list[str]) -> float:
    return sum(opcode(one) == "LDS" for one in body) / len(body)


def opcode(text: str) -> str:
    """The operation of an instruction, without its guard and its variants."""
    return re.sub(r"^@!?U?P\w+ ", "", text).split()[0].split(".")[0]


def report(library: Path) -> list[Kernel]:
    """All kernels of a library.

    Raises:
        SystemExit: With code 6 when a tool is missing or the library has no CUDA kernels.
    """
    if shutil.which("cuobjdump") is None or shutil.which("nvdisasm") is None:
        print("cuobjdump and nvdisasm are needed: they come with CUDA", file=sys.stderr)
        raise SystemExit(MISSING)
    resources = _run("cuobjdump", "--dump-resource-usage", str(library))
    used = usages(resources)
    if not used:
        print(f"{library} has no CUDA kernels", file=sys.stderr)
        raise SystemExit(MISSING)
    kernels = []
    for name, code in listings(_run("cuobjdump", "-sass", str(library))):
        loop = hot_loop(code)
        classes = dict(collections.Counter(map(opcode, loop)).most_common())
        short, weights = named(name)
        each = round(len(loop) / weights, 2) if weights else 0.0
        kernels.append(Kernel(short, *used.get(name, (0, 0)), len(loop), each, classes))
    return sorted(kernels, key=lambda kernel: kernel.name)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    library: Path = parser.parse_args().library
    kernels = report(library)
    rows = [
        (
            kernel.name,
            kernel.registers,
            kernel.stack,
            kernel.loop or "-",
            kernel.per_weight or "-",
            ", ".join(f"{count} {name}" for name, count in list(kernel.classes.items())[:6]),
        )
        for kernel in kernels
    ]
    print_table(("kernel", "registers", "stack", "loop", "for a weight", "of it"), rows)
    document = {
        "architectures": Calls(library).architectures,
        "library_bytes": library.stat().st_size,
        "kernels": [dataclasses.asdict(kernel) for kernel in kernels],
    }
    print(f"{document['architectures']}: {len(kernels)} kernels, {document['library_bytes']} bytes")
    print(f"wrote {write_results('gpu_report', document)}")


if __name__ == "__main__":
    main()
