"""Training with hashed parameter sharing: weights are signed copies of a small memory.

`share` replaces layers before training; the training loop stays the user's own. What is trained and
saved is the memory; where a weight lies in it is computed (ops/hash/spec.md), so that no index is
saved. The exporters of torch write the memory and the places in it (`shared_layers`);
`onnxcomp.models.export` multiplies weights out and leaves a note in the model. By either the
compiler finds the memory again and stores weights bit for bit as they were trained.
The layers are in `shared_layers`.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import nn

from onnxcomp.errors import UsageError
from onnxcomp.models.shared_layers import (
    Map,
    Scaling,
    SharedConv2d,
    SharedEmbedding,
    SharedLayer,
    SharedLinear,
    SharedMemory,
)
from onnxcomp.passes.codecs.hash.format import ChunkLayout
from onnxcomp.passes.transforms.sharing_note import Layer, Memory

__all__ = ["memories", "multiplied_out", "share"]

Include = str | Callable[[str, nn.Module], bool] | None

# Layers with fewer weights stay dense: they are few bytes, and padded to whole tiles.
_LEAST = 4096


@contextlib.contextmanager
def multiplied_out(module: nn.Module) -> Iterator[None]:
    """Give shared layers their dense weights, for the exporters of torch.

    Inside, layers compute the same with weights of their own that have no gradient.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, SharedLayer)]
    common: dict[tuple[int, int], torch.Tensor] = {}
    with torch.no_grad():
        for layer in layers:
            key = (id(layer.memory), layer.base)
            layer._dense = common.setdefault(key, layer.matrix().contiguous())
    try:
        yield
    finally:
        for layer in layers:
            layer._dense = None


def memories(module: nn.Module) -> tuple[Memory, ...]:
    """What the compiler has to know of a module's shared weights, to find them in its graph."""
    layers: dict[int, tuple[SharedMemory, dict[int, Layer]]] = {}
    for layer in module.modules():
        if isinstance(layer, SharedLayer):
            memory = layer.memory
            scale = float(torch.tensor(layer.scale, dtype=torch.float32))
            found = Layer(layer.rows, layer.length, layer.base, scale)
            layers.setdefault(id(memory), (memory, {}))[1].setdefault(layer.base, found)
    return tuple(
        Memory(memory.slots, memory.seed, tuple(found.values()), memory.map)
        for memory, found in layers.values()
    )


def share(
    module: nn.Module,
    compression: float = 16.0,
    *,
    include: Include = None,
    memory: Literal["global", "module"] = "global",
    seed: int = 0,
    scaling: Scaling = "count",
    map: Map = "fold",
) -> nn.Module:
    """Replace Linear, Conv2d and Embedding layers by ones with shared weights, before training.

    The new layers start from random weights of the old ones' kind, not from the old weights.
    Layers that are the same module stay the same module; a weight that two layers have in common
    (an embedding and the head above it) stays common. Layers below 4,096 weights stay dense.

    Args:
        module: Changed in place.
        compression: Weights for each entry of the memory, 1 or more.
        include: Which layers: a regular expression searched for in their names, or a function of
            name and layer; None for all.
        memory: One memory for all layers, a submodule of the first of them, or one for each.
        seed: Seed of rotations and signs.
        scaling: See `SharedMemory`.
        map: See `SharedMemory`.

    Returns:
        The module.

    Raises:
        UsageError: No layer is found, or the compression is below 1.
    """
    if compression < 1.0:
        raise UsageError(f"compression={compression}", hint="it is 1 or more")
    found = list(_layers(module, include))
    if not found:
        raise UsageError(
            "no layer can share its weights",
            hint=f"Linear, Conv2d and Embedding layers of {_LEAST} weights or more can share",
        )
    shapes = {id(layer.weight): _extent(layer) for _, _, layer in found}
    tiles = sum(ChunkLayout(*extent).tiles for extent in shapes.values())

    def make(tiles: int, weight: torch.Tensor) -> SharedMemory:
        """The memory of weights of so many tiles, beside one of them."""
        return SharedMemory(
            max(1, math.ceil(tiles / compression)),
            seed=seed,
            scaling=scaling,
            map=map,
            device=weight.device,
            dtype=weight.dtype,
        )

    _replace(found, make(tiles, found[0][2].weight) if memory == "global" else None, make)
    return module


def _layers(module: nn.Module, include: Include) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Parents, names and layers that can share."""
    for path, parent in list(module.named_modules()):
        for name, layer in list(parent.named_children()):
            full = f"{path}.{name}" if path else name
            if not isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding):
                continue
            if layer.weight.numel() >= _LEAST and _included(include, full, layer):
                yield parent, name, layer


def _included(include: Include, name: str, layer: nn.Module) -> bool:
    if callable(include):
        return include(name, layer)
    return include is None or re.search(include, name) is not None


def _extent(layer: Any) -> tuple[int, int]:
    """Rows and columns of a layer's weight."""
    shape = layer.weight.shape
    return int(shape[0]), math.prod(shape[1:])


def _replace(
    found: list[tuple[nn.Module, str, Any]],
    pool: SharedMemory | None,
    make: Callable[[int, torch.Tensor], SharedMemory],
) -> None:
    """Put shared layers in the place of the found ones; common weights stay common."""
    made: dict[int, SharedLayer] = {}
    by_weight: dict[int, SharedLayer] = {}
    for parent, name, layer in found:
        if id(layer) not in made:
            twin = by_weight.get(id(layer.weight))
            rows, length = _extent(layer)
            memory = twin.memory if twin is not None else pool
            if memory is None:
                memory = make(ChunkLayout(rows, length).tiles, layer.weight)
            made[id(layer)] = _shared(layer, memory, twin)
            if len(made) == 1 or (pool is None and twin is None):
                made[id(layer)].shared_memory = memory
            by_weight.setdefault(id(layer.weight), made[id(layer)])
        setattr(parent, name, made[id(layer)])


def _shared(layer: Any, memory: SharedMemory, twin: SharedLayer | None) -> SharedLayer:
    """The shared layer for a dense one, with the weight of `twin` where there is one."""
    base = None if twin is None else twin.base
    std = None if twin is None else twin.scale * memory.std
    if isinstance(layer, nn.Linear):
        bias = layer.bias is not None
        made: SharedLayer = SharedLinear(
            layer.in_features, layer.out_features, bias, memory=memory, base=base, std=std
        )
    elif isinstance(layer, nn.Conv2d):
        made = SharedConv2d(layer, memory=memory, base=base, std=std)
    else:
        made = SharedEmbedding(
            layer.num_embeddings,
            layer.embedding_dim,
            layer.padding_idx,
            memory=memory,
            base=base,
            std=std,
        )
    made.train(layer.training)
    return made
