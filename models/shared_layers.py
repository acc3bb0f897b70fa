"""Layers whose weights are signed copies of the slots of a memory.

The two remedies of STABLE-RPS (Desai, Shrivastava: In Defense of Parameter Sharing for
Model-Compression, arXiv 2310.11611): slots are used equally often, in order (the map `fold`), so
that a memory as large as the weights is the dense model; and gradients are scaled
(`SharedMemory.scaling`), so that a step does not depend on the scale at which the memory was
initialised. The gradient of an entry is then the mean over its uses, where an optimizer without
scaling sees the sum: with SGD use a learning rate between the square root of the compression and
the compression times the dense one. Adam and its like are indifferent to the scale of gradients.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.hash.format import (
    LANES,
    TILE,
    ChunkLayout,
    Sharing,
    mix,
    reduce,
    seeds,
)
from onnxcomp.passes.transforms.shared_lookups import places_name

__all__ = [
    "Map",
    "Scaling",
    "SharedConv2d",
    "SharedEmbedding",
    "SharedLayer",
    "SharedLinear",
    "SharedMemory",
]

Scaling = Literal["count", "none"]
Map = Literal["fold", "roast"]


class _Expand(torch.autograd.Function):
    """Signed copies of slots; the backward pass adds them up in one order, whatever the device."""

    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        slots: torch.Tensor,
        signs: torch.Tensor,
        runs: Any,
        factors: torch.Tensor | None,
    ) -> torch.Tensor:
        """The slots of ``values`` in the order of `slots`, with `signs`."""
        ctx.save_for_backward(signs, factors)
        ctx.shape, ctx.runs = values.shape, runs
        return values.index_select(0, slots) * signs

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradient of the entries: sums over their uses, times `factors` where given."""
        signs, factors = ctx.saved_tensors
        signed = gradients[0] * signs
        total = signed.new_zeros(ctx.shape)
        for first, slot, count in ctx.runs:
            total[slot : slot + count] += signed[first : first + count]
        return total if factors is None else total * factors, None, None, None, None


class SharedMemory(nn.Module):
    """The entries that the weights of many layers share.

    Args:
        slots: Slots of 256 entries, a tile of 16 x 16 weights each.
        seed: Seed of rotations and signs; saved with the state.
        std: Standard deviation of the entries at the start. With scaling it makes no difference.
        scaling: "count": the gradient of a slot is divided by ``A^2 / c``, c the number of its uses
            and A the sum of their layers' scales; "none": it is the plain sum over the uses.
        map: "fold": tiles take the slots in order, rotated in every round; "roast": each tile takes
            a slot of its own hash, so that some slots have many uses and some none.
        device: Where the entries lie.
        dtype: Element type of the entries.

    Attributes:
        values: The entries, ``(slots, 256)``.
    """

    def __init__(
        self,
        slots: int,
        *,
        seed: int = 0,
        std: float = 0.04,
        scaling: Scaling = "count",
        map: Map = "fold",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if slots < 1:
            raise UsageError(
                f"a memory of {slots} slots", hint="one slot holds a tile of 16 x 16 weights"
            )
        if scaling not in ("count", "none"):
            raise UsageError(f"scaling={scaling!r}", hint='choose "count" or "none"')
        if map not in ("fold", "roast"):
            raise UsageError(f"map={map!r}", hint='choose "fold" or "roast"')
        self.slots, self.seed, self.std, self.scaling = slots, seed, std, scaling
        self.map: Map = map
        self.tiles = 0
        self.values = nn.Parameter(torch.empty(slots, TILE, device=device, dtype=dtype))
        uses = torch.zeros(2, slots, device=device, dtype=torch.float64)
        self.register_buffer("uses", uses, persistent=False)
        self.uses: torch.Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform entries of standard deviation `std`."""
        bound = math.sqrt(3.0) * self.std
        nn.init.uniform_(self.values, -bound, bound)

    def take(self, tiles: int) -> int:
        """Number of the first of `tiles` tiles that nobody has taken before."""
        first = self.tiles
        self.tiles += tiles
        return first

    def count(self, slots: torch.Tensor, scale: float) -> None:
        """Note uses of slots by a layer of this scale."""
        ones = torch.ones_like(slots, dtype=torch.float64)
        self.uses[0].index_add_(0, slots, ones)
        self.uses[1].index_add_(0, slots, ones * scale)

    def factors(self) -> torch.Tensor | None:
        """What gradients of slots are multiplied by, ``(slots, 1)``: ``c / A^2``; None for 1.

        A step then changes the weights as if every use had the mean gradient.
        """
        if self.scaling == "none":
            return None
        count, total = self.uses
        factors = torch.where(count > 0, count / total.square().clamp_min(1e-30), 1.0)
        return factors.to(self.values.dtype)[:, None]

    @property
    def run(self) -> int:
        """Tiles that take consecutive slots."""
        return self.slots if self.map == "fold" else 1

    def sharing(self, base: int) -> Sharing:
        """The map of a weight whose first tile has this number."""
        return Sharing(self.run, *seeds(self.seed), base)

    def get_extra_state(self) -> torch.Tensor:
        """What the meaning of entries depends on, int64 (3,): seed, number of tiles, run."""
        return torch.tensor([self.seed, self.tiles, self.run])

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Refuse a state that was trained for other places.

        Raises:
            UsageError: Another seed, another map, or other layers.
        """
        seed, tiles, run = state.tolist()
        if (seed, tiles, run) != (self.seed, self.tiles, self.run):
            raise UsageError(
                f"the state is of a memory of seed {seed} and {tiles} tiles in runs of {run}, this "
                f"one has seed {self.seed} and {self.tiles} tiles in runs of {self.run}",
                hint="build the same layers in the same order, with the same seed and map",
            )

    def extra_repr(self) -> str:
        """For print."""
        return (
            f"slots={self.slots}, tiles={self.tiles}, seed={self.seed}, {self.map}, {self.scaling}"
        )


class SharedLayer(nn.Module):
    """A layer whose weight lies in a `SharedMemory`.

    Args:
        rows: Rows of the weight as a matrix.
        length: Its columns.
        scale: What entries are multiplied by.
        memory: Where the weight lies. A layer that gets none has one of its own; one that is given
            belongs to the model, which must keep it as a submodule.
        base: Number of the first tile; None for tiles that nobody else has. Two layers with the
            same base, rows and columns have the same weight.
    """

    def __init__(
        self, rows: int, length: int, scale: float, memory: SharedMemory, base: int | None
    ) -> None:
        super().__init__()
        self.rows, self.length, self.scale = rows, length, scale
        self.geometry = ChunkLayout(rows, length)
        # Not a submodule: its entries would appear in the state once for every layer.
        object.__setattr__(self, "_memory", memory)
        self.base = memory.take(self.geometry.tiles) if base is None else base
        slots, minus, self._runs = _places(memory, self.base, self.geometry.tiles)
        self._look_up(slots.to(memory.values.device), minus.to(memory.values.device))
        memory.count(self.slots, scale)
        self.register_buffer("_dense", None, persistent=False)
        self._dense: torch.Tensor | None

    def _look_up(self, slots: torch.Tensor, minus: torch.Tensor) -> None:
        """Take the places of the weight, and the part of the layer that looks it up there."""
        places = _Places(slots, minus, self.geometry)
        # Not a fixed name: exporters write it, and the compiler reads the map there.
        self.add_module(places_name(self.memory.sharing(self.base)), places)
        object.__setattr__(self, "_places", places)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a module that was pickled whole, also before layers had a part for look-ups."""
        super().__setstate__(state)
        if "_places" not in self.__dict__:
            slots, signs = (self._buffers.pop(name) for name in ("slots", "signs"))
            self._non_persistent_buffers_set -= {"slots", "signs"}
            assert slots is not None and signs is not None
            self._look_up(slots.to(torch.int32), signs.reshape(-1) < 0)

    @property
    def memory(self) -> SharedMemory:
        """Where the weight lies."""
        memory: SharedMemory = self._memory
        return memory

    @property
    def slots(self) -> torch.Tensor:
        """Slot of every tile, ``(tiles,)``."""
        slots: torch.Tensor = self._places.slots
        return slots.reshape(-1)

    @property
    def signs(self) -> torch.Tensor:
        """Sign of every tile, 1 or -1 in the type of the memory, ``(tiles, 1)``."""
        minus: torch.Tensor = self._places.minus
        return 1 - 2 * minus.reshape(-1, 1).to(self.memory.values.dtype)

    def matrix(self) -> torch.Tensor:
        """The weight as it is used, ``(rows, length)``."""
        if self._dense is not None:
            return self._dense
        values = self.memory.values
        if _exporting():
            tiles = self._places(values)
        elif values.requires_grad and torch.is_grad_enabled():
            factors = self.memory.factors()
            tiles = _Expand.apply(values, self.slots, self.signs, self._runs, factors)
        else:
            tiles = values.index_select(0, self.slots) * self.signs
        g = self.geometry
        panels = tiles.reshape(g.panels, g.blocks * LANES, LANES).transpose(1, 2)
        matrix = panels.reshape(g.panels * LANES, g.blocks * LANES)
        return matrix[: self.rows, : self.length] * self.scale


def _exporting() -> bool:
    """Whether the module is being traced: by an exporter to ONNX, torch.export or torch.jit."""
    exporting = getattr(torch.compiler, "is_exporting", bool)  # since torch 2.7
    return bool(torch.onnx.is_in_onnx_export() or exporting() or torch.jit.is_tracing())


class _Places(nn.Module):
    """Where the tiles of a weight lie, and the look-up in the form in which it is exported.

    Standard operators that the exporters of torch take as they are and do not fold:
    ``Where(minus, -Gather(memory, slots), ...)``. They fold what they can compute, and write the
    dense weight; an index of two dimensions stops the older exporter, and an operator with two
    outputs the optimizer behind the newer one, which would fold a small memory. The memory is cut
    in two and put together again for that alone.

    Args:
        slots: Slot of every tile, int32 (tiles,).
        minus: Where the sign is a minus, bool (tiles,).
        geometry: Sizes of the weight.
    """

    def __init__(self, slots: torch.Tensor, minus: torch.Tensor, geometry: ChunkLayout) -> None:
        super().__init__()
        shape = (geometry.panels, geometry.blocks)
        self.register_buffer("slots", slots.reshape(shape), persistent=False)
        self.register_buffer("minus", minus.reshape(*shape, 1), persistent=False)
        self.slots: torch.Tensor
        self.minus: torch.Tensor

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Entries ``(slots, 256)`` to tiles ``(panels, blocks, 256)``."""
        memory = torch.cat(values.split(TILE // 2, dim=1), dim=1)
        tiles = nn.functional.embedding(self.slots, memory)
        return torch.where(self.minus, -tiles, tiles)

    def __repr__(self) -> str:
        return f"{self.slots.numel()} tiles"


def _places(
    memory: SharedMemory, base: int, tiles: int
) -> tuple[torch.Tensor, torch.Tensor, tuple[tuple[int, int, int], ...]]:
    """Slots of tiles, where signs are minus, and runs (first tile, slot, count) of slots."""
    import numpy as np

    rotate, sign = seeds(memory.seed)
    numbers = base + np.arange(tiles, dtype=np.int64)
    partition, offset = numbers // memory.run, numbers % memory.run
    rotation = reduce(mix(partition + rotate), memory.slots) * (partition != 0)
    slots = (offset + rotation) % memory.slots
    minus = (mix(numbers + sign) >= 2**30) & (partition != 0)
    breaks = np.flatnonzero(np.diff(slots) != 1) + 1
    firsts = [0, *breaks.tolist()]
    ends = [*breaks.tolist(), tiles]
    runs = tuple((a, int(slots[a]), b - a) for a, b in zip(firsts, ends, strict=True))
    return torch.from_numpy(slots.astype(np.int32)), torch.from_numpy(minus), runs


def _memory_of(
    memory: SharedMemory | None, rows: int, length: int, compression: float
) -> SharedMemory:
    """The given memory, or one of the layer's own at this compression."""
    if memory is not None:
        return memory
    return SharedMemory(max(1, math.ceil(ChunkLayout(rows, length).tiles / compression)))


class SharedLinear(SharedLayer):
    """`torch.nn.Linear` with a shared weight.

    Args:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        bias: Whether there is a bias; it is not shared.
        memory: See `SharedLayer`.
        compression: Weights for each entry of a memory of its own.
        base: See `SharedLayer`.
        std: Standard deviation of the weights at the start; None for that of `torch.nn.Linear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        memory: SharedMemory | None = None,
        compression: float = 16.0,
        base: int | None = None,
        std: float | None = None,
    ) -> None:
        own = _memory_of(memory, out_features, in_features, compression)
        std = 1.0 / math.sqrt(3.0 * in_features) if std is None else std
        super().__init__(out_features, in_features, std / own.std, own, base)
        if memory is None:
            self.shared_memory = own
        bound = 1.0 / math.sqrt(in_features)
        self.bias = _bias(out_features, bound, own) if bias else None

    @property
    def weight(self) -> torch.Tensor:
        """``(out_features, in_features)``."""
        return self.matrix()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        return nn.functional.linear(x, self.matrix(), self.bias)

    def extra_repr(self) -> str:
        """For print."""
        return f"{self.length}, {self.rows}, bias={self.bias is not None}"


def _bias(size: int, bound: float, memory: SharedMemory) -> nn.Parameter:
    values = torch.empty(size, device=memory.values.device, dtype=memory.values.dtype)
    return nn.Parameter(nn.init.uniform_(values, -bound, bound))


class SharedConv2d(SharedLayer):
    """`torch.nn.Conv2d` with a shared weight, ``out_channels`` rows.

    Args:
        layer: Its sizes, stride, padding, dilation and groups are taken over, its weight is not.
        memory: See `SharedLayer`.
        compression: Weights for each entry of a memory of its own.
        base: See `SharedLayer`.
        std: Standard deviation of the weights at the start; None for that of `torch.nn.Conv2d`.
    """

    def __init__(
        self,
        layer: nn.Conv2d,
        *,
        memory: SharedMemory | None = None,
        compression: float = 16.0,
        base: int | None = None,
        std: float | None = None,
    ) -> None:
        self_shape = tuple(layer.weight.shape)
        rows, length = self_shape[0], math.prod(self_shape[1:])
        own = _memory_of(memory, rows, length, compression)
        std = 1.0 / math.sqrt(3.0 * length) if std is None else std
        super().__init__(rows, length, std / own.std, own, base)
        if memory is None:
            self.shared_memory = own
        self.shape, self.groups = self_shape, layer.groups
        self.stride, self.dilation, self.padding = layer.stride, layer.dilation, layer.padding
        self.padding_mode = layer.padding_mode
        self._reversed_padding = list(layer._reversed_padding_repeated_twice)
        self.bias = None
        if layer.bias is not None:
            self.bias = _bias(rows, 1.0 / math.sqrt(length), own)

    @property
    def weight(self) -> torch.Tensor:
        """``(out_channels, in_channels / groups, height, width)``."""
        return self.matrix().reshape(self.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(n, in_channels, h, w)`` to ``(n, out_channels, h', w')``."""
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            x, padding = nn.functional.pad(x, self._reversed_padding, mode=self.padding_mode), 0
        return nn.functional.conv2d(
            x, self.weight, self.bias, self.stride, padding, self.dilation, self.groups
        )

    def extra_repr(self) -> str:
        """For print."""
        return f"{self.shape}, stride={self.stride}, bias={self.bias is not None}"


class SharedEmbedding(SharedLayer):
    """`torch.nn.Embedding` with a shared table.

    Args:
        num_embeddings: Rows of the table.
        embedding_dim: Columns of the table.
        padding_idx: A row whose look-ups have no gradient.
        memory: See `SharedLayer`.
        compression: Weights for each entry of a memory of its own.
        base: See `SharedLayer`.
        std: Standard deviation of the table at the start; None for 1, that of `torch.nn.Embedding`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        memory: SharedMemory | None = None,
        compression: float = 16.0,
        base: int | None = None,
        std: float | None = None,
    ) -> None:
        own = _memory_of(memory, num_embeddings, embedding_dim, compression)
        scale = (1.0 if std is None else std) / own.std
        super().__init__(num_embeddings, embedding_dim, scale, own, base)
        if memory is None:
            self.shared_memory = own
        self.padding_idx = padding_idx

    @property
    def weight(self) -> torch.Tensor:
        """``(num_embeddings, embedding_dim)``."""
        return self.matrix()

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices of any shape to ``indices.shape + (embedding_dim,)``."""
        return nn.functional.embedding(indices, self.matrix(), self.padding_idx)

    def extra_repr(self) -> str:
        """For print."""
        return f"{self.rows}, {self.length}"
