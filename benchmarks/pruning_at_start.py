"""Scores of weights before training: which to keep. Random, magnitude, SNIP, GraSP, SynFlow.

The formulas are those of the papers: SNIP (Lee et al., arXiv 1810.02340), GraSP (Wang et al., arXiv
2002.07376), SynFlow (Tanaka et al., arXiv 2006.05467). Weights of all layers compete with each
other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["METHODS", "Masks", "apply_masks", "keep_largest", "magnitudes", "masks_for"]

Masks = dict[str, torch.Tensor]
METHODS = ("random", "magnitude", "snip", "grasp", "synflow")

# Rounds of SynFlow, each of which keeps the same share of what the one before kept.
_ROUNDS = 100

# GraSP divides scores of classes by this, so that gradients are not dominated by few images.
_TEMPERATURE = 200.0


def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Set what is masked to zero."""
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)


def keep_largest(scores: Mapping[str, torch.Tensor], count: int) -> Masks:
    """1 for the largest scores of all layers together, 0 for the others."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    chosen = torch.zeros_like(flat)
    chosen[flat.topk(min(count, flat.numel())).indices] = 1.0
    parts = chosen.split([score.numel() for score in scores.values()])
    return {
        name: part.reshape(score.shape).float()
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def magnitudes(model: nn.Module, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Absolute values of weights."""
    return {name: model.get_parameter(name).detach().abs() for name in names}


def _gradients(
    model: nn.Module, names: Sequence[str], batches: Sequence[Any], temperature: float, graph: bool
) -> list[torch.Tensor]:
    """Gradients of the mean loss of some batches."""
    loss: Any = 0.0
    for images, labels in batches:
        loss = loss + functional.cross_entropy(model(images) / temperature, labels)
    weights = [model.get_parameter(name) for name in names]
    return list(torch.autograd.grad(loss / len(batches), weights, create_graph=graph))


def _snip(model: nn.Module, names: Sequence[str], batches: Sequence[Any]) -> Any:
    """How much the loss depends on a weight: ``|g w|``."""
    found = _gradients(model, names, batches, 1.0, False)
    scores = zip(names, found, strict=True)
    return {name: (g * model.get_parameter(name)).abs().detach() for name, g in scores}


def _grasp(model: nn.Module, names: Sequence[str], batches: Sequence[Any]) -> Any:
    """How much of the gradient's flow a weight carries: ``w (H g)``."""
    first = _gradients(model, names, batches, _TEMPERATURE, False)
    second = _gradients(model, names, batches, _TEMPERATURE, True)
    flow: Any = sum((a.detach() * b).sum() for a, b in zip(first, second, strict=True))
    weights = [model.get_parameter(name) for name in names]
    products = torch.autograd.grad(flow, weights)
    return {n: (h * w).detach() for n, h, w in zip(names, products, weights, strict=True)}


def _synflow(model: nn.Module, names: Sequence[str], image: torch.Tensor, count: int) -> Masks:
    """Keep what carries the flow of absolute weights from an input of ones, in rounds."""
    flow = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for tensor in flow.parameters():
            tensor.abs_()
    total = sum(flow.get_parameter(name).numel() for name in names)
    masks: Masks = {}
    ones = torch.ones_like(image[:1], dtype=torch.float64)
    for step in range(1, _ROUNDS + 1):
        flow.zero_grad()
        flow(ones).sum().backward()
        weights = {name: flow.get_parameter(name) for name in names}
        scores = {n: (w.grad * w).detach() for n, w in weights.items() if w.grad is not None}
        masks = keep_largest(scores, round(total * (count / total) ** (step / _ROUNDS)))
        apply_masks(flow, masks)
    return masks


def masks_for(
    method: str, model: nn.Module, names: Sequence[str], batches: Sequence[Any], count: int
) -> Masks:
    """Which weights to keep, before training.

    Args:
        method: One of `METHODS`.
        model: Untrained; not changed, but for its statistics of batches.
        names: Weights that compete.
        batches: Images and labels to score with.
        count: How many weights to keep.
    """
    if method == "synflow":
        return _synflow(model, names, batches[0][0], count)
    if method == "random":
        scores = {name: torch.rand_like(w) for name, w in magnitudes(model, names).items()}
    elif method == "magnitude":
        scores = magnitudes(model, names)
    else:
        scores = (_snip if method == "snip" else _grasp)(model, names, batches)
    return keep_largest(scores, count)
