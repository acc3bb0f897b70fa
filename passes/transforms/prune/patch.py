"""Patches: what must be written anew when channels go, noted by the rules for the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.transforms.prune.atoms import Block
from onnxcomp.passes.weight import Array

__all__ = ["Editor", "Heads", "Patch"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """Atoms of one attention: ``(heads, size)`` for queries, keys and values."""

    query: Array
    key: Array
    value: Array

    def repeated(self, atoms: Array) -> Array:
        """Atoms of key or value heads, once for each query head that reads them."""
        return np.repeat(atoms, len(self.query) // len(atoms), axis=0)


class Editor(Protocol):
    """The edits a patch may ask for; what atoms go is known to whoever carries them out."""

    def resize(self, node: ir.Node, index: int, out: ir.Value, blocks: Sequence[Block]) -> None:
        """Write the sizes of labelled axes of the output into a shape input."""
        ...

    def pick(self, node: ir.Node, index: int, axis: int, atoms: Array) -> None:
        """Read only the kept positions of a computed value."""
        ...

    def group(self, node: ir.Node, grouped: Array) -> None:
        """Groups of a convolution: those of which anything is kept."""
        ...

    def split(self, node: ir.Node, axis: int, pieces: Sequence[Sequence[Block]]) -> None:
        """Sizes of the pieces of a Split."""
        ...

    def slice(self, node: ir.Node, place: int, before: Block, inside: Block) -> None:
        """Bounds of a Slice of channels."""
        ...

    def reorder(self, node: ir.Node, index: int, block: Block, wanted: Array) -> None:
        """Numbers of channels that a Gather picks."""
        ...

    def pad(self, node: ir.Node, axis: int, rank: int, sides: tuple[Array, Array]) -> None:
        """Channels of zeros that a Pad adds."""
        ...

    def shape(self, node: ir.Node, blocks: Sequence[Block]) -> None:
        """Let `Shape` return the sizes of the original model."""
        ...

    def attention(self, node: ir.Node, heads: Heads) -> None:
        """Numbers and sizes of heads, and the scale that goes with the original size."""
        ...


Patch = Callable[[Editor], None]
