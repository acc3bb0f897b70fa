"""Results of several threads come in the order of their items; an error ends the work."""

from __future__ import annotations

import threading
import time

import pytest

from onnxcomp.passes.ir import threads as module
from onnxcomp.passes.ir.threads import in_threads
from onnxcomp.runtime.activity import shown_by


@pytest.fixture(autouse=True)
def for_few_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_EACH", 1)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_results_come_in_order(threads: int) -> None:
    def late(item: int) -> int:
        time.sleep(0.01 * (item % 3 == 0))
        return item * item

    assert list(in_threads(late, range(20), threads, total=20)) == [
        item * item for item in range(20)
    ]


def test_items_are_worked_on_at_once() -> None:
    both = threading.Barrier(2, timeout=30)
    assert all(place >= 0 for place in in_threads(lambda _: both.wait(), range(2), 2, total=2))


def test_one_thread_works_when_it_is_asked() -> None:
    seen: list[int] = []
    results = in_threads(seen.append, range(5), 1, total=5)
    next(results)
    assert seen == [0]


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_ends_the_work(threads: int) -> None:
    begun: list[int] = []

    def fail(item: int) -> None:
        begun.append(item)
        time.sleep(0.01)
        raise ValueError(item)

    with pytest.raises(ValueError, match="0"):
        list(in_threads(fail, range(1000), threads, total=1000))
    assert len(begun) < 20


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int, str]] = []
    with shown_by(lambda *what: told.append(what)):
        list(in_threads(str, range(3), 2, what="reading", total=3))
    assert told == [("reading", done, 3, "") for done in range(4)]


def test_a_signal_while_a_thread_starts_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    before = set(threading.enumerate())
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt) as held:  # as whoever reports it does
        list(in_threads(str, range(3), 2, total=3))
    assert held.tb is not None
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive()
