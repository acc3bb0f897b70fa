"""How much a model's outputs suffer from noise in each of its weights, measured on a few inputs."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import ModelError
from onnxcomp.passes.analysis.cache_outputs import without_caches
from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.calibration.output_difference import Difference
from onnxcomp.passes.calibration.perturbation import Probe
from onnxcomp.passes.calibration.staged_noise import StagedProbe, Trial
from onnxcomp.passes.calibration.statistics import split_batches
from onnxcomp.passes.weight import Array, Feed, WeightSite

__all__ = [
    "Sensitivities",
    "block_noise",
    "measure_sensitivities",
    "small_pieces",
    "spread",
]

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

# Relative change of the scale of a weight.
_SHRUNK = 0.1

# Weights that share a scale in block formats.
_BLOCK = 128

# Bytes of dense weights up to which the whole model is run for each weight; larger ones are run in
# stages of these bytes at most where weights are not larger.
_WHOLE, _STAGE = 1 << 25, 1 << 28

# Inputs of such a model that are looked at: the fewest, and more up to so many elements in all.
_STAGED_FEEDS, _STAGED = (4, 8), 1 << 10


@dataclasses.dataclass(frozen=True, slots=True)
class Sensitivities:
    """What the outputs suffer from each weight, by its name; nothing where that is not known.

    Attributes:
        noise: Relative noise power of the outputs over that of noise in the weight.
        scale: The same over the square of a relative change of the weight's scale. Codes of few
            bits are means of what they stand for, and shorter: by the square of their error.
        draws: `noise` by parts of the inputs.
        loss: The same of the loss of the outputs in the place of their noise; None where nothing
            is known.
    """

    noise: Mapping[str, float] = dataclasses.field(default_factory=dict)
    scale: Mapping[str, float] = dataclasses.field(default_factory=dict)
    draws: Sequence[Mapping[str, float]] = ()
    loss: Sensitivities | None = None

    def chance(self, usual: Mapping[str, float]) -> float:
        """How much of the differences between weights is chance, 0 to 1.

        Differences are those of logarithms to what is expected of each weight; by as much as two
        parts of the inputs disagree, their mean is uncertain.

        Args:
            usual: What is expected of each weight without inputs, up to a factor.
        """
        if len(self.draws) != 2:
            return 0.0
        first, second = self.draws
        names = [n for n in self.noise if first.get(n, 0.0) > 0.0 and second.get(n, 0.0) > 0.0]
        if len(names) < 2:
            return 0.0
        apart = np.var([math.log(first[name] / second[name]) for name in names], ddof=1) / 4
        told = np.var([math.log(self.noise[name] / usual[name]) for name in names], ddof=1)
        return min(1.0, float(apart / told)) if told > 0.0 else 1.0


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


def small_pieces(model: ir.Model, feeds: Sequence[Feed], most: int) -> list[Feed]:
    """The inputs, cut along their batch axis where they have more than so many elements.

    Args:
        model: The model.
        feeds: Inputs by name.
        most: Elements of the largest array of a piece, if one sample has no more.
    """
    dims = {
        value.name or "": [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
        for value in model.graph.inputs
        if value.shape is not None and value.name in feeds[0]
    }
    small = all(array.size <= most for feed in feeds for array in feed.values())
    if small or dims.keys() != feeds[0].keys():
        return list(feeds)
    sample = max(array.size // max(1, len(array)) for array in feeds[0].values() if array.ndim)
    return split_batches(feeds, dims, most=max(1, most // max(1, sample)))


def measure_sensitivities(
    model: ir.Model, sites: Sequence[WeightSite], feeds: Sequence[Feed]
) -> Sensitivities:
    """What noise in each weight, and a smaller weight, do to the outputs.

    Caches of a decoder are not looked at where there are other outputs.

    Args:
        model: The canonical model; only read.
        sites: Its weights.
        feeds: Inputs by name.

    Returns:
        Numbers without weights that no output depends on with these inputs, and without all those
        of a model that cannot be run with changed weights.
    """
    if not sites:
        return Sensitivities()
    model = without_caches(model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            if sum(site.nbytes for site in sites) > _WHOLE:
                feeds = small_pieces(model, feeds, _STAGED // _STAGED_FEEDS[0])
                size = max(array.size for array in feeds[0].values())
                count = min(max(_STAGED_FEEDS[0], _STAGED // max(1, size)), _STAGED_FEEDS[1])
                chosen = spread(feeds, count)
                found = _in_stages(model, sites, chosen, Path(folder))
            else:
                small = sum(array.size for array in feeds[0].values()) <= _SMALL
                chosen = spread(feeds, _SMALL_FEEDS if small else _FEEDS)
                probe = Probe(model, sites, chosen, Path(folder))
                found = _measured(model, sites, probe, min(_DRAWS, len(chosen)))
        except ModelError as error:
            log.warning("sensitivities are not measured: %s", error.message)
            return Sensitivities()
    log.info("sensitivities: %s", {n: float(f"{v:.3g}") for n, v in found.noise.items()})
    return found


def _measured(
    model: ir.Model, sites: Sequence[WeightSite], probe: Probe, draws: int
) -> Sensitivities:
    rng = np.random.default_rng(0)
    found: dict[str, list[Difference]] = {}
    for site in sites:
        weight = read_weight(model, site)
        found[site.name] = [
            probe.difference({site: block_noise(weight, rng)}, inputs=slice(d, None, draws)).mean()
            for d in range(draws)
        ]
        smaller = {site: weight * np.float32(1.0 - _SHRUNK)}
        found[site.name].append(probe.difference(smaller, inputs=slice(0, None, draws)).mean())
    return _sensitivities(found)


def _in_stages(
    model: ir.Model, sites: Sequence[WeightSite], feeds: Sequence[Feed], folder: Path
) -> Sensitivities:
    """The same for models that are too large to run them for each weight."""
    rng = np.random.default_rng(0)
    draws = min(_DRAWS, len(feeds))

    def trials(site: WeightSite) -> list[Trial]:
        """A weight with noise of its own for each draw, on the inputs of that draw."""
        weight = read_weight(model, site)
        noisy = [
            Trial(site, functools.partial(block_noise, weight, rng), slice(draw, None, draws))
            for draw in range(draws)
        ]
        smaller = functools.partial(np.multiply, weight, np.float32(1.0 - _SHRUNK))
        return [*noisy, Trial(site, smaller, slice(0, None, draws))]

    def together(stage: Sequence[WeightSite]) -> dict[WeightSite, Array]:
        size = _NOISE / math.sqrt(len(stage))
        return {site: block_noise(read_weight(model, site), rng, size) for site in stage}

    count = stage_count(sites)
    found = StagedProbe(model, sites, feeds, folder, count).noise(trials, together)
    return _sensitivities(found)


def stage_count(sites: Sequence[WeightSite]) -> int:
    """Stages that a model is cut into: near the fewest runs, and of bounded bytes."""
    total = sum(site.nbytes for site in sites)
    return max(math.ceil(math.sqrt(len(sites))), math.ceil(total / _STAGE))


def _sensitivities(found: Mapping[str, Sequence[Difference]]) -> Sensitivities:
    """From what each draw of noise and then a smaller weight do, by weight."""
    noise = _of({name: [one.noise for one in values] for name, values in found.items()})
    loss = _of({name: [one.loss for one in values] for name, values in found.items()})
    return dataclasses.replace(noise, loss=loss)


def _of(found: Mapping[str, Sequence[float]]) -> Sensitivities:
    """What is known and finite of all weights."""
    draws = min((len(values) for values in found.values()), default=1) - 1
    parts = [{name: values[d] / _NOISE**2 for name, values in found.items()} for d in range(draws)]
    scale = {name: values[-1] / _SHRUNK**2 for name, values in found.items()}
    noise = {name: sum(part[name] for part in parts) / draws for name in scale}
    kept = [name for name, value in noise.items() if 0.0 < value < math.inf]
    kept = [name for name in kept if math.isfinite(scale[name])]
    return Sensitivities(
        {name: noise[name] for name in kept}, {name: scale[name] for name in kept}, parts
    )
