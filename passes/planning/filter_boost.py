"""More bits for the smallest filters and weights, where that costs next to nothing.

The first layers of a convolutional network and its depthwise filters are small, and all that
follows sees their errors. In MobileNetV2 with all weights at 4 bits, 24 % of the answers change;
with two more bits for filters of less than 20,000 weights the file grows by 1.3 %, and 12 %
change. Five bits for all weights cost 24 %, and 10 % change. Filters of middle size follow with one
more bit, which is worth four times as much as the second one for as many bytes; the last and
largest ones, often half of a network, matter the least.

With one or two bits, the smallest weights of a small model get one more while that costs at most
two kilobytes: the definitions of operators take twice as many in any file, and a quarter of a
weight lost is enough for a softmax behind it to attend to other things. A larger table of states
would cost a small file more and gain less: 16 KiB of weights in front of a softmax at 2 bits take
5,159 bytes and lose 21 %, with 2^12 states 9,134 bytes and 21 %, with 3 bits 5,701 and 11 %.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.planning.candidates import Candidate
from onnxcomp.passes.planning.search_space import CandidateSet, uniform
from onnxcomp.passes.planning.sensitivity_prior import is_filter

__all__ = ["MORE_BITS", "NEXT_BITS", "NEXT_ROOM", "ROOM", "with_better_filters"]

# Share of the bytes of all weights that the smallest filters may take on top, and the next ones.
ROOM, NEXT_ROOM = 0.015, 0.05

# Bits that they may have more than others.
MORE_BITS, NEXT_BITS = 2, 1

# Bytes on top that are nothing in any file, and up to how many bits weights that are no filters
# may spend them.
_LITTLE, _COARSE = 2048, 2


def with_better_filters(
    sets: Sequence[CandidateSet], picks: Sequence[Candidate], fixed: Collection[str]
) -> list[Candidate]:
    """Plans with equal bits, with more of them for the smaller filters while there is room.

    In small models at one or two bits other weights may have one more, see above.

    Args:
        sets: What there is to choose from.
        picks: A candidate of each candidates.
        fixed: Names of weights whose bits a user has chosen.
    """
    result = list(picks)
    free = [i for i, pick in enumerate(picks) if pick.site.name not in fixed]
    free.sort(key=lambda i: (sets[i].site.size, i))
    filters = [i for i in free if is_filter(picks[i].site)]
    total = sum(pick.bytes for pick in picks)
    room = ROOM * total
    _spend(sets, result, filters, room, MORE_BITS)
    rest = [i for i in filters if result[i] is picks[i]]
    _spend(sets, result, rest, NEXT_ROOM * total, NEXT_BITS)
    if room < _LITTLE:
        coarse = [i for i in free if i not in filters and (_bits(picks[i]) or 9) <= _COARSE]
        _spend(sets, result, coarse, _LITTLE, 1)
    return result


def _spend(
    sets: Sequence[CandidateSet],
    result: list[Candidate],
    order: Sequence[int],
    room: float,
    more: int,
) -> None:
    """Give weights up to `more` bits more, one after the other, until `room` bytes are spent."""
    for index in order:
        better = _better(sets[index], result[index], more)
        room -= better.bytes - result[index].bytes
        if room < 0:
            break
        result[index] = better


def _bits(pick: Candidate) -> int | None:
    """Bits per weight; None for a weight that stays as it is and settings that count none."""
    width = CODECS[pick.codec].width
    return None if width is None or pick.reason else int(getattr(pick.params, width))


def _better(candidates: CandidateSet, pick: Candidate, most: int) -> Candidate:
    """The candidate with up to `most` more bits; the pick itself where there is none."""
    bits = _bits(pick)
    if bits is None:
        return pick
    for more in range(most, 0, -1):
        other = uniform(candidates, bits + more)
        if other.codec == pick.codec and other.error < pick.error:
            return other
    return pick
