"""Work on many tensors at once: what numpy does to large arrays lets other threads run."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from onnxcomp.runtime.activity import activity

__all__ = ["in_threads"]

# The most threads: each maps a tensor, and more of them wait for memory in any case. Fewer items
# than so many for each are not worth its start, and the ten megabytes that it takes.
_MOST, _EACH = 4, 16

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    threads: int,
    *,
    total: int,
    what: str = "",
) -> Iterator[Result]:
    """The results for some items, in their order.

    Args:
        function: Is called once for each item; from several threads at once, if there are more
            than one. What it returns stays in memory until it is asked for.
        items: What to call it with.
        threads: How many; 1 to call it here, when a result is asked for.
        total: How many items there are.
        what: What this is, for `activity`; empty to say nothing.
    """
    many = min(threads, _MOST, total // _EACH)
    pool = concurrent.futures.ThreadPoolExecutor(many) if many > 1 else None
    # A signal may come while a thread starts, which then ends only because the pool is shut down.
    try:
        results = map(function, items) if pool is None else pool.map(function, items)
        if what:
            activity(what, 0, total)
        for number, result in enumerate(results, start=1):
            yield result
            if what:
                activity(what, number, total)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
