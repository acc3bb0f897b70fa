"""The compiled inner loops: registers stay registers.

A compiler that copies accumulators through the stack halves the speed without breaking a result.
Constants may be read from the stack, which costs as much as reading them from anywhere else.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

Loop = list[str]
Code = list[tuple[int, str]]

_JUMP = re.compile(r"\bj[a-z]+\s+([0-9a-f]+) <")
_VECTOR = re.compile(r"%[xyz]mm")
_STACK_STORE = re.compile(r"\bv?mov[a-z0-9]*\s+%[xyz]mm\d+,.*\((%rsp|%rbp)")
_PRODUCT = re.compile(r"\bv(pdpbusd|pmaddubsw|fmadd)")
_LOOKUP = re.compile(r"\bv(perm[it]2b|permb|pshufb)")


def functions(library: Path) -> list[tuple[str, Code]]:
    """Name and instructions, (address, text), of every function that has a name."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: list[tuple[str, Code]] = []
    for line in listing.splitlines():
        if line.endswith(">:"):
            found.append((line, []))
        elif ":\t" in line and found:
            address, text = line.split(":\t", 1)
            found[-1][1].append((int(address, 16), text))
    return found


def inner_loops(code: Code) -> Iterator[Loop]:
    """Bodies of backward jumps that hold no other one."""
    jumps = [(end, _JUMP.search(text)) for end, text in code]
    spans = [(int(jump[1], 16), end) for end, jump in jumps if jump and int(jump[1], 16) <= end]
    for first, last in spans:
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
            yield [text for at, text in code if first <= at <= last]


def count(loop: Loop, pattern: re.Pattern[str]) -> int:
    return sum(bool(pattern.search(text)) for text in loop)


@pytest.fixture(scope="module")
def every_loop(library: Path) -> list[tuple[str, Loop]]:
    """Inner loops of the hyper kernels, with their function's name."""
    if shutil.which("objdump") is None or platform.machine() != "x86_64":
        pytest.skip("needs objdump (binutils) and x86-64")
    loops = [
        (name, loop)
        for name, code in functions(library)
        if "onnxcomp::hyper::" in name
        for loop in inner_loops(code)
    ]
    if not loops:
        pytest.skip("the library is stripped of local symbols: build it without stripping")
    return loops


@pytest.fixture(scope="module")
def kernels(every_loop: list[tuple[str, Loop]]) -> list[tuple[str, Loop]]:
    """Those that multiply or look up eight vectors and more."""
    return [
        (name, loop)
        for name, loop in every_loop
        if max(count(loop, _PRODUCT), count(loop, _LOOKUP)) >= 8
    ]


# Tiles over decoded weights, by the products of one step.
TILES = [
    ("Multiply<12, 2>(unsigned char const", 24, 1),
    ("Multiply<12, 2>(float const", 24, 1),
    ("MultiplyInt8<4>", 8, 3),
    ("MultiplyExact<4>", 8, 3),
    ("MultiplySmall<4>", 16, 3),
    ("MultiplyCalm", 16, 2),
]


@pytest.mark.parametrize(("name", "products", "forms"), TILES)
def test_accumulators_of_tiles_are_not_spilled(
    kernels: list[tuple[str, Loop]], name: str, products: int, forms: int
) -> None:
    loops = [loop for title, loop in kernels if name in title]
    assert len(loops) >= forms
    for loop in loops:
        assert count(loop, _PRODUCT) >= products
        assert count(loop, _STACK_STORE) == 0


@pytest.mark.parametrize(
    ("bits", "states"),
    [(bits, states) for bits in range(1, 7) for states in (6, 7, 8) if states >= bits + 2],
)
def test_streams_for_one_row_of_activations_spill_nothing(
    kernels: list[tuple[str, Loop]], bits: int, states: int
) -> None:
    one_row = [
        loop
        for title, loop in kernels
        if f"Stream<{bits}, {states}>" in title and count(loop, re.compile("vpdpbusd")) == 8
    ]
    assert one_row
    for loop in one_row:
        assert count(loop, _STACK_STORE) == 0


@pytest.mark.parametrize("sizes", ["4, 1", "3, 1", "3, 2", "2, 1", "2, 2"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_streams_of_structured_tables_spill_nothing(
    every_loop: list[tuple[str, Loop]], sizes: str, rows: int
) -> None:
    name = re.compile(rf"StreamPanel<{sizes}, [24], {rows}, .*StructuredLookup")
    streams = [
        loop for title, loop in every_loop if name.search(title) and count(loop, _LOOKUP) >= 2
    ]
    # Three kinds of tables in three forms, one where c is two windows back; at four bits both
    # halves of a panel have one loop for a single row.
    forms = 3 if sizes == "3, 2" else 9
    assert len(streams) >= (forms if rows == 1 and sizes == "4, 1" else 2 * forms)
    for loop in streams:
        assert count(loop, _PRODUCT) >= 2
        assert count(loop, _STACK_STORE) == 0


def test_no_hot_loop_stores_more_than_a_tenth_of_its_work_on_the_stack(
    kernels: list[tuple[str, Loop]],
) -> None:
    found = "\n".join(title for title, _ in kernels)
    for name in ("Stream<4, 7>", "Stream<4, 12>", "DecodeBlock<4, 7", "DecodeVector<4, 12, 128>"):
        assert name in found
    for title, loop in kernels:
        assert count(loop, _STACK_STORE) <= count(loop, _VECTOR) / 10, title
