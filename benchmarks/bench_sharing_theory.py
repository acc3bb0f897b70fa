"""Linear models in less memory: shared weights against pruned ones, and what hashing keeps.

    python benchmarks/bench_sharing_theory.py         # ten seconds

A linear model of 1,024 weights is fitted to 4,096 inputs with m trained numbers: as a memory of m
entries which every weight is a signed copy of (the map `fold`, but with slots of one entry), as the
m weights that are largest times the deviation of their inputs, and as m weights drawn at random;
all fitted anew by least squares. The error is that of the outputs, relative. Inputs are white,
correlated (near a space of 32 dimensions), or of few strong features (deviation 1 / i). The second
table has the spread of the inner product of two vectors after hashing, beside what the theory says:
``(|x|^2 |y|^2 + (xy)^2 - 2 sum x_i^2 y_i^2) / m`` for independent places.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from results import print_table, write_results

from onnxcomp.passes.codecs.hash.format import mix, reduce, seeds

Array = npt.NDArray[Any]
FEATURES, INPUTS, SEEDS = 1024, 4096, 3
MEMORIES = (512, 256, 128, 64, 32, 16)


def folded(count: int, slots: int, seed: int) -> tuple[Array, Array]:
    """Slots and signs of weights: ops/hash/spec.md with one weight for a tile."""
    rotate, sign = seeds(seed)
    numbers = np.arange(count, dtype=np.int64)
    partition = numbers // slots
    rotation = reduce(mix(partition + rotate), slots) * (partition != 0)
    minus = (mix(numbers + sign) >= 2**30) & (partition != 0)
    return (numbers % slots + rotation) % slots, np.where(minus, -1.0, 1.0)


def hashed(x: Array, slots: int, seed: int) -> Array:
    """Columns added up by slot: ``(inputs, slots)``."""
    place, sign = folded(x.shape[1], slots, seed)
    result = np.zeros((slots, len(x)))
    np.add.at(result, place, (x * sign).T)
    return result.T


def inputs(kind: str, rng: np.random.Generator) -> Array:
    """Rows of one of three kinds."""
    x = rng.standard_normal((INPUTS, FEATURES))
    if kind == "correlated":
        space = rng.standard_normal((32, FEATURES))
        return rng.standard_normal((INPUTS, 32)) @ space + 0.1 * x
    return x / np.arange(1, FEATURES + 1) if kind == "few strong" else x


def error(x: Array, y: Array) -> float:
    """Relative error of the outputs that the best linear model on these columns leaves."""
    gram = x.T @ x
    gram += np.eye(len(gram)) * (1e-9 * np.trace(gram) / len(gram))
    left = y - x @ np.linalg.solve(gram, x.T @ y)
    return float(np.linalg.norm(left) / np.linalg.norm(y))


def fits(kind: str, seed: int) -> list[dict[str, Any]]:
    """Errors of all three models for all memories."""
    rng = np.random.default_rng(seed)
    x = inputs(kind, rng)
    weight = rng.standard_normal(FEATURES)
    y = x @ weight
    order = np.argsort(-np.abs(weight) * x.std(axis=0))
    rows = []
    for m in MEMORIES:
        drawn = rng.permutation(FEATURES)[:m]
        rows.append(
            {
                "inputs": kind,
                "memory": m,
                "shared": error(hashed(x, m, seed), y),
                "largest": error(x[:, order[:m]], y),
                "random": error(x[:, drawn], y),
            }
        )
    return rows


def spread(m: int) -> dict[str, Any]:
    """Standard deviation of an inner product after hashing, over seeds, and the theory's."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, FEATURES))
    found = [float((hashed(x[None], m, s) @ hashed(y[None], m, s).T)[0, 0]) for s in range(300)]
    squares = float((x**2 * y**2).sum())
    theory = (float(x @ x) * float(y @ y) + float(x @ y) ** 2 - 2 * squares) / m
    return {
        "memory": m,
        "bias": float(np.mean(found) - x @ y),
        "spread": float(np.std(found)),
        "theory": float(np.sqrt(theory)),
    }


def main() -> None:
    rows = []
    for kind in ("white", "correlated", "few strong"):
        runs = [fits(kind, seed) for seed in range(SEEDS)]
        for number, m in enumerate(MEMORIES):
            means = {
                how: round(float(np.mean([run[number][how] for run in runs])), 4)
                for how in ("shared", "largest", "random")
            }
            rows.append({"inputs": kind, "memory": m, **means})
    products = [spread(m) for m in MEMORIES]
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    print_table(list(products[0]), [[f"{v:.4g}" for v in row.values()] for row in products])
    write_results("sharing_theory", {"fits": rows, "products": products})


if __name__ == "__main__":
    main()
