"""Tables of the hyper codec: part of the format's promise, so their bytes are pinned."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from onnxcomp.passes.codecs.hyper.format import STATE_BITS
from onnxcomp.passes.codecs.hyper.tables import WINDINGS, level_bits, quantiles, table

TABLE = pytest.mark.parametrize(("bits", "state_bits"), sorted(WINDINGS))

DIGEST = "15fec2990837ce0a218b8368bebd4c5927cca7f88786087b5bf19475ee206273"


def test_every_trellis_of_the_specification_has_a_table() -> None:
    expected = {(k, size) for k in range(1, 7) for size in STATE_BITS if size >= k + 2}
    assert set(WINDINGS) == expected


def test_tables_are_the_pinned_ones() -> None:
    digest = hashlib.sha256()
    for pair in sorted(WINDINGS):
        digest.update(table(*pair).tobytes())
    assert digest.hexdigest() == DIGEST


@TABLE
def test_complementing_a_state_negates_its_value(bits: int, state_bits: int) -> None:
    values = table(bits, state_bits).astype(int)
    assert values.shape == (1 << state_bits,)
    assert np.array_equal(values[::-1], -values)
    assert values.min() >= -127


@TABLE
def test_values_are_the_rounded_quantiles_on_the_winding(bits: int, state_bits: int) -> None:
    winding = WINDINGS[bits, state_bits]
    assert winding.multiplier % 2 == 1
    ordered = np.sort(table(bits, state_bits).astype(float))
    levels = level_bits(bits, state_bits)
    wanted = np.repeat(winding.quantum * quantiles(levels), 1 << (state_bits - levels))
    error = ordered - np.clip(wanted, -127, 127)
    assert np.abs(error).max() <= 0.5 + 1e-9


@TABLE
def test_successors_of_a_state_spread_evenly_over_the_distribution(
    bits: int, state_bits: int
) -> None:
    values = table(bits, state_bits)
    ordered = np.sort(values)
    stems = 1 << (state_bits - bits)
    combs = {ordered[first::stems].tobytes() for first in range(stems)}
    # Row c of the matrix holds the states with symbol c; column p the successors of stem p.
    successors = np.sort(values.reshape(1 << bits, stems), axis=0)
    assert {column.tobytes() for column in successors.T} == combs


def test_tables_cannot_be_changed_by_accident() -> None:
    with pytest.raises(ValueError, match="read-only"):
        table(4, 7)[0] = 1
