"""What CUDA kernels are compared with besides cuBLAS, and what no kernel can beat.

All functions return microseconds of one call inside a CUDA graph, or None where this machine has
no such kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["copy_bandwidth", "empty_launch", "torch_int4"]

_GROUP = 128
_INNER_TILES = 8
_LARGE = 1 << 29  # bytes: beyond every cache

# Times graphs of calls in turn: (bodies, calls of each) -> microseconds of a call of each.
Timer = Callable[[list[Callable[[int, int], None]], int], list[float]]


def torch_int4(timer: Timer, shape: tuple[int, int], batch: int, copies: int) -> float | None:
    """Torch's product with weights of 4 bits, groups of 128 and bfloat16 (tinygemm).

    Args:
        timer: Times calls.
        shape: (rows, length) of the weight.
        batch: Rows of activations.
        copies: Weights that take turns, so that they do not stay in the cache.
    """
    import torch

    rows, length = shape
    aten = torch.ops.aten
    if not hasattr(aten, "_weight_int4pack_mm") or length % _GROUP or rows % 8:
        return None
    try:
        weights = [
            (_packed(rows, length), torch.rand(length // _GROUP, rows, 2, device="cuda").bfloat16())
            for _ in range(copies)
        ]
        x = torch.randn(batch, length, device="cuda", dtype=torch.bfloat16)
        aten._weight_int4pack_mm(x, weights[0][0], _GROUP, weights[0][1])
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"torch's int4 kernel does not run: {str(error).splitlines()[0]}")
        return None

    def call(i: int, _: int) -> None:
        packed, scales = weights[i % copies]
        aten._weight_int4pack_mm(x, packed, _GROUP, scales)

    return timer([call], max(24, copies))[0]


def _packed(rows: int, length: int) -> Any:
    """A random weight in tinygemm's order: older releases of torch pack int32, newer ones bytes."""
    import torch

    pack = torch.ops.aten._convert_weight_to_int4pack
    pairs = torch.randint(0, 256, (rows, length // 2), dtype=torch.uint8, device="cuda")
    try:
        return pack(pairs, _INNER_TILES)
    except RuntimeError:
        single = torch.randint(0, 16, (rows, length), dtype=torch.int32, device="cuda")
        return pack(single, _INNER_TILES)


def empty_launch(timer: Timer) -> float | None:
    """A kernel that does nothing: what a product takes at least."""
    import torch

    sleep = getattr(torch.cuda, "_sleep", None)
    if sleep is None:
        return None
    return timer([lambda _, __: sleep(0)], 100)[0]


def copy_bandwidth(timer: Timer) -> float:
    """Bytes in a microsecond that a large copy reads and writes."""
    import torch

    source, target = (torch.empty(_LARGE, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * _LARGE / timer([lambda _, __: target.copy_(source)], 4)[0]
