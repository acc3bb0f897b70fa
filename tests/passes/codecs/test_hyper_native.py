"""The native encoder and decoder give the bytes of the numpy reference, on any instruction set."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from onnxcomp.errors import CompressionError, RuntimeMissingError
from onnxcomp.passes.codecs.hyper import (
    format as hyper_format,
)
from onnxcomp.passes.codecs.hyper import (
    native,
)
from onnxcomp.passes.codecs.hyper import (
    viterbi as hyper_viterbi,
)
from onnxcomp.passes.codecs.hyper.format import GroupLayout
from onnxcomp.passes.codecs.hyper.tables import WINDINGS, spread, table
from onnxcomp.passes.weight import Array

pytestmark = pytest.mark.usefixtures("native_library")


def awkward(rows: int, length: int, seed: int) -> Array:
    """Heavy tails, zero rows, huge and tiny rows, constants, impulses."""
    weight = np.random.default_rng(seed).standard_t(3, (rows, length)).astype(np.float32)
    weight[1] = 0
    weight[2] *= 1e-9
    weight[3] *= 1e-13
    weight[4] *= 1000
    weight[5] = 1
    weight[6] = 0
    weight[6, length // 2] = -3
    return weight


def encode_on(
    isa: str, weight: Array, geometry: GroupLayout, threads: int = 1
) -> tuple[Array, Array]:
    trellis = (geometry.bits, geometry.state_bits)
    try:
        return native.hyper_encode(
            weight, geometry, table(*trellis), spread(*trellis), isa=isa, threads=threads
        )
    except CompressionError:
        pytest.skip(f"this machine has no {isa}")


@pytest.mark.parametrize("isa", native.ISAS)
@pytest.mark.parametrize(("bits", "state_bits"), sorted(WINDINGS))
def test_native_encoder_gives_the_bytes_of_the_reference(
    bits: int, state_bits: int, isa: str
) -> None:
    group = {6: 256, 7: 128, 8: 64}.get(state_bits, 32)
    weight = awkward(18, group + 3, bits)
    geometry = GroupLayout(bits, state_bits, group, *weight.shape)
    trellis = (bits, state_bits)
    codes, scales = hyper_viterbi.encode(weight, geometry, table(*trellis), spread(*trellis))
    for threads in (1, 2):
        found = encode_on(isa, weight, geometry, threads)
        assert np.array_equal(found[1].view(np.uint16), scales.view(np.uint16))
        assert np.array_equal(found[0], codes)


def test_calls_for_some_rows_at_a_time_give_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = awkward(70, 131, 4)
    geometry = GroupLayout(4, 7, 64, *weight.shape)
    codes, scales = encode_on("auto", weight, geometry)
    monkeypatch.setattr(native, "_STEPS_AT_ONCE", 40 * 131 << 7)
    pieces = encode_on("auto", weight, geometry)
    assert np.array_equal(pieces[0], codes)
    assert np.array_equal(pieces[1].view(np.uint16), scales.view(np.uint16))


def test_a_signal_ends_a_long_search_soon() -> None:
    weight = np.zeros((16384, 8192), np.float32)  # a minute and more
    geometry = GroupLayout(4, 12, 128, *weight.shape)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs may ignore it
    try:
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        start = time.process_time()
        with pytest.raises(KeyboardInterrupt):
            encode_on("auto", weight, geometry)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("group", hyper_format.GROUPS)
@pytest.mark.parametrize("bits", range(1, 7))
def test_native_decoder_gives_the_values_of_the_reference(bits: int, group: int) -> None:
    rng = np.random.default_rng(bits)
    for state_bits in (8, 12):
        geometry = GroupLayout(bits, state_bits, group, 37, 2 * group + 7)
        codes = rng.integers(0, 256, geometry.codes_shape, np.uint8)
        scales = rng.standard_normal(geometry.scales_shape).astype(np.float16)
        scales[0, 0, :3, 0] = [6e-8, 65504, -0.0]
        values = rng.integers(-127, 128, 1 << state_bits).astype(np.int8)
        extent = (geometry.rows, geometry.length)
        expected = hyper_format.decode(codes, scales, values, extent, group)
        for threads in (1, 2):
            found = native.hyper_decode(codes, scales, values, geometry, threads=threads)
            assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_any_strides_are_read_in_place() -> None:
    weight = awkward(34, 140, 0)
    geometry = GroupLayout(3, 7, 64, *weight.shape)
    expected = encode_on("auto", weight, geometry)
    wide = np.zeros((68, 420), np.float32)
    wide[::2, ::3] = weight
    for same in (wide[::2, ::3], np.asfortranarray(weight), weight[::-1, ::-1].copy()[::-1, ::-1]):
        found = encode_on("auto", same, geometry)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_tensors_that_do_not_fit_are_an_error() -> None:
    geometry = GroupLayout(4, 7, 128, 16, 128)
    codes = np.zeros(geometry.codes_shape, np.uint8)
    scales = np.zeros(geometry.scales_shape, np.float16)
    with pytest.raises(CompressionError, match="do not fit"):
        native.hyper_decode(codes[:, :, 1:], scales, table(4, 7), geometry)
    with pytest.raises(CompressionError, match="does not fit 7 state bits"):
        native.hyper_decode(codes, scales, table(4, 8), geometry)
    with pytest.raises(CompressionError, match="not supported"):
        native.hyper_encode(
            np.zeros((16, 128), np.float32), GroupLayout(4, 7, 96, 16, 128), table(4, 7), 40.0
        )


def test_a_missing_or_foreign_library_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ONNXCOMP_ENCODERS_LIBRARY", str(tmp_path / "absent.so"))
    with pytest.raises(RuntimeMissingError, match=r"absent\.so"):
        native.available()
    foreign = tmp_path / "foreign.so"
    foreign.write_bytes(b"not a library")
    monkeypatch.setenv("ONNXCOMP_ENCODERS_LIBRARY", str(foreign))
    geometry = GroupLayout(4, 7, 128, 16, 128)
    with pytest.raises(RuntimeMissingError, match=r"foreign\.so"):
        native.hyper_encode(np.zeros((16, 128), np.float32), geometry, table(4, 7), 40.0)
