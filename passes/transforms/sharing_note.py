"""The note by which the compiler finds memories again in a model whose weights were multiplied out.

It is the metadata entry `KEY`: memories, and the weights that lie in them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.codecs.hash.format import ChunkLayout, Sharing, seeds

__all__ = ["KEY", "Layer", "Memory", "read_note", "write_note"]

KEY = "onnxcomp.sharing"


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """One weight that lies in a memory.

    Attributes:
        rows: Rows of the weight as it was trained.
        length: Its columns.
        base: Number of its first tile.
        scale: Factor of its entries, float32.
    """

    rows: int
    length: int
    base: int
    scale: float


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """A memory and the weights that lie in it.

    Attributes:
        slots: Slots of 256 entries.
        seed: Seed of rotations and signs.
        layers: The weights, each once.
        map: "fold" for slots in order, "roast" for slots hashed one by one.
    """

    slots: int
    seed: int
    layers: tuple[Layer, ...]
    map: str = "fold"

    def sharing(self, layer: Layer) -> Sharing:
        """The map of one weight."""
        rotate, sign = seeds(self.seed)
        return Sharing(self.slots if self.map == "fold" else 1, rotate, sign, layer.base)


def write_note(model: ir.Model, memories: Sequence[Memory]) -> None:
    """Record the memories in a model's metadata."""
    entry = {"version": 1, "memories": [dataclasses.asdict(memory) for memory in memories]}
    model.metadata_props[KEY] = json.dumps(entry, separators=(",", ":"))


def read_note(model: ir.Model) -> tuple[Memory, ...]:
    """The memories that a model's metadata names; empty where it names none.

    Raises:
        ModelError: The entry is damaged.
    """
    text = model.metadata_props.get(KEY)
    if text is None:
        return ()
    try:
        entry = json.loads(text)
        return tuple(_memory(values) for values in entry["memories"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(
            f"the metadata entry {KEY!r} is damaged: {error}",
            hint="export the model again, or remove the entry",
        ) from error


def _memory(values: Mapping[str, Any]) -> Memory:
    layers = tuple(Layer(**layer) for layer in values["layers"])
    numbers = [values["slots"], values["seed"]]
    numbers += [n for layer in layers for n in (layer.rows, layer.length, layer.base)]
    if not all(isinstance(n, int) and 0 <= n < 2**31 for n in numbers) or values["slots"] < 1:
        raise ValueError(f"sizes {numbers[:8]} are out of range")
    if not all(layer.rows and layer.length and layer.scale > 0 for layer in layers):
        raise ValueError("a layer has no size or no scale")
    spans = sorted((x.base, x.base + ChunkLayout(x.rows, x.length).tiles) for x in layers)
    if any(end > first for (_, end), (first, _) in itertools.pairwise(spans)):
        raise ValueError("layers overlap in their memory")
    kind = values.get("map", "fold")
    if kind not in ("fold", "roast"):
        raise ValueError(f"map {kind!r} is unknown")
    return Memory(values["slots"], values["seed"], layers, kind)
