"""What can be removed: groups of candidates, each a set of classes of atoms.

* *channels*: neurons, convolution channels; each may go alone.
* *heads*: whole rows of split axes, with everything inside them.
* *inner*: positions inside heads. Each head loses equally many, its own ones where nothing ties
  the heads together, so that a group has one slot of candidates for each head.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from onnxcomp.passes.transforms.prune.axes import Analysis

__all__ = ["Group", "Groups", "find_groups"]

Classes = frozenset[int]
Slot = tuple[tuple[tuple[int, int], int], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Candidates of one kind in one place.

    Attributes:
        name: The weight that makes the channels.
        kind: "channels", "heads" or "inner".
        slots: Candidates by slot; of each slot equally many go. A candidate is a set of classes.
        weights: Names of all initializers that shrink, in graph order.
    """

    name: str
    kind: str
    slots: tuple[tuple[Classes, ...], ...]
    weights: tuple[str, ...]

    @property
    def size(self) -> int:
        """Candidates of one slot."""
        return len(self.slots[0])


@dataclasses.dataclass(frozen=True, slots=True)
class Groups:
    """All groups of a model.

    Attributes:
        groups: What can be removed.
        kept: Names of weights with axes that must stay, each with the first reason.
    """

    groups: tuple[Group, ...]
    kept: tuple[tuple[str, str], ...]


class _Closure:
    """Rows go with all of their elements, and elements with their row."""

    def __init__(self, analysis: Analysis) -> None:
        relations = analysis.relations
        self.splits = [
            (relations.classes[split.rows], relations.classes[split.elements])
            for split in relations.splits
        ]
        self.rows: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.elements: dict[int, list[tuple[int, int]]] = defaultdict(list)
        # Splits that stay altogether are not followed, large ones of box coordinates among them:
        # it is enough that their rows stay.
        frozen = np.array(sorted(relations.frozen), np.int64)
        whole = [bool(np.isin(elements, frozen).all()) for _, elements in self.splits]
        stuck = [split[0] for split, stays in zip(self.splits, whole, strict=True) if stays]
        self.frozen = set(relations.frozen) | {int(own) for rows in stuck for own in rows}
        self.splits = [split for split, stays in zip(self.splits, whole, strict=True) if not stays]
        for number, (rows, elements) in enumerate(self.splits):
            for row, own in enumerate(rows):
                self.rows[int(own)].append((number, row))
            for row, column in np.ndindex(elements.shape):
                self.elements[int(elements[row, column])].append((number, row))

    def close(self, start: Iterable[int]) -> Classes:
        """All classes that go with some."""
        found = set(start)
        pending = list(found)
        while pending:
            own = pending.pop()
            for number, row in self.rows.get(own, ()):
                elements = self.splits[number][1]
                new = {int(e) for e in elements[row]} - found
                found |= new
                pending += new
            for number, row in set(self.elements.get(own, ())):
                rows, elements = self.splits[number]
                if int(rows[row]) not in found and all(int(e) in found for e in elements[row]):
                    found.add(int(rows[row]))
                    pending.append(int(rows[row]))
        return frozenset(found)

    def touched(self, classes: Classes) -> Counter[tuple[int, int]]:
        """How many positions of each row of each split go."""
        return Counter(place for own in classes for place in self.elements.get(own, ()))

    def is_even(self, classes: Classes) -> bool:
        """Whether rows that are not removed whole lose equally many positions."""
        counts = self.touched(classes)
        for number in {number for number, _ in counts}:
            length = self.splits[number][1].shape[1]
            rows = [counts[number, row] for row in range(len(self.splits[number][0]))]
            if len({count for count in rows if count < length}) > 1:
                return False
        return True


class _Members:
    """Which axes of which initializers hold which classes."""

    def __init__(self, analysis: Analysis) -> None:
        self.names: dict[int, set[int]] = defaultdict(set)
        self.members = analysis.members
        for number, member in enumerate(analysis.members):
            if member.value.const_value is not None:
                for own in np.unique(analysis.classes(member.atoms)):
                    self.names[int(own)].add(number)

    def of(self, classes: Classes) -> tuple[int, ...]:
        """Numbers of the members that some classes touch."""
        return tuple(sorted({n for own in classes for n in self.names.get(own, ())}))


def find_groups(analysis: Analysis) -> Groups:
    """All groups of candidates of a model, in graph order."""
    relations = analysis.relations
    closure, members = _Closure(analysis), _Members(analysis)
    row_classes = set(closure.rows)
    by_inner: dict[int, set[int]] = defaultdict(set)
    for own, inner in zip(relations.classes.tolist(), relations.inner.tolist(), strict=True):
        by_inner[inner].add(own)
    alone: dict[tuple[str, tuple[int, ...]], dict[Classes, None]] = defaultdict(dict)
    uneven: dict[Classes, None] = {}
    for inner, classes in by_inner.items():
        if inner in relations.frozen_inner or classes & row_classes:
            continue
        closed = closure.close(classes)
        if not members.of(closed) or closed & closure.frozen:
            continue
        if closure.is_even(closed):
            kind = "inner" if closure.touched(closed) else "channels"
            alone[kind, members.of(closed)][closed] = None
        else:
            uneven[closed] = None
    for own in sorted(row_classes):
        closed = closure.close([own])
        if members.of(closed) and not closed & closure.frozen and closure.is_even(closed):
            alone["heads", members.of(closed)][closed] = None
    found = [_group(members, kind, [list(c)], touched) for (kind, touched), c in alone.items()]
    found += _bundles(closure, members, list(uneven))
    return Groups(tuple(g for g in found if g.size > 1), _reasons(analysis))


def _group(
    members: _Members, kind: str, slots: Sequence[Sequence[Classes]], touched: Sequence[int]
) -> Group:
    own = [members.members[number] for number in touched]
    made = [member for member in own if member.role == "out"] or own
    names = dict.fromkeys(member.value.name or "" for member in own)
    ordered = tuple(tuple(sorted(slot, key=min)) for slot in slots)
    return Group(made[0].value.name or "", kind, ordered, tuple(names))


def _bundles(closure: _Closure, members: _Members, uneven: Sequence[Classes]) -> list[Group]:
    """Positions that must go from several heads at a time, one of each."""
    families: dict[tuple[int, ...], dict[Slot, list[Classes]]] = defaultdict(dict)
    for classes in uneven:
        touched = closure.touched(classes)
        family = tuple(sorted({number for number, _ in touched}))
        slot = tuple(sorted(touched.items()))
        families[family].setdefault(slot, []).append(classes)
    found = []
    for slots in families.values():
        candidates = list(slots.values())
        step = frozenset().union(*(slot[0] for slot in candidates))
        if len({len(slot) for slot in candidates}) == 1 and closure.is_even(step):
            found.append(_group(members, "inner", candidates, members.of(step)))
    return found


def _reasons(analysis: Analysis) -> tuple[tuple[str, str], ...]:
    relations = analysis.relations
    found = dict(analysis.stuck)
    for member in analysis.members:
        if member.role != "out":
            continue
        for own in np.unique(analysis.classes(member.atoms)):
            if int(own) in relations.frozen:
                found.setdefault(member.value.name or "", relations.frozen[int(own)])
    return tuple(found.items())
