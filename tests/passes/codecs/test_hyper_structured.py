"""Structured tables: bytes, quality, and where they are used."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.hyper import native
from onnxcomp.passes.codecs.hyper import viterbi as hyper_viterbi
from onnxcomp.passes.codecs.hyper.codec import HyperCodec, HyperParams
from onnxcomp.passes.codecs.hyper.format import GroupLayout
from onnxcomp.passes.codecs.hyper.structured import (
    STRUCTURES,
    TARGETS,
    code,
    structured_table,
)
from onnxcomp.passes.codecs.hyper.tables import NORMAL_SQNR
from onnxcomp.passes.weight import Array, Use, WeightSite

DIGEST = "f1ca5837710ab309cc6723da17cdbb5354d613d7d3d4d3257db1ad0521b9fafd"
BITS = pytest.mark.parametrize("bits", sorted(STRUCTURES))
CODEC = HyperCodec()


def site_of(rows: int, length: int) -> WeightSite:
    use = Use("n", "MatMul", 1, "matmul")
    return WeightSite("w", (rows, length), "float32", (use,), "", rows, length, False)


def test_tables_are_the_pinned_ones() -> None:
    digest = hashlib.sha256()
    for bits in sorted(STRUCTURES):
        digest.update(structured_table(STRUCTURES[bits]).tobytes())
    assert digest.hexdigest() == DIGEST


@BITS
def test_a_table_is_the_sum_of_two_small_ones(bits: int) -> None:
    structure = STRUCTURES[bits]
    table = code(bits, 7, "structured").table.astype(int)
    assert len(table) == 1 << structure.state_bits
    for state, value in enumerate(table):
        top, low = state >> (structure.state_bits - 4), state & 15
        cell = structure.cells[(top + structure.turns[low]) % 16]
        total = cell + structure.steps[low]
        assert 0 <= total <= structure.limit
        assert value == 2 * total - structure.limit
    with pytest.raises(ValueError, match="read-only"):
        code(bits, 7, "structured").table[0] = 1


@BITS
def test_windows_of_the_table_are_windows_of_weights(bits: int) -> None:
    assert (STRUCTURES[bits].state_bits - 4) % bits == 0


@BITS
def test_normal_data_is_coded_as_predicted_and_nearly_as_well_as_by_a_winding(bits: int) -> None:
    rows = 128 if native.available() else 16
    weight = np.random.default_rng(11).standard_normal((rows, 1024)).astype(np.float32)
    site, params = site_of(*weight.shape), HyperParams(bits, table="structured")
    error = CODEC.decode(site, CODEC.encode(site, weight, params, threads=2)) - weight
    found = 10 * np.log10(np.square(weight).sum() / np.square(error).sum())
    assert found == pytest.approx(STRUCTURES[bits].sqnr, abs=0.1)
    # 0.21 dB are 5 % of the error's power.
    assert STRUCTURES[bits].sqnr > NORMAL_SQNR[bits, 7] - 0.21


@BITS
@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.usefixtures("native_library")
def test_native_encoder_gives_the_bytes_of_the_reference(bits: int, isa: str) -> None:
    weight = np.random.default_rng(bits).standard_t(3, (18, 131)).astype(np.float32)
    made = code(bits, 7, "structured")
    geometry = GroupLayout(bits, STRUCTURES[bits].state_bits, 64, *weight.shape)
    want = hyper_viterbi.encode(weight, geometry, made.table, made.spread, passes=made.passes)
    try:
        found = native.hyper_encode(
            weight, geometry, made.table, made.spread, passes=made.passes, isa=isa
        )
    except Exception as error:
        pytest.skip(f"this machine has no {isa}: {error}")
    for a, b in zip(want, found, strict=True):
        assert a.tobytes() == b.tobytes()


def test_plans_of_windings_read_as_before() -> None:
    assert HyperParams(3).to_json() == {"bits": 3, "state_bits": 7, "group": 128}
    assert HyperParams(3, table="structured").to_json()["table"] == "structured"


def test_a_payload_names_its_table_by_its_kind() -> None:
    site = site_of(16, 128)
    keys = {
        kind: [key for key in CODEC.shared(site, HyperParams(4, table=kind)) if "table" in key]
        for kind in ("winding", "structured")
    }
    assert keys == {
        "winding": ["hyper.table.k4.L7"],
        "structured": ["hyper.table.k4.L8.structured"],
    }


@pytest.mark.parametrize("bits", [1, 5, 6])
def test_where_no_table_is_structured_a_winding_serves(bits: int) -> None:
    site = site_of(16, 128)
    weight = np.random.default_rng(bits).standard_normal((16, 128)).astype(np.float32)
    state_bits = 8 if bits == 6 else 7

    def stored(kind: str) -> tuple[dict[str, bytes], list[str]]:
        payload = CODEC.encode(site, weight, HyperParams(bits, state_bits, table=kind))
        return {k: v.tobytes() for k, v in payload.tensors.items()}, list(payload.shared)

    assert stored("structured") == stored("winding")


def test_an_unknown_kind_is_refused_with_the_kinds_there_are() -> None:
    with pytest.raises(UsageError, match="table=random") as caught:
        CODECS["hyper"].check(HyperParams(table="random"))
    assert "winding and structured" in caught.value.hint


def test_every_target_has_its_kind() -> None:
    for target, kind in TARGETS.items():
        assert CODEC.targeted(HyperParams(3), target) == HyperParams(3, table=kind)
    with pytest.raises(UsageError, match="'mips'"):
        CODEC.targeted(HyperParams(), "mips")


def calibrated_error(kind: str, weight: Array) -> float:
    """Error of products with correlated inputs, relative."""
    from onnxcomp.passes.weight import Stats

    rng = np.random.default_rng(5)
    x = rng.standard_normal((4096, 128)) @ (np.eye(128) + 0.1 * rng.standard_normal((128, 128)))
    x *= np.linspace(0.2, 2.0, 128)
    gram = x.T @ x / len(x)
    site = site_of(*weight.shape)
    stats = Stats(site, len(x), gram, x.mean(axis=0))
    params = HyperParams(4, table=kind)
    payload = CODEC.encode_calibrated(site, weight, params, stats)
    error = CODEC.decode(site, payload) - weight
    return float(
        np.einsum("ij,jk,ik->", error, gram, error) / np.einsum("ij,jk,ik->", weight, gram, weight)
    )


@pytest.mark.usefixtures("native_library")
def test_calibration_serves_structured_tables_as_well() -> None:
    weight = np.random.default_rng(6).standard_normal((64, 128)).astype(np.float32)
    assert calibrated_error("structured", weight) < 1.1 * calibrated_error("winding", weight)
