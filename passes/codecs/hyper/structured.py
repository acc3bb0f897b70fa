"""Structured tables of the hyperfunction codec: sums of two small tables, for CPUs without AVX-512.

ops/hyper/spec.md, section 3, says what they are; the kernels that know them look up 16 entries at a
time. A code is a table and how the encoder uses it: `code` gives that of a winding or of a
structured table.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from onnxcomp.passes.codecs.hyper import tables as hyper_tables
from onnxcomp.passes.weight import Array

__all__ = [
    "KINDS",
    "STRUCTURES",
    "TARGETS",
    "Code",
    "Structure",
    "code",
    "kind_of",
    "state_bits_of",
    "structured_table",
]

# Kinds of tables, by the names that users know.
KINDS = ("winding", "structured")

# The kind of table that runs best on a class of machines. `any` keeps what is measured elsewhere:
# with AVX-512, structured tables are up to 18 % slower at 4 bits (768 x 3072, 4 rows) and 20 % at 2
# bits (4096 x 4096, 1 row), and GPUs have no tables of pairs for them at 4 bits
# (ops/hyper/few_rows.cu). With AVX2, windings take 2.1 to 2.9 times as long: `doctor` says so
# there.
TARGETS: Mapping[str, str] = {
    "any": "winding",
    "avx2": "structured",
    "neon": "structured",
    "avx512": "winding",
    "cuda": "winding",
}


class Structure(NamedTuple):
    """A structured table, ``2 (F[(N + P[c]) mod 16] + G[c]) - limit``.

    Attributes:
        state_bits: Bits of a state, L.
        limit: Largest value of ``F + G``: 63, or 31 where that costs little.
        cells: F.
        turns: P.
        steps: G.
        spread: Root mean square of the encoder's targets in table units.
        passes: Searches of the encoder; a third one gains 0.02 dB.
        sqnr: Signal to quantisation noise on normal data, dB, group 128.
        edition: Counts the tables of these bits and states; files name theirs by it.
    """

    state_bits: int
    limit: int
    cells: tuple[int, ...]
    turns: tuple[int, ...]
    steps: tuple[int, ...]
    spread: float
    passes: int
    sqnr: float
    edition: int = 1


_LEVEL = tuple(range(16))
_FALLING = tuple(range(15, -1, -1))

# By bits; found by benchmarks/search_structured_tables.py. All are falling, which kernels decode
# fastest. With 2^10 states at 3 bits c is the window of two weights before and shares no bit with
# N: 0.27 dB better than any table of 2^7 states, for an encoder that takes three times as long. In
# 1, 5 and 6 bits no table is stored: windows of four bits hold too little of a symbol, or too many
# of them.
STRUCTURES: Mapping[int, Structure] = {
    2: Structure(
        8,
        63,
        (32, 2, 19, 30, 47, 17, 26, 39, 13, 25, 36, 13, 23, 33, 9, 22),
        _LEVEL,
        _FALLING,
        23.33,
        2,
        11.21,
        edition=2,
    ),
    3: Structure(
        10,
        63,
        (2, 19, 29, 46, 17, 26, 39, 15, 25, 35, 13, 23, 33, 9, 21, 30),
        _LEVEL,
        _FALLING,
        20.65,
        2,
        17.15,
    ),
    4: Structure(
        8,
        63,
        (17, 36, 21, 29, 25, 9, 15, 47, 1, 33, 39, 23, 19, 27, 12, 31),
        _LEVEL,
        _FALLING,
        19.92,
        2,
        22.57,
    ),
}


class Code(NamedTuple):
    """A table and how the encoder uses it.

    Attributes:
        table: int8 ``(2**state_bits,)``, read-only.
        spread: Root mean square, in table units, that the encoder brings its targets to.
        passes: Its searches.
        sqnr: Signal to quantisation noise on normal data, dB, group 128.
    """

    table: Array
    spread: float
    passes: int
    sqnr: float


@functools.cache
def structured_table(structure: Structure) -> Array:
    """Value of each state: int8 ``(2**state_bits,)``, read-only."""
    state = np.arange(1 << structure.state_bits)
    top, low = state >> (structure.state_bits - 4), state & 15
    cells, turns, steps = (np.array(p) for p in structure[2:5])
    sums = cells[(top + turns[low]) & 15] + steps[low]
    result: Array = (2 * sums - structure.limit).astype(np.int8)
    result.flags.writeable = False
    return result


def kind_of(bits: int, kind: str) -> str:
    """The kind of table that there is: a winding where none is structured."""
    return kind if bits in STRUCTURES else "winding"


def state_bits_of(bits: int, state_bits: int, kind: str) -> int:
    """Bits of a state: a structured table has its own."""
    structured = kind_of(bits, kind) == "structured"
    return STRUCTURES[bits].state_bits if structured else state_bits


def code(bits: int, state_bits: int, kind: str = "winding") -> Code:
    """The code of a kind.

    Args:
        bits: Bits per weight.
        state_bits: Bits of a state, for windings.
        kind: One of `KINDS`.
    """
    if kind_of(bits, kind) == "winding":
        table = hyper_tables.table(bits, state_bits)
        reach = hyper_tables.spread(bits, state_bits)
        return Code(table, reach, hyper_tables.PASSES, hyper_tables.NORMAL_SQNR[bits, state_bits])
    structure = STRUCTURES[bits]
    return Code(structured_table(structure), structure.spread, structure.passes, structure.sqnr)
