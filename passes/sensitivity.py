"""How much a model's outputs suffer from noise in each of its weights, measured on a few inputs."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.calibrate import Feed
from onnxcomp.passes.codecs.codec import Array, WeightSite
from onnxcomp.passes.probing import Probe
from onnxcomp.passes.sites import read_weight

__all__ = ["block_noise", "measure_sensitivities", "spread"]

log = logging.getLogger(__name__)

# Inputs that are looked at, and small ones, of which more are needed to say as much.
_FEEDS, _SMALL_FEEDS = 16, 32

# Draws of noise for each weight, each on a share of the inputs: one draw says little about a weight
# that acts in few directions.
_DRAWS = 2

# Elements up to which an input is small.
_SMALL = 1 << 13

# Relative size of the noise: between the errors of four and of three bits per weight, so that what
# is not linear in the error shows as it will.
_NOISE = 0.1

# Weights that share a scale in block formats.
_BLOCK = 128

# Bytes of dense weights above which a model is not opened for this.
_LARGEST = 1 << 30


def block_noise(weight: Array, rng: np.random.Generator, relative: float = _NOISE) -> Array:
    """Noise as block formats make it: white within a block of a row, in proportion to its norm.

    Args:
        weight: ``(rows, length)``.
        rng: Source of randomness.
        relative: Size relative to the weight.

    Returns:
        The weight with noise, float32 ``(rows, length)``.
    """
    result = np.array(weight, np.float32)
    for start in range(0, weight.shape[1], _BLOCK):
        part = result[:, start : start + _BLOCK]
        noise = rng.standard_normal(part.shape, dtype=np.float32)
        scale = relative * np.sqrt(np.mean(np.square(part), axis=1, keepdims=True))
        part += noise * scale
    return result


def spread(feeds: Sequence[Feed], count: int) -> list[Feed]:
    """At most `count` of the inputs, from all over them."""
    step = max(1, len(feeds) // count)
    return list(feeds[::step][:count])


def measure_sensitivities(
    model: ir.Model, sites: Sequence[WeightSite], feeds: Sequence[Feed]
) -> Mapping[str, float]:
    """Relative noise power of the outputs over relative noise power of each weight.

    Args:
        model: The canonical model; only read.
        sites: Its weights.
        feeds: Inputs by name.

    Returns:
        Numbers by name of the weight. Weights that no output depends on with these inputs are left
        out, as are all of a model that cannot be run with changed weights.
    """
    if not sites or sum(site.nbytes for site in sites) > _LARGEST:
        return {}
    rng = np.random.default_rng(0)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            small = sum(array.size for array in feeds[0].values()) <= _SMALL
            chosen = spread(feeds, _SMALL_FEEDS if small else _FEEDS)
            probe = Probe(model, sites, chosen, Path(folder))
            draws = min(_DRAWS, len(chosen))
            for site in sites:
                total = 0.0
                for draw in range(draws):
                    weight = block_noise(read_weight(model, site), rng)
                    total += probe.noise({site: weight}, inputs=slice(draw, None, draws))
                found[site.name] = total / draws / _NOISE**2
        except ModelError as error:
            log.warning("sensitivities are not measured: %s", error.message)
            return {}
    log.info("sensitivities: %s", {name: float(f"{value:.3g}") for name, value in found.items()})
    return {name: value for name, value in found.items() if 0.0 < value < float("inf")}
