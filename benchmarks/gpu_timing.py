"""Times of CUDA kernels against cuBLAS float16, by CUDA events.

Calls are captured into CUDA graphs, since starting one from Python takes longer than the kernel. A
graph goes round among weights that together are larger than the second-level cache; graphs of both
sides take turns, and figures are medians.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from gpu_calls import MEMORY_TYPES, Calls, HashWeight, HyperWeight
from gpu_rivals import copy_bandwidth, empty_launch, torch_int4

__all__ = ["BATCHES", "SHAPES", "Floor", "Row", "decode_rows", "floor", "matmul_rows"]

Array = np.ndarray[Any, Any]

SHAPES = ((4096, 4096), (4096, 11008), (8192, 8192))
BATCHES = (1, 4, 16, 64, 256, 1024)
_STATES = 7
_CALLS = 24  # of a graph, at least
_REPLAYS = 9
_INT4_ROWS = 64  # beyond, torch has no fast form
_LARGE_SHAPE, _SMALL_SHAPE = (8192, 8192), (4096, 4096)
# (kernel, shape, M) -> least and wanted speed-up over cuBLAS float16 (decoding: over a copy).
BARS: dict[tuple[str, tuple[int, int], int], tuple[float, float]] = {
    ("hyper k=4", _LARGE_SHAPE, 1): (2.1, 2.8),
    ("hyper k=3", _LARGE_SHAPE, 1): (2.4, 3.0),
    ("hyper k=2", _LARGE_SHAPE, 1): (2.7, 3.4),
    ("hyper k=4", _SMALL_SHAPE, 1): (1.6, 2.1),
    ("hyper k=3", _SMALL_SHAPE, 1): (1.8, 2.3),
    ("hyper k=2", _SMALL_SHAPE, 1): (2.0, 2.5),
    ("hyper k=4", _LARGE_SHAPE, 16): (1.3, 1.6),
    ("hyper k=2", _LARGE_SHAPE, 16): (1.7, 2.0),
    ("hyper k=4", _LARGE_SHAPE, 64): (0.95, 1.2),
    ("hyper k=2", _LARGE_SHAPE, 64): (1.1, 1.2),
    ("hyper k=4", _LARGE_SHAPE, 256): (0.75, 0.85),
    ("hyper k=2", _LARGE_SHAPE, 256): (0.78, 0.85),
    ("hyper k=4", _LARGE_SHAPE, 1024): (0.74, 0.92),
    ("hyper k=2", _LARGE_SHAPE, 1024): (0.85, 0.92),
    ("hyper decode k=4", _LARGE_SHAPE, 0): (0.8, 0.9),
    ("hash float16", _LARGE_SHAPE, 1): (2.0, 2.5),
    ("hash int8", _LARGE_SHAPE, 1): (2.8, 4.0),
}


@dataclasses.dataclass(frozen=True)
class Floor:
    """What no product can beat.

    Attributes:
        launch_us: A kernel that does nothing; None where torch has none.
        copy_bandwidth: Bytes in a microsecond that a large copy moves.
    """

    launch_us: float | None
    copy_bandwidth: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        kernel: "hyper k=4".
        shape: (rows, length) of the weight.
        batch: Rows of activations; 0 for decoding.
        us: Microseconds of a call.
        rival_us: Of cuBLAS float16; for decoding, of copying as many bytes.
        must: Least speed-up that was asked for; None where nothing was.
        aim: The wanted one.
        int4_us: Of torch's product with weights of 4 bits; None where it has none.
        read: Bytes of the weight that a call reads from memory.
    """

    kernel: str
    shape: tuple[int, int]
    batch: int
    us: float
    rival_us: float
    must: float | None = None
    aim: float | None = None
    int4_us: float | None = None
    read: int = 0

    @property
    def ratio(self) -> float:
        """How many times as fast as the rival."""
        return self.rival_us / self.us

    def share(self, floor: Floor) -> float:
        """Of the bandwidth of a copy, what reading the weight's bytes takes."""
        return self.read / self.us / floor.copy_bandwidth


def _graph(body: Callable[[int, int], None], calls: int) -> Any:
    """A CUDA graph of body(i, stream) for i in range(calls)."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        body(0, stream.cuda_stream)  # loads kernels before anything is captured
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            body(i, torch.cuda.current_stream().cuda_stream)
    return graph


def _take_turns(graphs: list[Any], calls: int) -> list[float]:
    """Median microseconds of one call of each graph."""
    import torch

    times: list[list[float]] = [[] for _ in graphs]
    for turn in range(_REPLAYS + 1):
        for graph, found in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn > 0:  # the first round warms up
                found.append(start.elapsed_time(end) * 1e3 / calls)
    return [statistics.median(found) for found in times]


def _time_calls(bodies: list[Callable[[int, int], None]], calls: int) -> list[float]:
    return _take_turns([_graph(body, calls) for body in bodies], calls)


def floor() -> Floor:
    """Measure what no product can beat."""
    return Floor(empty_launch(_time_calls), copy_bandwidth(_time_calls))


def _rounds(size: int) -> int:
    """How many weights of so many bytes are well beyond the second-level cache."""
    import torch

    cache = int(torch.cuda.get_device_properties(0).L2_cache_size)
    return max(2, min(32, -(-2 * cache // size)))


def _random_bytes(size: int) -> Any:
    import torch

    return torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")


class HyperWeights:
    """Random weights of one shape and their memory."""

    def __init__(self, rows: int, length: int, bits: int) -> None:
        """Make as many as go beyond the cache."""
        import torch

        states, group = _STATES, 128
        units = -(-rows // 16) * -(-length // group) * 16
        size = self.read = units * (group * bits // 8 + 2)
        table = torch.randint(-127, 128, (1 << states,), dtype=torch.int8, device="cuda")
        self.kept: list[Any] = [table]
        self.weights = []
        for _ in range(_rounds(size)):
            codes = _random_bytes(units * group * bits // 8)
            scales = (torch.rand(units, device="cuda") * 0.01).half()
            self.kept += [codes, scales]
            places = (codes.data_ptr(), scales.data_ptr())
            settings = (rows, length, group, bits, states)
            self.weights.append(HyperWeight(*settings, *places, table.data_ptr(), None))


class HashWeights:
    """Random weights of one shape that share a memory of half the second-level cache."""

    read = 0  # from memory: all comes from the cache

    def __init__(self, rows: int, length: int, kind: str) -> None:
        """Make the memory, and weights whose tiles follow one another."""
        import ctypes

        import torch

        cache = int(torch.cuda.get_device_properties(0).L2_cache_size)
        slots = cache // 2 // (512 if kind == "float16" else 256)
        if kind == "float16":
            memory = (torch.rand(slots * 256, device="cuda") - 0.5).half()
        else:
            memory = torch.randint(-127, 128, (slots * 256,), dtype=torch.int8, device="cuda")
        scale = 0.02 if kind == "float16" else 0.0002
        self.kept: list[Any] = [memory]
        tiles = -(-rows // 16) * -(-length // 16)
        shape = (rows, length, slots, 256, MEMORY_TYPES[kind])
        maps = [(i * tiles, slots, 0, 12345, 67890, 1) for i in range(4)]
        self.weights = [
            HashWeight(*shape, memory.data_ptr(), 0, scale, (ctypes.c_int64 * 6)(*one))
            for one in maps
        ]


def _check(calls: Calls, weight: Any, x: Any, y: Any) -> None:
    """Compare a product with the kernel that decodes, which was compared with numpy before."""
    import torch

    dense = torch.empty((weight.rows, weight.length), dtype=torch.float32, device="cuda")
    calls.decode(weight, dense.data_ptr(), "float32")
    torch.cuda.synchronize()
    want = x.float() @ dense.T
    worst = ((y.float() - want).abs().max() / want.abs().max()).item()
    if not worst < 2e-3:
        raise AssertionError(f"a product is off by {worst:.1e} of its largest value")


def _ours(calls: Calls, weights: Any, x: Any, y: Any) -> Any:
    import torch

    batch = x.shape[0]
    size = max(calls.scratch(weight, batch, "float16") for weight in weights.weights)
    scratch = torch.empty(size + 256, dtype=torch.uint8, device="cuda")
    start = scratch.data_ptr() + -scratch.data_ptr() % 256
    weights.kept.append(scratch)

    def call(i: int, stream: int) -> None:
        weight = weights.weights[i % len(weights.weights)]
        calls.matmul(weight, x.data_ptr(), y.data_ptr(), batch, "float16", (start, size), stream)

    call(0, 0)
    torch.cuda.synchronize()
    _check(calls, weights.weights[0], x, y)
    return _graph(call, max(_CALLS, len(weights.weights)))


def _made(shape: tuple[int, int]) -> dict[str, Any]:
    rows, length = shape
    made: dict[str, Any] = {
        f"hyper k={bits}": HyperWeights(rows, length, bits) for bits in (4, 3, 2, 1)
    }
    made |= {f"hash {kind}": HashWeights(rows, length, kind) for kind in ("float16", "int8")}
    return made


def matmul_rows(calls: Calls, shape: tuple[int, int], batches: tuple[int, ...]) -> list[Row]:
    """Products with one shape by all kinds of weights."""
    import torch

    rows, length = shape
    dense = [
        (torch.randn(length, rows, device="cuda") * 0.02).half()
        for _ in range(_rounds(2 * rows * length))
    ]
    made = _made(shape)
    found = []
    for batch in batches:
        x = torch.randn(batch, length, device="cuda").half()
        y = torch.empty(batch, rows, dtype=torch.float16, device="cuda")
        graphs = [_ours(calls, weights, x, y) for weights in made.values()]
        counts = [max(_CALLS, len(weights.weights)) for weights in made.values()]
        count = max(_CALLS, len(dense))
        other = torch.empty_like(y)

        def rival(i: int, _: int, x: Any = x, out: Any = other) -> None:
            torch.matmul(x, dense[i % len(dense)], out=out)

        times = _take_turns([*graphs, _graph(rival, count)], 1)
        rival_us = times[-1] / count
        int4_us = None
        if batch <= _INT4_ROWS:
            int4_us = torch_int4(_time_calls, shape, batch, _rounds(rows * length // 2))
        for (name, weights), total, calls_made in zip(
            made.items(), times[:-1], counts, strict=True
        ):
            must, aim = BARS.get((name, shape, batch), (None, None))
            us = total / calls_made
            found.append(Row(name, shape, batch, us, rival_us, must, aim, int4_us, weights.read))
    return found


def decode_rows(calls: Calls, shape: tuple[int, int]) -> list[Row]:
    """Decoding to float16 against copying as many bytes as are read and written."""
    import torch

    rows, length = shape
    out = torch.empty(rows * length, dtype=torch.float16, device="cuda")
    found = []
    for bits in (4, 2):
        weights = HyperWeights(rows, length, bits)

        def call(i: int, stream: int, weights: Any = weights) -> None:
            weight = weights.weights[i % len(weights.weights)]
            calls.decode(weight, out.data_ptr(), "float16", stream)

        moved = int(rows * length * (2 + bits / 8 + 2 / 128))
        source, target = _random_bytes(moved // 2), _random_bytes(moved // 2)

        def copy(_: int, __: int, source: Any = source, target: Any = target) -> None:
            target.copy_(source)

        times = _take_turns([_graph(call, _CALLS), _graph(copy, _CALLS)], _CALLS)
        name = f"hyper decode k={bits}"
        must, aim = BARS.get((name, shape, 0), (None, None))
        found.append(Row(name, shape, 0, times[0], times[1], must, aim, None, moved))
    return found
