"""Find the compressed weights that cause an error of the outputs, by bisection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from onnxcomp.passes.ir.manifest import read_manifest
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.lowering.expand import decode_site
from onnxcomp.passes.weight import Array, WeightSite

__all__ = ["Noise", "blame", "decoded_weights"]

# Noise power of the outputs when these weights are compressed and all others dense.
Noise = Callable[[Sequence[WeightSite]], float]


def decoded_weights(path: Path, sites: Sequence[WeightSite]) -> Mapping[WeightSite, Array]:
    """Decoded matrices ``(rows, length)`` of the compressed weights of a file.

    Args:
        path: A compressed model.
        sites: Weights of the model it was made from; others are left out.

    Raises:
        ModelError: The file is damaged.
    """
    model = load(path)
    records = read_manifest(model)
    known = [site for site in sites if site.name in records]
    return {site: decode_site(model, records[site.name]) for site in known}


def _worst(noise: Noise, sites: Sequence[WeightSite]) -> WeightSite:
    """The weight that bisection ends at, going where there is more noise."""
    while len(sites) > 1:
        left, right = sites[: len(sites) // 2], sites[len(sites) // 2 :]
        sites = left if noise(left) >= noise(right) else right
    return sites[0]


def blame(
    noise: Noise, sites: Sequence[WeightSite], limit: float, most: int
) -> list[WeightSite] | None:
    """Weights that have to be dense again for the noise of the others to be small enough.

    Args:
        noise: Measures.
        sites: The compressed weights.
        limit: Largest noise power.
        most: Most bytes of weights that may become dense.

    Returns:
        The weights, the worst first; None where they have more bytes than `most`.
    """
    blamed: list[WeightSite] = []
    rest = list(sites)
    while rest and noise(rest) > limit:
        worst = _worst(noise, rest)
        rest.remove(worst)
        blamed.append(worst)
        if sum(site.nbytes for site in blamed) > most:
            return None
    return blamed
