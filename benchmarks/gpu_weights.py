"""Random weights for the CUDA kernels: any bits are a valid payload."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from gpu_calls import MEMORY_TYPES, HashWeight, HyperWeight

from onnxcomp.passes.codecs.hash import format as hash_format
from onnxcomp.passes.codecs.hyper import format as hyper_format

__all__ = ["HashCase", "HyperCase", "hash_case", "hyper_case"]

Array = np.ndarray[Any, Any]
# Puts an array where kernels read, keeps it there, and returns its address.
Place = Callable[[Array], int]


@dataclasses.dataclass(frozen=True)
class HyperCase:
    """A weight of the codec hyper."""

    geometry: hyper_format.GroupLayout
    codes: Array
    scales: Array
    table: Array

    def dense(self) -> Array:
        """The definition of the weight, (rows, length) float32."""
        extent = (self.geometry.rows, self.geometry.length)
        return hyper_format.decode(self.codes, self.scales, self.table, extent, self.geometry.group)

    def weight(self, place: Place) -> HyperWeight:
        """The weight as kernels take it, without levels."""
        of = self.geometry
        return HyperWeight(
            of.rows, of.length, of.group, of.bits, of.state_bits,
            place(self.codes), place(self.scales), place(self.table), None,
        )  # fmt: skip


def hyper_case(
    rows: int,
    length: int,
    *,
    bits: int = 4,
    states: int = 7,
    group: int = 128,
    leveled: bool = False,
    seed: int = 0,
) -> HyperCase:
    """A random weight; `leveled` gives a table of more than 256 states only 256 levels."""
    rng = np.random.default_rng([seed, rows, length, bits, states, group])
    geometry = hyper_format.GroupLayout(bits, states, group, rows, length)
    table = rng.integers(-127, 128, 1 << states).astype(np.int8)
    if leveled:
        multiplier = 2 * int(rng.integers(1 << (states - 1))) + 1
        places = multiplier * np.arange(1 << states) + (multiplier - 1) // 2
        values = np.concatenate([-table[:128], table[127::-1]])
        table = values[(places % (1 << states)) >> (states - 8)]
    codes = rng.integers(0, 256, geometry.codes_shape, np.uint8)
    scales = rng.normal(0.0, 0.5, geometry.scales_shape).astype(np.float16)
    return HyperCase(geometry, codes, scales, np.ascontiguousarray(table))


@dataclasses.dataclass(frozen=True)
class HashCase:
    """A weight of the codec hash; `codes` is None where chunks do not choose."""

    geometry: hash_format.ChunkLayout
    sharing: hash_format.Sharing
    memory: Array
    scale: Array
    codes: Array | None

    def dense(self) -> Array:
        """The definition of the weight, (rows, length) float32."""
        return hash_format.expand(self.memory, self.scale, self.geometry, self.sharing, self.codes)

    def weight(self, place: Place) -> HashWeight:
        """The weight as kernels take it."""
        codes = 0 if self.codes is None else place(self.codes)
        kind = MEMORY_TYPES[self.memory.dtype.name]
        numbers = [int(number) for number in self.sharing.array()]
        return HashWeight(
            self.geometry.rows, self.geometry.length, len(self.memory), self.memory.shape[1], kind,
            place(self.memory), codes, float(self.scale[0]), (ctypes.c_int64 * 6)(*numbers),
        )  # fmt: skip


def hash_case(
    rows: int,
    length: int,
    *,
    chunk: int = 256,
    slots: int = 3,
    run: int | None = None,
    base: int = 0,
    stride: int = 0,
    signed: bool = True,
    memory: str = "float16",
    seed: int = 0,
) -> HashCase:
    """A random weight; with a `stride`, chunks choose among candidates."""
    rng = np.random.default_rng([rows, length, chunk, slots, seed])
    geometry = hash_format.ChunkLayout(rows, length, chunk)
    rotate, sign = hash_format.seeds(seed)
    sharing = hash_format.Sharing(run or slots, rotate, sign if signed else None, base, stride)
    if memory == "int8":
        values = rng.integers(-127, 128, (slots, chunk)).astype(np.int8)
    else:
        values = rng.standard_normal((slots, chunk)).astype(memory)
    shape = (geometry.panels, geometry.blocks, geometry.parts)
    codes = rng.integers(0, 256, shape).astype(np.uint8) if stride else None
    scale = 0.01 if memory == "int8" else 0.37
    return HashCase(geometry, sharing, values, np.array([scale], np.float32), codes)
