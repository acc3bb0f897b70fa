"""Storage format of the hyperfunction codec in numpy: the executable form of ops/hyper/spec.md.

Names: a weight is ``(rows, length)``, cut along `length` into G groups of `group` weights; rows
are stored in P panels of 16 lanes. `bits` is k and `state_bits` is L of the specification.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import numpy as np

from onnxcomp.passes.codecs.hyper.structured import STRUCTURES, code, kind_of
from onnxcomp.passes.weight import Array

__all__ = [
    "GROUPS",
    "LANES",
    "NODE_INPUTS",
    "SCALE_UNIT",
    "STATE_BITS",
    "GroupLayout",
    "decode",
    "flat",
    "hadamard",
    "pack",
    "pack_scales",
    "shared_extent",
    "shared_keys",
    "shared_tensors",
    "signs",
    "states",
    "unpack",
]

LANES = 16
GROUPS = (32, 64, 128, 256)
STATE_BITS = (6, 7, 8, 10, 12)
SCALE_UNIT = np.float32(2.0**-12)

# Names of the weight's inputs of every operator, in the order of spec.md section 4. The first two
# are the weight's own tensors, the others are shared by weights with equal parameters.
NODE_INPUTS = ("codes", "scales", "table", "extent", "blocks", "taps", "window", "left", "right")

# The bent function x0 x1 + x2 x3, as signs.
_BENT = np.array([1, 1, 1, -1, 1, 1, 1, -1, 1, 1, 1, -1, -1, -1, -1, 1], np.float32)

# End of a slice that keeps the whole axis; ONNX Runtime removes such a slice.
_NO_END = 2**63 - 1

# Weights decoded at a time: bounds the memory of `decode` beyond its result.
_CHUNK = 1 << 19


@dataclasses.dataclass(frozen=True, slots=True)
class GroupLayout:
    """Sizes that follow from the parameters and the extent of one weight.

    Attributes:
        bits: Bits per weight, k.
        state_bits: Bits of a state, L.
        group: Weights of a group, g.
        rows: Rows of the weight.
        length: Columns of the weight.
    """

    bits: int
    state_bits: int
    group: int
    rows: int
    length: int

    @property
    def panels(self) -> int:
        """Panels of 16 rows, P."""
        return -(-self.rows // LANES)

    @property
    def groups(self) -> int:
        """Groups of one row, G."""
        return -(-self.length // self.group)

    @property
    def block_bytes(self) -> int:
        """Bytes of the bit string of one (row, group)."""
        return self.group * self.bits // 8

    @property
    def codes_shape(self) -> tuple[int, int, int, int, int]:
        """Shape (P, G, D, 16, 4) of the codes."""
        return (self.panels, self.groups, self.block_bytes // 4, LANES, 4)

    @property
    def scales_shape(self) -> tuple[int, int, int, int]:
        """Shape (P, G, 16, 1) of the scales."""
        return (self.panels, self.groups, LANES, 1)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.panels * self.groups * LANES * (self.block_bytes + 2)


def flat(tensor: Array, rows: int) -> Array:
    """Codes or scales of rows with several groups, laid out as rows of one group each.

    Args:
        tensor: ``(P, G, D, 16, 4)`` or ``(P, G, 16, 1)``.
        rows: Rows before.

    Returns:
        The same for ``rows * G`` rows, ``(P', 1, ...)``; lanes past the last row are zero.
    """
    groups = np.moveaxis(tensor, -2, 1)  # (P, 16, G, ...)
    groups = groups.reshape(-1, *groups.shape[2:])[:rows]
    groups = groups.reshape(-1, *groups.shape[2:])
    padded = np.zeros((-(-len(groups) // LANES) * LANES, *groups.shape[1:]), tensor.dtype)
    padded[: len(groups)] = groups
    panels = padded.reshape(-1, LANES, *padded.shape[1:])
    return np.ascontiguousarray(np.moveaxis(panels, 1, -2)[:, None])


@functools.cache
def signs(group: int) -> Array:
    """Signs of the weights of a group: float32 ``(group,)`` of +-1, read-only."""
    result = np.outer(_BENT, _BENT).reshape(-1)[:group].copy()
    result.flags.writeable = False
    return result


@functools.cache
def hadamard(size: int) -> Array:
    """Sylvester matrix, ``H[i, j] = (-1)^popcount(i & j)``: float32 ``(size, size)``, read-only."""
    result = np.ones((1, 1), np.float32)
    while len(result) < size:
        result = np.block([[result, result], [result, -result]])
    result.flags.writeable = False
    return result


def pack(symbols: Array, bits: int) -> Array:
    """Lay symbols out as the tensor `codes`.

    Args:
        symbols: Symbols below ``2**bits``, uint8 ``(rows, G, group)``.
        bits: Bits of a symbol.

    Returns:
        Codes, uint8 ``(P, G, D, 16, 4)``; lanes past the last row are zero.
    """
    rows, groups, group = symbols.shape
    panels = -(-rows // LANES)
    string = ((symbols[..., None] >> np.arange(bits, dtype=np.uint8)) & 1).astype(np.uint8)
    octets = np.packbits(string.reshape(rows, groups, group * bits), axis=-1, bitorder="little")
    full = np.zeros((panels * LANES, groups, octets.shape[-1]), np.uint8)
    full[:rows] = octets
    split = full.reshape(panels, LANES, groups, -1, 4)
    return np.ascontiguousarray(split.transpose(0, 2, 3, 1, 4))


def pack_scales(scales: Array) -> Array:
    """Lay scales ``(rows, G)`` out as the tensor `scales`: float16 ``(P, G, 16, 1)``."""
    rows, groups = scales.shape
    panels = -(-rows // LANES)
    full = np.zeros((panels * LANES, groups), np.float16)
    full[:rows] = scales
    split = full.reshape(panels, LANES, groups).transpose(0, 2, 1)
    return np.ascontiguousarray(split)[..., None]


def _blocks(codes: Array) -> Array:
    """Bit strings as bytes: codes (P, G, D, 16, 4) -> uint8 (P, 16, G, 4 D)."""
    panels, groups, dwords = codes.shape[:3]
    return codes.transpose(0, 3, 1, 2, 4).reshape(panels, LANES, groups, dwords * 4)


def unpack(codes: Array, bits: int) -> Array:
    """Inverse of `pack`: symbols, uint8 ``(16 P, G, group)``."""
    blocks = _blocks(codes)
    panels, _, groups, _ = blocks.shape
    string = np.unpackbits(blocks, axis=-1, bitorder="little")
    string = string.reshape(panels * LANES, groups, -1, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return np.asarray((string * weights).sum(axis=-1, dtype=np.uint8))


def states(codes: Array, state_bits: int, group: int) -> Array:
    """State of every weight: uint16 ``(16 P, G, group)``.

    The state of weight t is the cyclic window of `state_bits` bits that ends with symbol t.

    Args:
        codes: uint8 ``(P, G, D, 16, 4)``.
        state_bits: Bits of a state.
        group: Weights of a group.
    """
    blocks = _blocks(codes)
    panels, _, groups, size = blocks.shape
    bits = size * 8 // group
    first = ((np.arange(group) + 1) * bits - state_bits) % (size * 8)
    octet, shift = first // 8, (first % 8).astype(np.uint32)
    # At most 7 + 12 bits: three bytes hold every window.
    window = blocks[..., octet].astype(np.uint32)
    window |= blocks[..., (octet + 1) % size].astype(np.uint32) << np.uint32(8)
    window |= blocks[..., (octet + 2) % size].astype(np.uint32) << np.uint32(16)
    window >>= shift
    window &= np.uint32((1 << state_bits) - 1)
    return window.astype(np.uint16).reshape(panels * LANES, groups, group)


def _decode_panels(codes: Array, scales: Array, table: Array, group: int) -> Array:
    """Decode whole panels: float32 (16 P, G * group)."""
    state_bits = len(table).bit_length() - 1
    panels, groups = codes.shape[:2]
    values = table.astype(np.float32)[states(codes, state_bits, group)]
    # Integers below 2^15: exact in float32 whatever the order of summation.
    # Adding zero turns the product -1 * 0 into the integer zero of the specification.
    values = (values.reshape(-1, group) @ hadamard(group)) * signs(group) + np.float32(0)
    factor = scales.reshape(panels, groups, LANES).transpose(0, 2, 1).astype(np.float32)
    values = values.reshape(panels * LANES, groups, group)
    values *= factor.reshape(panels * LANES, groups, 1) * SCALE_UNIT
    return values.reshape(panels * LANES, groups * group)


def decode(codes: Array, scales: Array, table: Array, extent: tuple[int, int], group: int) -> Array:
    """Decode a weight. This is the definition of spec.md section 2.

    Args:
        codes: uint8 ``(P, G, D, 16, 4)``.
        scales: float16 ``(P, G, 16, 1)``.
        table: int8 ``(2**state_bits,)``.
        extent: ``(rows, length)`` of the weight.
        group: Weights of a group.

    Returns:
        float32 ``(rows, length)``.
    """
    rows, length = extent
    result = np.empty((rows, length), np.float32)
    step = max(1, _CHUNK // (LANES * codes.shape[1] * group))
    for panel in range(0, codes.shape[0], step):
        part = slice(panel, panel + step)
        block = _decode_panels(codes[part], scales[part], table, group)
        target = result[panel * LANES : (panel + step) * LANES]
        target[:] = block[: len(target), :length]
    return result


def _taps(bits: int, group: int) -> Array:
    """Row of `_window` that byte b of a block has for the weights 8 j .. 8 j + 7: uint8 (B, g/8).

    Eight weights tap two bytes before their own k; all other bytes get the row of zeros.
    """
    size = group * bits // 8
    steps = np.arange(size)[:, None] - np.arange(group // 8)[None, :] * bits + 2
    return np.asarray(np.minimum(steps % size, bits + 2), np.uint8)


def _window(bits: int, state_bits: int) -> Array:
    """Weights (k + 3, 8) that turn tapped bytes into states, up to a floor and a remainder."""
    result = np.zeros((bits + 3, 8), np.float32)
    for index in range(8):
        last = (index + 1) * bits
        first = last - state_bits
        for byte in range(bits + 2):
            low = 8 * (byte - 2)
            if low < last and low + 8 > first:
                result[byte, index] = 2.0 ** (low - first)
    return result


def _left(group: int) -> Array:
    """Factor H_(g/16)[i, j] a[j] of the rotation: float32 (g/16, 1, g/16, 1)."""
    size = group // 16
    return (hadamard(size) * _BENT[:size])[:, None, :, None]


def _right() -> Array:
    """Factor H_16[i, j] b[j] 2^-12 of the rotation: float32 (1, 16, 1, 16)."""
    return (hadamard(16) * _BENT * SCALE_UNIT)[None, :, None, :]


def _ends(geometry: GroupLayout) -> tuple[int, int]:
    """Where the padded matrix is cut. An axis without padding has no end, so nothing copies it."""
    sizes = (geometry.rows, geometry.length)
    padded = (geometry.panels * LANES, geometry.groups * geometry.group)
    rows, length = (_NO_END if a == b else a for a, b in zip(sizes, padded, strict=True))
    return rows, length


def shared_extent(geometry: GroupLayout) -> tuple[str, Array]:
    """The shared node input `extent` of a weight, and its key in ``payload.shared``."""
    ends = _ends(geometry)
    text = "x".join("all" if end == _NO_END else str(end) for end in ends)
    return f"hyper.extent.{text}", np.array(ends, np.int64)


def shared_keys(
    bits: int, state_bits: int, group: int, rows: int, length: int, kind: str = "winding"
) -> dict[str, str]:
    """Key in ``payload.shared`` of every shared node input, by input name in the spec's order.

    Equal keys mean equal content, in any model.
    """
    geometry = GroupLayout(bits, state_bits, group, rows, length)
    suffix = ""
    if kind_of(bits, kind) == "structured":
        edition = STRUCTURES[bits].edition
        suffix = f".{kind}{edition}" if edition > 1 else f".{kind}"
    return {
        "table": f"hyper.table.k{bits}.L{state_bits}{suffix}",
        "extent": shared_extent(geometry)[0],
        "blocks": f"hyper.blocks.{geometry.groups}x{geometry.block_bytes}.g{group}",
        "taps": f"hyper.taps.k{bits}.g{group}",
        "window": f"hyper.window.k{bits}.L{state_bits}",
        "left": f"hyper.left.g{group}",
        "right": "hyper.right",
    }


def shared_tensors(
    bits: int, state_bits: int, group: int, rows: int, length: int, kind: str = "winding"
) -> Mapping[str, Array]:
    """Shared tensors of a weight by the keys of `shared_keys`, in the spec's order."""
    geometry = GroupLayout(bits, state_bits, group, rows, length)
    width = geometry.groups * group
    content = {
        "table": code(bits, state_bits, kind).table,
        "extent": shared_extent(geometry)[1],
        "blocks": np.array([-1, geometry.groups, geometry.block_bytes, width], np.int64),
        "taps": _taps(bits, group),
        "window": _window(bits, state_bits),
        "left": _left(group),
        "right": _right(),
    }
    keys = shared_keys(bits, state_bits, group, rows, length, kind)
    return {keys[name]: content[name] for name in keys}
