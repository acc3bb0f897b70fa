"""The smallest output that the gates accept: a search over budgets of bytes.

Where a run says what the result has to keep and not how large it may be, size is the free number.
Outputs that passed bound it from above, outputs that did not from below; the next budget lies
between, where the error is expected to be what is allowed. Candidates are planned with once; a try
costs an encoding, mostly from payloads of the tries before, and the gates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from onnxcomp.passes.planning.plan import Plan

__all__ = ["SizeSearch"]

# The search ends where an output that passed is this much larger than one that did not.
_CLOSE = 1.05

# What is aimed at, of an error that must not be exceeded.
_MARGIN = 0.97

# Tries after the first.
_TRIES = 9

# Largest change of the budget in one step, while there is a bound on one side only.
_STRIDE = 2.0


@dataclasses.dataclass(frozen=True, slots=True)
class _Try:
    """One output: its bytes and, where it was measured, its error over the allowed one."""

    bytes: int
    excess: float | None


class SizeSearch:
    """Proposes plans, from how the ones before did.

    Args:
        plan_within: The best plan in some bytes; the smallest one where no plan is so small.
        weights: Number of weights that plans decide about. A bit more for each of them halves the
            error.
    """

    def __init__(self, plan_within: Callable[[int], Plan], weights: int) -> None:
        self._plan_within = plan_within
        self._weights = weights
        self._tries: list[_Try] = []
        self._seen: set[int] = set()
        self._passed: int | None = None
        self._failed: int | None = None

    def next(self, plan: Plan, *, passed: bool, excess: float | None) -> Plan | None:
        """The next plan to try; None where the smallest output is known closely enough.

        Args:
            plan: The plan that was tried.
            passed: Whether the gates accepted its output.
            excess: Its error over the allowed one; None where it is not errors that decide.
        """
        size = plan.bytes or 0
        self._seen.add(size)
        self._tries.append(_Try(size, excess))
        if passed:
            self._passed = size if self._passed is None else min(size, self._passed)
        else:
            self._failed = size if self._failed is None else max(size, self._failed)
        if len(self._tries) > _TRIES or self._close():
            return None
        return self._new_plan(size)

    def forget_failures(self) -> None:
        """Plans choose from other candidates now: sizes that did not pass may do so."""
        self._failed = None

    def _close(self) -> bool:
        return (
            self._passed is not None
            and self._failed is not None
            and self._passed <= _CLOSE * self._failed
        )

    def _new_plan(self, last: int) -> Plan | None:
        """A plan that may be the smallest one to pass; None where there is none near by.

        While none passed, plans are not ordered by size alone: one that has more bits and fewer
        kinds of operators to define may be smaller than the one before.

        Args:
            last: Bytes of the plan that was tried.
        """
        budget = self._budget()
        found = self._plan_within(budget)
        if self._passed is None:
            while found.bytes in self._seen and budget < last * _STRIDE:
                budget = round(budget * _CLOSE)
                found = self._plan_within(budget)
        is_new = found.bytes not in self._seen
        return found if is_new and self._between(found.bytes or 0) else None

    def _between(self, size: int) -> bool:
        if self._passed is None:
            return True
        return size < self._passed and (self._failed is None or size > self._failed)

    def _budget(self) -> int:
        """Bytes to try: those at which the error is expected to be the allowed one."""
        last = self._tries[-1]
        low = last.bytes / _STRIDE if self._failed is None else self._failed * math.sqrt(_CLOSE)
        high = last.bytes * _STRIDE if self._passed is None else self._passed / math.sqrt(_CLOSE)
        if high <= low:
            return round((low + high) / 2)
        guess = self._expected()
        # Half way in every other try: errors that fall in steps mislead the expectation.
        if guess is None or len(self._tries) % 2 == 0:
            return round(math.sqrt(low * high))
        return round(min(max(guess, low), high))

    def _expected(self) -> float | None:
        """Bytes at which the error is what is allowed: it falls exponentially with them."""
        known = [(t.bytes, math.log2(t.excess)) for t in self._tries if t.excess]
        if not known:
            return None
        known.sort(key=lambda point: abs(point[1]))
        slope = -8.0 / max(1, self._weights)
        if len(known) > 1 and known[0][0] != known[1][0]:
            measured = (known[1][1] - known[0][1]) / (known[1][0] - known[0][0])
            slope = measured if measured < 0.0 else slope
        size, excess = known[0]
        return size + (math.log2(_MARGIN) - excess) / slope
