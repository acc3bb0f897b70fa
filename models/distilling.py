"""A short training of shared memories towards the outputs of the dense model.

The part of a graph that depends on the memories is run in torch, node by node; everything else is
taken from one run of the dense model in ONNX Runtime. Steps of Adam on the memories alone make the
outputs those of the dense model, on calibration inputs; inputs kept aside judge.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from onnxcomp.errors import ModelError
from onnxcomp.models.torch_operators import OPERATORS
from onnxcomp.passes.calibration.segmented_run import Chain, read_values
from onnxcomp.passes.calibration.statistics import HELD_OUT
from onnxcomp.passes.codecs.protocol import SharedValues
from onnxcomp.passes.ir.traversal import initializers, is_default_domain
from onnxcomp.passes.weight import Array, Feed

__all__ = ["distill"]

# The first rate, in parts of a memory's root mean square; it falls to nothing along a cosine.
_RATE = 0.01

Tensors = dict[str, torch.Tensor]

# What becomes of the values of the n-th weight when they are stored: rounded, say.
Stored = Callable[[int, Array], Array]


class _Graph:
    """The part of a graph that depends on some initializers, in torch.

    Args:
        model: The canonical dense model; only read.
        trained: Names of the initializers that change.
        fixed: Other values of some of the others.
        feeds: Inputs by name.
        folder: Where segments are written for ONNX Runtime.

    Raises:
        ModelError: An operator is in it that is not known in torch, or no output depends on it.
    """

    def __init__(
        self,
        model: ir.Model,
        trained: Sequence[str],
        fixed: Mapping[str, Array],
        feeds: Sequence[Feed],
        folder: Path | None,
    ) -> None:
        self._nodes = _moving(model, trained, feeds[:1], folder)
        moving = {value.name or "" for node in self._nodes for value in node.outputs[:1]}
        outputs = [value.name or "" for value in model.graph.outputs]
        self.outputs = [name for name in outputs if name in moving]
        if not self.outputs:
            raise ModelError("no output of floating point depends on shared weights")
        read = {value.name or "" for node in self._nodes for value in read_values(node)}
        tensors = initializers(model)
        self._constants: Tensors = {}
        for name in sorted(read & set(tensors) - set(trained)):
            constant = tensors[name].const_value
            assert constant is not None
            self._constants[name] = _tensor(fixed.get(name, np.asarray(constant.numpy())))
        given = sorted(read - moving - set(tensors))
        wanted = [*given, *self.outputs]
        self.runs: list[Tensors] = [
            {name: _tensor(array) for name, array in values.items()}
            for values in Chain(model, feeds, [wanted], folder).advance(wanted)
        ]
        self._given = given

    def run(self, number: int, weights: Mapping[str, torch.Tensor]) -> Tensors:
        """Outputs for one input with these values of the trained initializers."""
        fixed = {name: self.runs[number][name] for name in self._given}
        values: Tensors = {**self._constants, **fixed, **weights}
        for node in self._nodes:
            inputs = [None if v is None else values[v.name or ""] for v in node.inputs]
            while inputs and inputs[-1] is None:
                inputs.pop()
            attributes = {name: _plain(item) for name, item in node.attributes.items()}
            try:
                result = OPERATORS[node.op_type](attributes, *inputs)
            except (NotImplementedError, TypeError) as error:
                raise ModelError(
                    f"node {node.name!r} ({node.op_type}) cannot be trained through: {error}",
                    hint="leave --distill out",
                ) from error
            values[node.outputs[0].name or ""] = result
        return {name: values[name] for name in self.outputs}


def _plain(attribute: Any) -> Any:
    """The value of an attribute; texts, numbers and lists of them."""
    return list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value


def _tensor(array: Array) -> torch.Tensor:
    """Floating point as float32, everything else as it is."""
    kind = np.float32 if array.dtype.kind == "f" else array.dtype
    return torch.from_numpy(np.array(array, kind))


def _moving(
    model: ir.Model, trained: Sequence[str], feeds: Sequence[Feed], folder: Path | None
) -> list[ir.Node]:
    """Nodes with a first output of floating point that depends on initializers, in order."""
    moving, nodes = set(trained), []
    names = [v.name for node in model.graph for v in node.outputs[:1] if v.name]
    (values,) = Chain(model, feeds, [names], folder).advance(names)
    for node in model.graph:
        first = node.outputs[0].name or ""
        floating = first in values and values[first].dtype.kind == "f"
        if not floating or not any(value.name in moving for value in read_values(node)):
            continue
        if node.op_type not in OPERATORS or not is_default_domain(node.domain):
            raise ModelError(
                f"node {node.name!r} ({node.op_type}) cannot be trained through",
                hint="leave --distill out",
            )
        moving.add(first)
        nodes.append(node)
    return nodes


def _weights(
    found: Sequence[SharedValues], parameters: Sequence[torch.Tensor], tables: Sequence[Any]
) -> Tensors:
    """Weights as their nodes read them."""
    return {
        shared.name: (values[index] * signs).reshape(shared.shape)
        for shared, values, (index, signs) in zip(found, parameters, tables, strict=True)
    }


def _loss(graph: _Graph, number: int, weights: Tensors) -> torch.Tensor:
    """Mean over outputs of ``|y' - y|^2 / |y|^2``."""
    found = graph.run(number, weights)
    shares = [
        (found[name] - graph.runs[number][name]).square().sum()
        / graph.runs[number][name].square().sum().clamp_min(1e-12)
        for name in graph.outputs
    ]
    return torch.stack(shares).mean()


def distill(
    model: ir.Model,
    found: Sequence[SharedValues],
    feeds: Sequence[Feed],
    steps: int,
    stored: Stored,
    *,
    fixed: Mapping[str, Array],
    seed: int = 0,
    folder: Path | None = None,
) -> tuple[list[Array], float, float]:
    """Train shared values towards the outputs of the dense model.

    Args:
        model: The canonical dense model; only read.
        found: Weights that share values.
        feeds: Inputs by name; one in ten is kept aside.
        steps: Steps of Adam, each on one of the other inputs.
        stored: What values become when they are stored.
        fixed: Values of other weights, where they are not the dense ones.
        seed: Decides about their order.
        folder: Where temporary files lie.

    Returns:
        New values, float32, for each weight; and the relative error of the outputs on the inputs
        kept aside, before and after.

    Raises:
        ModelError: The graph has an operator that cannot be trained through.
    """
    if len(feeds) < HELD_OUT:
        raise ModelError(
            f"{len(feeds)} inputs are too few to distill with",
            hint=f"give {HELD_OUT} or more; one in {HELD_OUT} judges",
        )
    graph = _Graph(model, [shared.name for shared in found], fixed, feeds, folder)
    kept = list(range(HELD_OUT - 1, len(feeds), HELD_OUT))
    others = [number for number in range(len(feeds)) if number not in kept]
    tables = [(torch.from_numpy(s.index), torch.from_numpy(s.factors)) for s in found]
    parameters = [torch.tensor(s.values, requires_grad=True) for s in found]
    before = _error(graph, kept, _weights(found, parameters, tables))
    sizes = [float(p.detach().square().mean().sqrt()) or 1.0 for p in parameters]
    groups = [{"params": [p], "lr": _RATE * s} for p, s in zip(parameters, sizes, strict=True)]
    optimizer = torch.optim.Adam(groups)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        number = others[int(rng.integers(len(others)))]
        _loss(graph, number, _weights(found, parameters, tables)).backward()
        optimizer.step()
        falling.step()
    trained = [p.detach().numpy() for p in parameters]
    rounded = [torch.from_numpy(stored(n, values)) for n, values in enumerate(trained)]
    return trained, before, _error(graph, kept, _weights(found, rounded, tables))


def _error(graph: _Graph, numbers: Sequence[int], weights: Tensors) -> float:
    """Relative error of the outputs of some inputs."""
    with torch.no_grad():
        losses = [float(_loss(graph, number, weights)) for number in numbers]
    return math.sqrt(sum(losses) / len(losses))
