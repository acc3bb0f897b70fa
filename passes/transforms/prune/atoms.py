"""Channels as atoms: which positions of which axes stand or fall together.

Every position of an axis that could be removed is an *atom*. Operators relate atoms: the outputs
of a product are the inputs of the next one, both summands of an addition lose the same channels.
Two relations are enough:

* `same`: two atoms are one channel; if one goes, so does the other.
* `tie`: the atoms of a column of a matrix ``(rows, inner)`` that meet one atom of an axis
  ``(inner,)``, as the positions inside heads meet a vector all heads share. When the column goes,
  it goes in all rows; a whole row may go without it.

A matrix of atoms (heads by positions inside them) stays rectangular: `split` records that a row
goes when all of its elements go, and that rows which stay keep equally many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from onnxcomp.passes.weight import Array

__all__ = ["Atoms", "Block", "Relations", "Split"]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Atoms on one axis of a value, or on several axes together.

    Attributes:
        axes: Axes in ascending order.
        atoms: One atom for each position, of the shape those axes have.
    """

    axes: tuple[int, ...]
    atoms: Array

    def moved(self, axes: Iterable[int]) -> Block:
        """The same atoms on other axes."""
        return Block(tuple(axes), self.atoms)

    def simplified(self) -> Block:
        """Without axes along which all atoms are equal."""
        axes, atoms = list(self.axes), self.atoms
        for place in reversed(range(atoms.ndim)):
            first = atoms.take([0], axis=place)
            if (atoms == first).all():
                atoms = first.squeeze(place)
                del axes[place]
        return Block(tuple(axes), atoms)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Atoms ``(rows, inner)`` with an atom for each row; what is kept must be rectangular."""

    rows: Array
    elements: Array


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Relations:
    """Atoms after all operators were seen.

    Attributes:
        classes: For each atom the number of its class: atoms that are one channel.
        inner: For each atom the number of its class when columns are tied, too.
        splits: Matrices of atoms that must stay rectangular.
        frozen: Reason by class, for classes that must stay.
        frozen_inner: Reason by inner class, for columns that must stay.
    """

    classes: Array
    inner: Array
    splits: tuple[Split, ...]
    frozen: dict[int, str]
    frozen_inner: dict[int, str]


class Atoms:
    """Makes atoms and collects what is known about them."""

    def __init__(self) -> None:
        self._count = 0
        self._same: list[tuple[Array, Array]] = []
        self._tied: list[tuple[Array, Array]] = []
        self._splits: dict[bytes, Split] = {}
        self._frozen: list[tuple[Array, str]] = []
        self._frozen_inner: list[tuple[Array, str]] = []

    def new(self, *shape: int) -> Array:
        """Fresh atoms."""
        count = int(np.prod(shape))
        self._count += count
        return np.arange(self._count - count, self._count).reshape(shape)

    def same(self, left: Array, right: Array) -> None:
        """Declare atoms of equal shapes to be one channel each."""
        assert left.shape == right.shape, (left.shape, right.shape)
        self._same.append((left.ravel(), right.ravel()))

    def columns(self, elements: Array) -> Array:
        """Atoms ``(inner,)`` of an axis that all rows of ``(..., inner)`` share."""
        columns = self.new(elements.shape[-1])
        self.tie(elements, columns)
        return columns

    def tie(self, elements: Array, columns: Array) -> None:
        """Remove positions of ``(..., inner)`` only together with an atom of ``(inner,)``."""
        self.rows(elements)
        self._tied.append((elements.ravel(), np.broadcast_to(columns, elements.shape).ravel()))

    def rows(self, elements: Array) -> Array:
        """Atoms of the leading axes of ``(..., inner)``: each goes with all of its elements."""
        flat = np.ascontiguousarray(elements.reshape(-1, elements.shape[-1]))
        key = str(elements.shape).encode() + flat.tobytes()
        if key not in self._splits:
            rows = self.new(len(flat))
            self._splits[key] = Split(rows, flat)
            if elements.ndim > 2:
                self.rows(rows.reshape(elements.shape[:-1]))
        return self._splits[key].rows.reshape(elements.shape[:-1])

    def freeze(self, atoms: Array, reason: str) -> None:
        """Keep atoms, and the rows and columns they are in."""
        if atoms.size:
            self._frozen.append((atoms.ravel(), reason))

    def freeze_columns(self, atoms: Array, reason: str) -> None:
        """Keep atoms as columns; whole rows may go all the same."""
        if atoms.size:
            self._frozen_inner.append((atoms.ravel(), reason))

    def settle(self) -> Relations:
        """Classes of atoms and what is frozen."""
        classes = self._components(self._same)
        inner = self._components([*self._same, *self._tied])
        frozen = {int(c): why for a, why in reversed(self._frozen) for c in np.unique(classes[a])}
        columns = {
            int(c): why for a, why in reversed(self._frozen_inner) for c in np.unique(inner[a])
        }
        return Relations(classes, inner, tuple(self._splits.values()), frozen, columns)

    def _components(self, pairs: list[tuple[Array, Array]]) -> Array:
        """Numbers of the connected components: the least atom spreads until nothing changes."""
        left = np.concatenate([np.zeros(0, np.int64), *(pair[0] for pair in pairs)])
        right = np.concatenate([np.zeros(0, np.int64), *(pair[1] for pair in pairs)])
        least = np.arange(self._count)
        while True:
            before = least.copy()
            low = np.minimum(least[left], least[right])
            for ends in (left, right):
                np.minimum.at(least, least[ends], low)
                np.minimum.at(least, ends, low)
            least = least[least]
            if np.array_equal(least, before):
                return np.asarray(np.unique(least, return_inverse=True)[1])
