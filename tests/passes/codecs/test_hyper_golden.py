"""Golden files of tests/golden: bytes that every version must write and read alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxcomp.passes.codecs.hyper import format as hyper_format
from onnxcomp.passes.codecs.hyper import native
from onnxcomp.passes.codecs.hyper import viterbi as hyper_viterbi
from onnxcomp.passes.codecs.hyper.format import GroupLayout
from onnxcomp.passes.codecs.hyper.structured import Code, code
from onnxcomp.passes.weight import Array

GOLDEN = Path(__file__).parents[2] / "golden"
FILES = sorted(GOLDEN.glob("hyper_*.npz"))
# With tables that no encoder uses any more.
EARLIER = sorted(GOLDEN.glob("earlier_*.npz"))

FILE = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def load(path: Path) -> tuple[dict[str, Array], GroupLayout]:
    with np.load(path) as archive:
        golden = {name: archive[name] for name in archive.files}
    bits, state_bits, group = (int(value) for value in golden["parameters"])
    return golden, GroupLayout(bits, state_bits, group, *golden["weight"].shape)


def code_of(path: Path, geometry: GroupLayout) -> Code:
    """The code that a file was made with."""
    kind = "structured" if "structured" in path.stem else "winding"
    return code(geometry.bits, geometry.state_bits, kind)


def same(a: Array, b: Array) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_there_are_files_for_every_bit_width() -> None:
    assert {load(path)[1].bits for path in FILES} == set(range(1, 7))
    assert {load(path)[1].bits for path in EARLIER} == {2, 3}


@FILE
def test_the_table_is_unchanged(path: Path) -> None:
    golden, geometry = load(path)
    assert same(golden["table"], code_of(path, geometry).table)


@pytest.mark.parametrize("path", FILES + EARLIER, ids=lambda path: path.stem)
def test_golden_files_decode_to_the_bit(path: Path) -> None:
    golden, geometry = load(path)
    codes, scales, values = golden["codes"], golden["scales"], golden["table"]
    extent = (geometry.rows, geometry.length)
    found = hyper_format.decode(codes, scales, values, extent, geometry.group)
    assert same(found, golden["decoded"])
    if native.available():
        assert same(native.hyper_decode(codes, scales, values, geometry), golden["decoded"])


@FILE
def test_golden_weights_encode_to_the_byte(path: Path) -> None:
    golden, geometry = load(path)
    made = code_of(path, geometry)
    forms = [hyper_viterbi.encode] + ([native.hyper_encode] if native.available() else [])
    for encode in forms:
        codes, scales = encode(
            golden["weight"], geometry, golden["table"], made.spread, passes=made.passes
        )
        assert same(codes, golden["codes"])
        assert same(scales, golden["scales"])
