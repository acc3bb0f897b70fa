"""Ranks of all layers at once, for `truncate`: the modes of LoRITa (arXiv 2405.03089).

`local` keeps the same share of the singular values of each layer; `global` those of all layers that
are above one share of their layer's largest; `raw` those above one size. Truncating step by step
with training in between is its iterative mode.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, get_args

from onnxcomp.models.torch_calls import import_torch

import_torch()

import torch  # noqa: E402 - after the message for those who do not have it
from torch import nn  # noqa: E402

from onnxcomp.models.composed import (  # noqa: E402
    ComposedConv2d,
    ComposedLinear,
    Include,
    included,
)

__all__ = ["Truncation", "choose_ranks"]

Truncation = Literal["local", "global", "raw"]

# Halvings of the range of thresholds.
_HALVINGS = 50

# Singular values below this share of the largest are those of rounding.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True, slots=True)
class _Spectrum:
    """One layer.

    Attributes:
        rows: Outputs.
        length: Inputs, times the places of a window.
        values: Singular values, largest first; empty where the layer stays as it is.
    """

    rows: int
    length: int
    values: torch.Tensor

    def weights(self, rank: int | None) -> int:
        """How many weights the layer has at a rank, or as it is where that is not more."""
        full = self.rows * self.length
        return full if rank is None else min(full, rank * (self.rows + self.length))


def choose_ranks(
    module: nn.Module, kept: float, *, mode: Truncation = "global", include: Include = None
) -> dict[str, int]:
    """The largest ranks of layers at which a share of the weights is left.

    Args:
        module: Any model; chains of `lorita` and `truncate` count by their product.
        kept: Share of the weights of all Linear and Conv2d layers without groups, above 0 and at
            most 1.
        mode: How ranks of several layers are chosen together.
        include: Regular expression found in the names of layers to truncate, or a function of name
            and layer; None for all. The others keep their weights.

    Returns:
        Ranks by the names of layers; without those that factors would not make smaller.

    Raises:
        ValueError: The share or the mode is not one of these.
    """
    if not 0.0 < kept <= 1.0:
        raise ValueError(f"kept={kept}: it is a share above 0 and at most 1")
    if mode not in get_args(Truncation):
        raise ValueError(f"mode={mode!r}: it is one of {', '.join(get_args(Truncation))}")
    wanted = included(include)
    layers = {name: _spectrum(layer, wanted(name, layer)) for name, layer in _layers(module)}
    limit = kept * sum(layer.weights(None) for layer in layers.values())
    most = max((float(s.values[0]) for s in layers.values() if len(s.values)), default=0.0)
    low, high = 0.0, most if mode == "raw" else 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        ranks = {name: _rank(layer, mode, middle) for name, layer in layers.items()}
        total = sum(layer.weights(ranks[name]) for name, layer in layers.items())
        low, high = (low, middle) if total <= limit else (middle, high)
    ranks = {name: _rank(layer, mode, high) for name, layer in layers.items()}
    return {
        name: rank
        for name, rank in ranks.items()
        if rank is not None and layers[name].weights(rank) < layers[name].weights(None)
    }


def _layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that can be truncated; not the factors in a chain."""
    chains = (ComposedLinear, ComposedConv2d)
    inside = {id(f) for m in module.modules() if isinstance(m, chains) for f in m}
    for name, layer in module.named_modules():
        plain = type(layer) in (nn.Linear, nn.Conv2d) and getattr(layer, "groups", 1) == 1
        if (plain and id(layer) not in inside) or isinstance(layer, chains):
            yield name, layer


def _spectrum(layer: Any, wanted: bool) -> _Spectrum:
    weight = layer.weight.detach().flatten(1)
    values = torch.linalg.svdvals(weight.double().cpu()) if wanted else torch.zeros(0)
    return _Spectrum(weight.shape[0], weight.shape[1], values)


def _rank(layer: _Spectrum, mode: Truncation, cut: float) -> int | None:
    """The rank of a layer where `cut` is cut off; None where it stays as it is."""
    if not len(layer.values):
        return None
    real = max(1, int((layer.values > _ROUNDING * layer.values[0]).sum()))
    if mode == "local":
        return min(real, max(1, int((1.0 - cut) * len(layer.values))))
    least = cut if mode == "raw" else cut * layer.values[0]
    return min(real, max(1, int((layer.values >= least).sum())))
