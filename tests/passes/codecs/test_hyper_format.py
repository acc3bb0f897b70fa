"""hyper_format against a deliberately naive reading of ops/hyper/spec.md, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcomp.passes.codecs.hyper import format as hyper_format
from onnxcomp.passes.codecs.hyper.tables import WINDINGS, table
from onnxcomp.passes.weight import Array

BENT = (1, 1, 1, -1, 1, 1, 1, -1, 1, 1, 1, -1, -1, -1, -1, 1)


def naive_states(codes: Array, state_bits: int, group: int, row: int, index: int) -> list[int]:
    panel, lane = divmod(row, 16)
    string = [int(octet) for dword in codes[panel, index, :, lane, :] for octet in dword]
    bit = [(string[i // 8] >> (i % 8)) & 1 for i in range(8 * len(string))]
    k = len(bit) // group
    return [
        sum(bit[((t + 1) * k - state_bits + j) % len(bit)] << j for j in range(state_bits))
        for t in range(group)
    ]


def naive_weight(
    codes: Array, scales: Array, values: Array, group: int, row: int, col: int
) -> float:
    index, t = divmod(col, group)
    state_bits = len(values).bit_length() - 1
    window = naive_states(codes, state_bits, group, row, index)
    h = sum((-1) ** bin(t & j).count("1") * int(values[s]) for j, s in enumerate(window))
    h *= BENT[t // 16] * BENT[t % 16]
    panel, lane = divmod(row, 16)
    factor = np.float32(scales[panel, index, lane, 0]) * np.float32(2.0**-12)
    return float(np.float32(h) * factor)


def random_payload(
    rng: np.random.Generator, bits: int, group: int, rows: int, length: int
) -> tuple[Array, Array]:
    geometry = hyper_format.GroupLayout(bits, 8, group, rows, length)
    codes = rng.integers(0, 256, geometry.codes_shape, np.uint8)
    scales = rng.normal(size=geometry.scales_shape).astype(np.float16)
    return codes, scales


@pytest.mark.parametrize(("bits", "state_bits"), sorted(WINDINGS))
def test_states_are_the_windows_of_the_specification(bits: int, state_bits: int) -> None:
    rng = np.random.default_rng(bits * 16 + state_bits)
    for group in (32, 128):
        codes, _ = random_payload(rng, bits, group, 17, 2 * group)
        found = hyper_format.states(codes, state_bits, group)
        for row, index in ((0, 0), (15, 1), (16, 0)):
            expected = naive_states(codes, state_bits, group, row, index)
            assert found[row, index].tolist() == expected


@pytest.mark.parametrize("group", hyper_format.GROUPS)
@pytest.mark.parametrize("bits", range(1, 7))
def test_decode_equals_the_specification(bits: int, group: int) -> None:
    rng = np.random.default_rng(bits)
    rows, length = 19, group + 5
    codes, scales = random_payload(rng, bits, group, rows, length)
    values = table(bits, 8)
    found = hyper_format.decode(codes, scales, values, (rows, length), group)
    assert found.shape == (rows, length)
    assert found.dtype == np.float32
    for row, col in ((0, 0), (7, group - 1), (15, 31), (16, 16), (18, group + 4)):
        assert found[row, col] == naive_weight(codes, scales, values, group, row, col)


def test_decode_in_chunks_equals_decode_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scales = random_payload(np.random.default_rng(0), 3, 64, 100, 200)
    whole = hyper_format.decode(codes, scales, table(3, 7), (100, 200), 64)
    monkeypatch.setattr(hyper_format, "_CHUNK", 1)
    assert np.array_equal(whole, hyper_format.decode(codes, scales, table(3, 7), (100, 200), 64))


@pytest.mark.parametrize("bits", range(1, 7))
def test_unpack_inverts_pack_and_padding_lanes_are_zero(bits: int) -> None:
    symbols = np.random.default_rng(1).integers(0, 1 << bits, (21, 3, 64)).astype(np.uint8)
    codes = hyper_format.pack(symbols, bits)
    assert codes.shape == hyper_format.GroupLayout(bits, 8, 64, 21, 192).codes_shape
    unpacked = hyper_format.unpack(codes, bits)
    assert np.array_equal(unpacked[:21], symbols)
    assert not unpacked[21:].any()


def test_symbol_t_is_the_top_of_state_t() -> None:
    symbols = np.random.default_rng(2).integers(0, 8, (16, 1, 32)).astype(np.uint8)
    window = hyper_format.states(hyper_format.pack(symbols, 3), 7, 32)
    assert np.array_equal(window >> 4, symbols)
    assert np.array_equal(window & 0xF, np.roll(window, 1, axis=-1) >> 3)


@pytest.mark.parametrize("group", hyper_format.GROUPS)
@pytest.mark.parametrize(
    ("bits", "state_bits"), [(1, 12), (2, 7), (4, 7), (6, 8), (6, 12), (5, 10)]
)
def test_shared_tensors_decode_like_the_reference(bits: int, state_bits: int, group: int) -> None:
    rows, length = 20, 2 * group - 3
    codes, scales = random_payload(np.random.default_rng(3), bits, group, rows, length)
    tensors = list(hyper_format.shared_tensors(bits, state_bits, group, rows, length).values())
    values, extent, blocks, taps, window, left, right = tensors
    assert extent.tolist() == [rows, length]
    assert blocks[3] == 2 * group
    octets = codes.transpose(0, 3, 1, 2, 4).reshape(blocks[:3])
    matrix = window[taps].reshape(blocks[2], group)
    found = octets.astype(np.float32) @ matrix
    found = np.mod(np.floor(found), 1 << state_bits).astype(np.int64)
    h = values.astype(np.float32)[found].reshape(*octets.shape[:2], group // 16, 16)
    w = np.einsum("rgab,axcy,xbzy->rgcy", h, left, right, optimize=False)
    factor = scales.transpose(0, 2, 1, 3).reshape(*octets.shape[:2], 1).astype(np.float32)
    w = (w.reshape(*octets.shape[:2], group) * factor).reshape(len(octets), -1)[:rows, :length]
    assert np.array_equal(w, hyper_format.decode(codes, scales, values, (rows, length), group))


def test_equal_keys_mean_equal_content() -> None:
    seen: dict[str, Array] = {}
    for bits, state_bits in sorted(WINDINGS):
        for group in hyper_format.GROUPS:
            for rows, length in ((384, 384), (384, 1536), (1536, 384), (100, 257)):
                tensors = hyper_format.shared_tensors(bits, state_bits, group, rows, length)
                for key, tensor in tensors.items():
                    known = seen.setdefault(key, tensor)
                    assert known.dtype == tensor.dtype
                    assert np.array_equal(known, tensor)


@pytest.mark.parametrize("size", [2, 16, 128, 256])
def test_hadamard_is_symmetric_and_orthogonal(size: int) -> None:
    matrix = hyper_format.hadamard(size)
    assert np.array_equal(matrix, matrix.T)
    assert np.array_equal(matrix @ matrix, size * np.eye(size, dtype=np.float32))
    assert matrix[3 % size, 1] == -1
