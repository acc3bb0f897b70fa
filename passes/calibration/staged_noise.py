"""Noise of the outputs from noise in each weight, without running the whole model for each.

The model is cut into stages. Noise in a weight runs to the end of its stage; from there on it is
taken to grow as the noise of all weights of the stage together does, which is carried to the
outputs once. With K stages of n weights that costs about ``K / 2 + draws * n / K`` runs of the
model in the place of ``draws * n``, and one stage is in memory at a time. Noise of a weight that
later stages read as well (tied tables, shared layers) is carried by itself, exactly.

Visits the main graph by its nodes; subgraphs go with the node that holds them.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.analysis.output_kinds import OutputKind
from onnxcomp.passes.calibration.output_difference import (
    Difference,
    OutputDifference,
    kinds_by_name,
    mean_of,
)
from onnxcomp.passes.calibration.perturbation import opened, typed
from onnxcomp.passes.calibration.segmented_run import read_values, segment
from onnxcomp.passes.ir.model import save
from onnxcomp.passes.weight import Array, Feed, WeightSite
from onnxcomp.runtime.activity import activity

__all__ = ["StagedProbe", "Trial", "cut_into_stages"]

# How far from an even share of the bytes a cut may be, as a part of a stage, so that few values
# are alive there.
_SLACK = 0.5

# Vectors with less power than this share of the median count as if they had it.
_LEAST = 0.1


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """One change of a weight, and the inputs it is run on.

    Attributes:
        site: The weight.
        change: Makes other values ``(rows, length)``; called once.
        inputs: Which inputs to run.
    """

    site: WeightSite
    change: Callable[[], Array]
    inputs: slice


class _VectorNoise:
    """Noise of vectors along the last axis, each relative to its own size.

    A few tokens of language models are a hundred times as large as others at some places. What is
    normalised next forgets that, and noise relative to the whole does not.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, exact: Array, found: Array) -> None:
        """Take in a value; only one of the same size counts."""
        if found.shape != exact.shape or not exact.size:
            return
        wide = exact.astype(np.float64).reshape(-1, exact.shape[-1] if exact.ndim else 1)
        size = np.square(wide).sum(axis=1)
        size = np.maximum(size, _LEAST * np.median(size))
        wide -= found.reshape(wide.shape)
        lost = np.square(wide).sum(axis=1)
        known = size > 0.0
        total, count = self._sums.get(name, (0.0, 0))
        total += float((lost[known] / size[known]).sum())
        self._sums[name] = (total, count + int(known.sum()))

    def mean(self) -> float:
        """The mean over vectors, and over values."""
        found = [total / count for total, count in self._sums.values() if count]
        return float(np.mean(found)) if found else 0.0


class _Carried:
    """Noise on its way to the outputs.

    Attributes:
        weights: Weights that differ, as they are stored, while later stages read them.
        inputs: Numbers of the inputs that are run.
        values: What differs from the exact values at the last cut, for each input.
        outputs: What outputs differ so far.
        cut: Noise at the last cut.
    """

    def __init__(
        self,
        weights: Mapping[str, Array],
        inputs: Sequence[int],
        kinds: Mapping[str, OutputKind],
    ) -> None:
        self.weights = weights
        self.inputs = inputs
        self.values: dict[int, dict[str, Array]] = {number: {} for number in inputs}
        self.outputs = OutputDifference(kinds)
        self.cut = _VectorNoise()


@dataclasses.dataclass(frozen=True, slots=True)
class _Stage:
    """A piece of a model.

    Attributes:
        nodes: Indices of its nodes, those that compute with constants alone included.
        alive: Values that later stages read.
        outputs: Outputs of the model that it makes.
        sites: Weights that are read here first.
    """

    nodes: tuple[int, ...]
    alive: tuple[str, ...]
    outputs: tuple[str, ...]
    sites: tuple[WeightSite, ...]


class StagedProbe:
    """A model cut into stages, and what is known of each.

    Args:
        model: The canonical model; only read.
        sites: Weights that can be changed.
        feeds: Inputs by name.
        folder: Where stages are written for ONNX Runtime.
        count: Stages to aim at.
    """

    def __init__(
        self,
        model: ir.Model,
        sites: Sequence[WeightSite],
        feeds: Sequence[Feed],
        folder: Path,
        count: int,
    ) -> None:
        self._model = opened(model, sites)
        self._kinds = kinds_by_name(self._model)
        self._folder = folder
        self._feeds = list(feeds)
        self._stages = cut_into_stages(self._model, sites, count)
        self._last = _last_reads(self._model, self._stages, sites)

    def noise(
        self,
        trials: Callable[[WeightSite], Sequence[Trial]],
        together: Callable[[Sequence[WeightSite]], Mapping[WeightSite, Array]],
    ) -> dict[str, list[Difference]]:
        """Noise and loss of the outputs for each trial of each weight, means over outputs.

        Args:
            trials: What is tried with a weight.
            together: Values with noise for all weights of a stage at once.

        Raises:
            ModelError: ONNX Runtime cannot load or run a stage, or every output is zero.
        """
        held: list[dict[str, Array]] = [dict(feed) for feed in self._feeds]
        carried: list[_Carried] = []
        common: list[tuple[_Carried, float, dict[str, Difference]]] = []
        tried: list[tuple[str, int, _Carried, float]] = []
        outputs = OutputDifference({})
        for number, stage in enumerate(self._stages):
            activity("measuring sensitivities", number, len(self._stages), "parts of the model")
            with tempfile.TemporaryDirectory(dir=self._folder) as folder:
                run = self._session(stage, held[0], Path(folder))
                exact = [run(values, {}) for values in held]
                alive = [{n: found.get(n, old.get(n)) for n in stage.alive}
                         for found, old in zip(exact, held, strict=True)]  # fmt: skip
                for found in exact:
                    floats = _floats(found, stage.outputs)
                    outputs.add(floats, floats)
                for noise in carried:
                    self._advance(noise, stage, run, held, exact)
                for site in stage.sites:
                    for trial in trials(site):
                        noise = self._start(trial)
                        self._advance(noise, stage, run, held, exact)
                        tried.append((site.name, number, noise, noise.cut.mean()))
                        if self._last[site.name] > number:
                            carried.append(noise)
                        else:
                            noise.weights, noise.values = {}, {}
                local = [site for site in stage.sites if self._last[site.name] == number]
                changed = together(local) if stage.alive and local else {}
                weights = {site.name: typed(site, array) for site, array in changed.items()}
                del changed
                mixed = _Carried(weights, range(len(held) if weights else 0), self._kinds)
                self._advance(mixed, stage, run, held, exact)
                common.append((mixed, mixed.cut.mean(), mixed.outputs.by_name()))
                carried.append(mixed)
            held = alive  # type: ignore[assignment]
            for noise in carried:
                noise.weights = {n: w for n, w in noise.weights.items() if self._last[n] > number}
        outputs.mean()  # says so where every output is zero
        return self._put_together(tried, common, list(outputs.by_name()))

    def _start(self, trial: Trial) -> _Carried:
        """Noise before the first stage."""
        inputs = range(len(self._feeds))[trial.inputs]
        return _Carried({trial.site.name: typed(trial.site, trial.change())}, inputs, self._kinds)

    def _put_together(
        self,
        tried: Sequence[tuple[str, int, _Carried, float]],
        common: Sequence[tuple[_Carried, float, dict[str, Difference]]],
        outputs: Sequence[str],
    ) -> dict[str, list[Difference]]:
        """What all outputs lose: what was seen, and behind the stage what is to be expected."""
        result: dict[str, list[Difference]] = {}
        for site, number, noise, at_cut in tried:
            mixed, mixed_at_cut, seen = common[number]
            found = dict.fromkeys(outputs, Difference(0.0, 0.0)) | noise.outputs.by_name()
            if self._last[site] == number and mixed_at_cut > 0.0:
                share = at_cut / mixed_at_cut
                for name, later in mixed.outputs.by_name().items():
                    if name not in seen:
                        found[name] = Difference(later.noise * share, later.loss * share)
            result.setdefault(site, []).append(mean_of(found, self._kinds))
        return result

    def _advance(
        self,
        noise: _Carried,
        stage: _Stage,
        run: Callable[[Feed, Feed], dict[str, Array]],
        held: Sequence[Feed],
        exact: Sequence[Mapping[str, Array]],
    ) -> None:
        """Carry noise through one stage."""
        noise.cut = _VectorNoise()
        for number in noise.inputs:
            values = {**held[number], **noise.values[number]}
            found = run(values, noise.weights)
            before = exact[number]
            noise.outputs.add(_floats(before, stage.outputs), found)
            kept: dict[str, Array] = {}
            for name in stage.alive:
                right = before.get(name, held[number].get(name))
                now = found.get(name, values.get(name))
                if right is None or now is None:
                    continue
                if right.dtype.kind == "f":
                    noise.cut.add(name, right, now)
                if now is not right and not np.array_equal(now, right):
                    kept[name] = now
            noise.values[number] = kept

    def _session(
        self, stage: _Stage, sample: Feed, folder: Path
    ) -> Callable[[Feed, Feed], dict[str, Array]]:
        """A function from values and changed weights to what a stage makes."""
        from onnxcomp.runtime.evaluate import runner
        from onnxcomp.runtime.session import open_session

        nodes = list(self._model.graph)
        made = {value.name for index in stage.nodes for value in nodes[index].outputs}
        wanted = sorted({*stage.outputs, *(n for n in stage.alive if n in made)})
        model = segment(self._model, stage.nodes, wanted, sample, {})
        session = open_session(save(model, folder / "stage.onnx").files[0])
        inputs = [value.name for value in session.get_inputs()]
        weights = {value.name for value in session.get_overridable_initializers()}
        call = runner(session)

        def run(values: Feed, changed: Feed) -> dict[str, Array]:
            feed = {name: values[name] for name in inputs}
            feed |= {name: array for name, array in changed.items() if name in weights}
            return dict(zip(wanted, call(feed), strict=True))

        return run


def _floats(values: Mapping[str, Array], names: Sequence[str]) -> dict[str, Array]:
    """Those of some values that are floating-point."""
    return {name: values[name] for name in names if values[name].dtype.kind == "f"}


class _Graph:
    """The nodes of a model that compute with its inputs, and what they read.

    Attributes:
        nodes: All nodes.
        work: Indices of those that compute with inputs of the model.
        weights: For each of them the weights that it reads, through nodes of constants as well.
        first: Where each weight is read first, as a position in `work`.
    """

    def __init__(self, model: ir.Model, sites: Sequence[WeightSite]) -> None:
        self.nodes = list(model.graph)
        self._reads = [[value.name or "" for value in read_values(node)] for node in self.nodes]
        self._constant = self._constant_nodes(model)
        self.work = [index for index in range(len(self.nodes)) if index not in self._used()]
        names = {site.name for site in sites}
        self.weights = [
            {name for i in (index, *self.needed([index])) for name in self._reads[i]} & names
            for index in self.work
        ]
        self.first: dict[str, int] = {}
        for position, found in enumerate(self.weights):
            for name in found:
                self.first.setdefault(name, position)

    def _constant_nodes(self, model: ir.Model) -> dict[str, int]:
        """Values that are computed from constants alone, by name, with their nodes."""
        found: dict[str, int] = {}
        for index, node in enumerate(self.nodes):
            known = all(n in found or n in model.graph.initializers for n in self._reads[index])
            if known and not any(value.is_graph_output() for value in node.outputs):
                found |= {value.name or "": index for value in node.outputs}
        return found

    def _used(self) -> set[int]:
        return set(self._constant.values())

    def needed(self, part: Sequence[int]) -> set[int]:
        """The nodes of constants that some nodes need: each stage has its own."""
        found: set[int] = set()
        pending = [name for index in part for name in self._reads[index]]
        while pending:
            index = self._constant.get(pending.pop(), -1)
            if index >= 0 and index not in found:
                found.add(index)
                pending += self._reads[index]
        return found

    def spans(self) -> dict[str, tuple[int, int]]:
        """Positions in `work` that make each value and that read it last."""
        made = {v.name or "": p for p, i in enumerate(self.work) for v in self.nodes[i].outputs}
        read = {name: p for p, i in enumerate(self.work) for name in self._reads[i]}
        return {name: (made.get(name, -1), position) for name, position in read.items()}

    def made(self, start: int, stop: int) -> set[str]:
        """Values that a stretch of `work` makes."""
        part = self.work[start:stop]
        return {value.name or "" for index in part for value in self.nodes[index].outputs}


def cut_into_stages(model: ir.Model, sites: Sequence[WeightSite], count: int) -> tuple[_Stage, ...]:
    """Cut a model where few values are alive, into stages of about the same bytes of weights.

    Args:
        model: The model; its nodes are in topological order.
        sites: Its weights.
        count: Stages to aim at; there are fewer where a weight is larger than a share.
    """
    graph = _Graph(model, sites)
    fed = {v.name or "" for v in model.graph.inputs if not v.is_initializer()}
    spans = {name: span for name, span in graph.spans().items() if span[0] >= 0 or name in fed}
    results = {value.name or "" for value in model.graph.outputs}
    cuts = _cuts(graph, sites, spans, count)
    stages = []
    for start, stop in zip([0, *cuts], [*cuts, len(graph.work)], strict=True):
        part = graph.work[start:stop]
        alive = sorted(name for name, (made, read) in spans.items() if made < stop <= read)
        own = tuple(site for site in sites if start <= graph.first.get(site.name, -1) < stop)
        nodes = tuple(sorted({*part, *graph.needed(part)}))
        outputs = tuple(sorted(graph.made(start, stop) & results))
        stages.append(_Stage(nodes, tuple(alive), outputs, own))
    return tuple(stages)


def _last_reads(
    model: ir.Model, stages: Sequence[_Stage], sites: Sequence[WeightSite]
) -> dict[str, int]:
    """Number of the last stage that reads each weight."""
    nodes = list(model.graph)
    names = {site.name for site in sites}
    return {
        value.name or "": number
        for number, stage in enumerate(stages)
        for index in stage.nodes
        for value in read_values(nodes[index])
        if value.name in names
    }


def _cuts(
    graph: _Graph,
    sites: Sequence[WeightSite],
    spans: Mapping[str, tuple[int, int]],
    count: int,
) -> list[int]:
    """Positions before which the model is cut, in order."""
    length = len(graph.work)
    alive, sizes = np.zeros(length + 1, np.int64), np.zeros(length + 1)
    for made, read in spans.values():
        alive[made + 1] += 1
        alive[read + 1] -= 1
    for site in sites:
        if site.name in graph.first:
            sizes[graph.first[site.name] + 1] += site.nbytes
    alive, share = np.cumsum(alive), np.cumsum(sizes) / max(1.0, sizes.sum())
    found: set[int] = set()
    for number in range(1, count):
        near = np.abs(share - number / count) * count
        able = [p for p in np.flatnonzero(near <= _SLACK).tolist() if 0 < p < length]
        if able:
            found.add(min(able, key=lambda p: (alive[p], near[p], p)))
    return sorted(found)
