"""The compiled inner loops: accumulators stay in registers.

A compiler that copies accumulators through the stack halves the speed without breaking a result.
"""

from __future__ import annotations

import functools
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

Loop = list[str]

_JUMP = re.compile(r"\bj[a-z]+\s+([0-9a-f]+) <")
_STACK_STORE = re.compile(r"\bv?mov[a-z0-9]*\s+%[xyz]mm\d+,.*\((%rsp|%rbp)")
KERNELS = [
    ("Multiply<12, 2>(unsigned char const", "vpdpbusd", 24),
    ("Multiply<12, 2>(float const", "vfmadd", 24),
    ("MultiplyInt8<4>", "vpdpbusd|vpmaddubsw", 8),
    ("MultiplyExact<4>", "vfmadd", 8),
]


@functools.cache
def functions(library: Path) -> dict[str, list[tuple[int, str]]]:
    """Instructions of every named function: (address, text)."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, list[tuple[int, str]]] = {}
    current: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if line.endswith(">:"):
            current = found.setdefault(line, [])
        elif ":\t" in line:
            address, text = line.split(":\t", 1)
            current.append((int(address, 16), text))
    return found


def busiest_loop(instructions: list[tuple[int, str]], product: str) -> Loop:
    """The shortest backward jump's body that holds the most products."""
    loops = []
    for end, text in instructions:
        jump = _JUMP.search(text)
        if jump and int(jump[1], 16) <= end:
            loops.append([t for at, t in instructions if int(jump[1], 16) <= at <= end])
    return max(loops, key=lambda loop: (count(loop, product), -len(loop)), default=[])


def count(loop: Loop, product: str) -> int:
    return sum(bool(re.search(product, text)) for text in loop)


@pytest.mark.parametrize(("name", "product", "products"), KERNELS)
def test_accumulators_are_not_spilled(
    library: Path, name: str, product: str, products: int
) -> None:
    if shutil.which("objdump") is None or platform.machine() != "x86_64":
        pytest.skip("needs objdump (binutils) and x86-64")
    kernels = {title: body for title, body in functions(library).items() if name in title}
    if not kernels:
        pytest.skip("the library is stripped of local symbols: build it without stripping")
    for title, body in kernels.items():
        loop = busiest_loop(body, product)
        assert count(loop, product) >= products, title
        assert not [text for text in loop if _STACK_STORE.search(text)], title
