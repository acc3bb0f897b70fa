"""Search the structured tables of passes/codecs/hyper_tables.py.

    python benchmarks/search_structured_tables.py [--only REGEX] [--seeds 1,2,3] [--tries 3000]

A structured table of 2^L states is ``2 (F[(N + P[c]) mod 16] + G[c]) - limit`` with N the top and
c the low four bits of the state, and ``F + G`` in 0 .. limit: spec.md section 3. The families
differ in how much of P and G is free, which costs kernels instructions:

    down    P[c] = c, G[c] = 15 - c        no look-up but that of F
    twist   P free, G[c] = 15 - P[c]       one more
    slope   P[c] = c, G free               one more
    free    P and G free                   two more

Every seed climbs from the best of a pool of random tables, and from tables that earlier searches
found: entries move, swap and are refitted to the targets that chose them (Lloyd), and a change
stays when the signal-to-noise ratio of two encoder passes on one normal sample grows. The winner
is scored on another sample. Everything follows from the seeds. Needs the native encoder; with the
defaults, two minutes for each family and seed on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from onnxcomp.passes.codecs.hyper import native
from onnxcomp.passes.codecs.hyper.format import SCALE_UNIT, GroupLayout, hadamard, signs, states
from onnxcomp.passes.weight import Array

GROUP = 128
CELLS = 16
ALPHA = 2
# Weights of the sample that decides, and of the one that scores.
DECIDING, SCORING = 1 << 16, 1 << 21
# Share of the tries that go into the pool, and how many of the pool are climbed from.
POOL, CLIMBED = 0.3, 4
# How far the target of a table's middle lies below the largest entry, in standard deviations.
REACH = (2.1, 3.1)


class Family(NamedTuple):
    """Which tables are searched."""

    bits: int
    state_bits: int
    kind: str
    limit: int

    @property
    def tied(self) -> bool:
        """Whether G follows from P."""
        return self.kind in ("down", "twist")

    @property
    def level(self) -> bool:
        """Whether P[c] = c."""
        return self.kind in ("down", "slope")

    @property
    def name(self) -> str:
        """What `--only` is matched with."""
        return f"k{self.bits}-L{self.state_bits}-{self.kind}-r{self.limit}"


FAMILIES = tuple(
    Family(bits, state_bits, kind, limit)
    for bits, state_bits, limits in (
        (4, 8, (63,)),
        (3, 10, (63,)),
        (3, 7, (63, 31)),
        (2, 8, (63, 31)),
        (2, 6, (31,)),
    )
    for kind in ("down", "twist", "slope", "free")
    for limit in limits
    if not (kind in ("down", "twist") and limit == 31)
)


@dataclasses.dataclass(frozen=True)
class Parts:
    """F, P and G, and the targets' root mean square in units of F."""

    cells: Array
    turns: Array
    steps: Array
    spread: float


class Sample:
    """Normal weights and what the encoder makes of them."""

    def __init__(self, seed: int, weights: int) -> None:
        rng = np.random.default_rng(seed)
        self.weight = rng.standard_normal((weights // 1024, 1024), np.float32)
        blocks = self.weight.reshape(-1, GROUP) * signs(GROUP)
        self.rotated = blocks @ hadamard(GROUP) / GROUP

    def encode(self, family: Family, table: Array, spread: float) -> tuple[float, Array, Array]:
        """Signal to noise in dB, and by state the number of weights and their mean target."""
        geometry = GroupLayout(family.bits, family.state_bits, GROUP, *self.weight.shape)
        codes, scales = native.hyper_encode(self.weight, geometry, table, spread, passes=2)
        rows, groups = geometry.rows, geometry.groups
        chosen = states(codes, family.state_bits, GROUP)[:rows].reshape(-1, GROUP)
        factor = scales.transpose(0, 2, 1, 3).reshape(-1, groups)[:rows].reshape(-1, 1)
        unit = factor.astype(np.float32) * SCALE_UNIT
        error = self.rotated - table.astype(np.float32)[chosen] * unit
        ratio = float(np.square(self.rotated).sum() / np.square(error).sum())
        flat, size = chosen.ravel(), 1 << family.state_bits
        count = np.bincount(flat, minlength=size)
        total = np.bincount(flat, weights=(self.rotated / unit).ravel(), minlength=size)
        return 10 * np.log10(ratio), count, total / np.maximum(count, 1)


class Search:
    """One climb within a family."""

    def __init__(self, family: Family, seed: int) -> None:
        self.family, self.rng = family, np.random.default_rng([seed, *family.name.encode()])
        self.sample = Sample(5, DECIDING)
        state = np.arange(1 << family.state_bits)
        self.top, self.low = state >> (family.state_bits - 4), state & 15

    def table(self, parts: Parts) -> Array:
        """The int8 table of rounded parts."""
        inner = (self.top + parts.turns[self.low]) & 15
        sums = np.rint(parts.cells)[inner] + np.rint(parts.steps)[self.low]
        return (ALPHA * sums - self.family.limit).astype(np.int8)

    def fitting(self, parts: Parts) -> Parts:
        """Parts whose sums are in 0 .. limit."""
        inner = (self.top + parts.turns[self.low]) & 15
        steps = np.rint(parts.steps)
        highest, lowest = np.full(CELLS, -np.inf), np.full(CELLS, np.inf)
        np.maximum.at(highest, inner, steps[self.low])
        np.minimum.at(lowest, inner, steps[self.low])
        highest, lowest = (
            np.where(highest < lowest, 0, highest),
            np.where(highest < lowest, 0, lowest),
        )
        cells = np.clip(parts.cells, -lowest, self.family.limit - highest)
        return dataclasses.replace(parts, cells=cells)

    def lloyd(self, parts: Parts, turns: int, noise: float = 0.0) -> tuple[float, Parts]:
        """The best of some refits, and its ratio."""
        best, found = -np.inf, parts
        for turn in range(turns):
            parts = self.fitting(parts)
            table = self.table(parts)
            ratio, count, mean = self.sample.encode(self.family, table, parts.spread * ALPHA)
            if ratio > best:
                best, found = ratio, parts
            if turn + 1 < turns:
                parts = self.refit(parts, count, (mean + self.family.limit) / ALPHA, noise)
        return best, found

    def refit(self, parts: Parts, count: Array, mean: Array, noise: float) -> Parts:
        """Least squares of F, and of G where it is free, for the targets of every state."""
        inner = (self.top + parts.turns[self.low]) & 15
        design = np.eye(CELLS)[inner]
        goal = mean - parts.steps[self.low]
        if not self.family.tied:
            design, goal = np.concatenate([design, np.eye(CELLS)[self.low]], axis=1), mean
        start = np.concatenate([parts.cells, parts.steps])[: design.shape[1]]
        weighted = design.T * count
        # Pulled a little towards where it was: F and G share a constant, and cells may be unused.
        system = weighted @ design + 20.0 * np.eye(design.shape[1])
        moved = np.linalg.solve(system, weighted @ goal + 20.0 * start)
        moved += self.rng.standard_normal(len(moved)) * noise
        steps = moved[CELLS:] if not self.family.tied else parts.steps
        power = float(np.sum(count * np.square(mean - self.family.limit / 2)) / count.sum())
        spread = parts.spread * 0.7 + 0.3 * np.sqrt(power) if power > 0 else parts.spread
        return Parts(moved[:CELLS], parts.turns, steps, spread)

    def random(self) -> Parts:
        """Quantiles in some order; P and G by the family."""
        rng, limit = self.rng, self.family.limit
        normal = NormalDist()
        quantiles = np.array([normal.inv_cdf((v + 0.5) / CELLS) for v in range(CELLS)])
        unit = limit / 2 / rng.uniform(*REACH)
        steps = np.arange(15.0, -1.0, -1.0)
        turns = np.arange(CELLS)
        if not self.family.tied:
            steps = (rng.choice([1, 3, 5, 7, 9, 11, 13, 15]) * np.arange(CELLS) % 16) / 16
            steps = steps * rng.uniform(0.1, 0.8) * unit * 2
        if not self.family.level:
            turns = rng.choice([1, 3, 5, 7, 9, 11, 13, 15]) * np.arange(CELLS) % 16
            turns = turns if rng.random() < 0.6 else rng.integers(0, 16, CELLS)
        odd = rng.choice([1, 3, 5, 7, 9, 11, 13, 15])
        if self.family.tied:
            steps = 15.0 - turns
        order = (odd * np.arange(CELLS) + rng.integers(16)) % 16
        order = order if rng.random() < 0.6 else rng.permutation(CELLS)
        cells = quantiles[order] * unit * 0.95 + limit / 2 - steps.mean()
        return Parts(cells, turns, steps, unit)

    def changed(self, parts: Parts) -> Parts:
        """A neighbour."""
        rng = self.rng
        cells, turns, steps = parts.cells.copy(), parts.turns.copy(), parts.steps.copy()
        kind = rng.random()
        if not self.family.level and kind < 0.35:
            if rng.random() < 0.5:
                a, b = rng.choice(CELLS, 2, replace=False)
                turns[[a, b]], steps[[a, b]] = turns[[b, a]], steps[[b, a]]
            else:
                turns[rng.integers(CELLS)] = rng.integers(16)
            if self.family.tied:
                steps = 15.0 - turns
        elif kind < 0.6:
            one = steps if not self.family.tied and rng.random() < 0.4 else cells
            a, b = rng.choice(CELLS, 2, replace=False)
            one[[a, b]] = one[[b, a]]
        if kind > 0.5:
            share, size = rng.choice([0.1, 0.3, 0.6]), rng.choice([0.5, 1.0, 2.0, 4.0])
            cells += rng.standard_normal(CELLS) * size * (rng.random(CELLS) < share)
            if not self.family.tied:
                steps += rng.standard_normal(CELLS) * size * (rng.random(CELLS) < share)
        spread = parts.spread * float(np.exp(rng.standard_normal() * 0.02))
        return Parts(cells, turns, steps, spread)

    def climb(self, start: tuple[float, Parts], tries: int) -> tuple[float, Parts]:
        """Neighbours that are better, one after the other."""
        best, parts = start
        for turn in range(tries):
            ratio, found = self.lloyd(self.changed(parts), 3 if turn % 4 else 1)
            if ratio > best:
                best, parts = ratio, found
        return best, parts

    def run(self, tries: int, known: list[Parts]) -> tuple[float, Parts]:
        """The best table of this seed."""
        pool = [self.lloyd(self.random(), 5, 0.4) for _ in range(int(tries * POOL / 5) + 1)]
        pool += [self.lloyd(parts, 3) for parts in known]
        pool.sort(key=lambda pair: -pair[0])
        share = int(tries * (1 - POOL) / 2 / CLIMBED)
        climbed = [self.climb(start, share) for start in pool[:CLIMBED]]
        return self.climb(max(climbed, key=lambda pair: pair[0]), share * CLIMBED)


def known_parts(family: Family, found: dict[str, Parts]) -> list[Parts]:
    """Tables of narrower families, and those that are in the source already."""
    narrower = {"twist": ("down",), "slope": ("down",), "free": ("slope", "twist", "down")}.get(
        family.kind, ()
    )
    names = [family._replace(kind=kind).name for kind in (family.kind, *narrower)]
    starts = [found[name] for name in names if name in found]
    for name in sorted(set(names) & set(KNOWN)):
        cells, turns, steps, spread = KNOWN[name]
        values = np.array(cells, float), np.array(turns), np.array(steps, float)
        starts.append(Parts(*values, spread / ALPHA))
    return starts


# Where earlier searches came to, by family: F, P, G, spread in table units.
KNOWN: dict[str, tuple[list[float], list[int], list[float], float]] = {
    "k4-L8-down-r63": (
        [17, 36, 21, 29, 25, 9, 15, 46, 33, 2, 39, 23, 19, 27, 12, 31],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
        19.32,
    ),
    "k3-L10-down-r63": (
        [2, 19, 29, 46, 17, 26, 39, 15, 25, 35, 13, 23, 33, 9, 21, 30],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
        20.65,
    ),
    "k2-L8-down-r63": (
        [32, 2, 19, 30, 47, 17, 26, 39, 13, 25, 36, 13, 23, 33, 9, 22],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0],
        23.33,
    ),
    "k4-L8-free-r63": (
        [24, 30, 37, 1, 16, 22, 28, 34, 49, 13, 20, 26, 32, 40, 9, 18],
        [0, 2, 7, 12, 1, 6, 11, 0, 5, 10, 15, 4, 9, 14, 3, 8],
        [0, 12, 10, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 3, 3, 2],
        19.43,
    ),
    "k4-L8-slope-r63": (
        [29, 36, 51, 13, 21, 27, 9, 0, 33, 18, 25, 31, 39, 43, 16, 23],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [0, 9, 12, 8, 10, 7, 6, 7, 5, 6, 3, 5, 3, 5, 2, 4],
        20.38,
    ),
    "k3-L7-free-r63": (
        [27, 18, 31, 23, 36, 27, 42, 32, 1, 37, 12, 42, 18, 53, 23, 12],
        [0, 1, 6, 7, 12, 13, 2, 3, 6, 11, 12, 1, 2, 7, 8, 13],
        [0, 0, 4, 3, 6, 4, 9, 10, 1, 2, 2, 6, 2, 7, 6, 8],
        22.22,
    ),
    "k3-L7-free-r31": (
        [13, 9, 15, 12, 18, 14, 21, 16, 0, 18, 6, 21, 9, 27, 11, 6],
        [0, 1, 6, 7, 12, 13, 2, 3, 6, 11, 12, 1, 2, 7, 8, 13],
        [0, 0, 2, 1, 3, 2, 4, 4, 0, 1, 0, 3, 1, 4, 3, 4],
        11.21,
    ),
    "k3-L7-slope-r31": (
        [21, 11, 14, 22, 6, 16, 18, 5, 12, 20, 27, 14, 16, 25, 9, 18],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [0, 0, 3, -1, 2, -2, 0, -3, -2, 1, -3, 0, -3, -2, -5, -1],
        10.81,
    ),
    "k2-L6-slope-r31": (
        [17, 12, 4, 23, 13, 7, 22, 18, 7, 22, 17, 13, 23, 17, 12, 31],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [0, 0, 0, 0, -2, -2, -3, 3, -3, -3, 2, 3, -6, 0, 1, 1],
        12.38,
    ),
    "k2-L6-free-r31": (
        [23, 17, 13, 8, 18, 13, 8, 27, 13, 7, 24, 18, 4, 22, 17, 13],
        [0, 1, 2, 3, 14, 7, 9, 8, 4, 5, 14, 15, 10, 11, 12, 5],
        [0, 0, 0, 0, 4, -1, -1, -1, 2, 2, -2, -2, 1, 1, 1, -4],
        12.91,
    ),
    "k2-L8-slope-r31": (
        [11, 21, 13, 2, 15, 7, 17, 10, 20, 12, 25, 14, 6, 16, 9, 18],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15],
        [0, -1, 3, 1, 0, 0, 3, 3, 2, 0, 4, 3, 2, 1, 6, 4],
        11.47,
    ),
}


def report(family: Family, seed: int, ratio: float, search: Search, parts: Parts) -> None:
    """Print one finding."""
    table = search.table(parts)
    scoring = Sample(77, SCORING)
    score = scoring.encode(family, table, parts.spread * ALPHA)[0]
    lists = [np.rint(part).astype(int).tolist() for part in (parts.cells, parts.turns, parts.steps)]
    print(
        f"{family.name} seed {seed}: {score:.3f} dB (deciding sample {ratio:.3f}), "
        f"F {lists[0]}, P {lists[1]}, G {lists[2]}, spread {parts.spread * ALPHA:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only families whose name matches")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--tries", type=int, default=6000, help="encoder runs, about")
    arguments = parser.parse_args()
    found: dict[str, Parts] = {}
    best: dict[str, float] = {}
    for family in FAMILIES:
        if not re.search(arguments.only, family.name):
            continue
        for seed in map(int, arguments.seeds.split(",")):
            search = Search(family, seed)
            ratio, parts = search.run(arguments.tries, known_parts(family, found))
            report(family, seed, ratio, search, parts)
            if ratio > best.get(family.name, -np.inf):
                best[family.name], found[family.name] = ratio, search.fitting(parts)


if __name__ == "__main__":
    main()
