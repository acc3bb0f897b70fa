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
from gpu_calls import Calls, HashWeight, HyperWeight

__all__ = ["BATCHES", "SHAPES", "Row", "decode_rows", "matmul_rows"]

Array = np.ndarray[Any, Any]

SHAPES = ((4096, 4096), (4096, 11008), (8192, 8192))
BATCHES = (1, 4, 16, 64, 256, 1024)
_STATES = {2: 7, 3: 7, 4: 7}
_CALLS = 24  # of a graph, at least
_REPLAYS = 9
# (kernel, M) -> least and wanted speed-up over cuBLAS float16, of the issue that asked for kernels.
BARS: dict[tuple[str, int], tuple[float, float]] = {
    ("hyper k=4", 1): (2.2, 3.7),
    ("hyper k=2", 1): (2.8, 6.0),
    ("hyper k=4", 16): (1.8, 3.4),
    ("hyper k=4", 256): (0.5, 0.9),
    ("hyper k=4", 1024): (0.8, 1.0),
    ("hash", 1): (2.0, 4.0),
    ("hash", 256): (0.9, 1.0),
}


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
    """

    kernel: str
    shape: tuple[int, int]
    batch: int
    us: float
    rival_us: float
    must: float | None = None
    aim: float | None = None

    @property
    def ratio(self) -> float:
        """How many times as fast as the rival."""
        return self.rival_us / self.us


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

        states, group = _STATES[bits], 128
        units = -(-rows // 16) * -(-length // group) * 16
        size = units * (group * bits // 8 + 2)
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

    def __init__(self, rows: int, length: int) -> None:
        """Make the memory, and weights whose tiles follow one another."""
        import ctypes

        import torch

        cache = int(torch.cuda.get_device_properties(0).L2_cache_size)
        slots = cache // 2 // 512
        memory = (torch.rand(slots * 256, device="cuda") - 0.5).half()
        self.kept: list[Any] = [memory]
        tiles = -(-rows // 16) * -(-length // 16)
        shape = (rows, length, slots, 256, 10)
        maps = [(i * tiles, slots, 0, 12345, 67890, 1) for i in range(4)]
        self.weights = [
            HashWeight(*shape, memory.data_ptr(), 0, 0.02, (ctypes.c_int64 * 6)(*one))
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


def matmul_rows(calls: Calls, shape: tuple[int, int], batches: tuple[int, ...]) -> list[Row]:
    """Products with one shape by all kinds of weights."""
    import torch

    rows, length = shape
    dense = [
        (torch.randn(length, rows, device="cuda") * 0.02).half()
        for _ in range(_rounds(2 * rows * length))
    ]
    made: dict[str, Any] = {f"hyper k={bits}": HyperWeights(rows, length, bits) for bits in (4, 2)}
    made["hash"] = HashWeights(rows, length)
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
        for name, total, calls_made in zip(made, times[:-1], counts, strict=True):
            must, aim = BARS.get((name, batch), (None, None))
            found.append(Row(name, shape, batch, total / calls_made, rival_us, must, aim))
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
        found.append(Row(f"hyper decode k={bits}", shape, 0, times[0], times[1], 0.6, 0.85))
    return found
