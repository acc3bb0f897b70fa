"""Second moments say of products what a direct computation says."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnxcomp.passes.codecs.moments import anchored, held_out_error
from onnxcomp.passes.weight import Missing, Stats, WeightSite

Array = npt.NDArray[Any]
ROWS, LENGTH, TOKENS = 6, 8, 400


def site() -> WeightSite:
    return WeightSite("w", (ROWS, LENGTH), "float32", (), "", ROWS, LENGTH, False)


def moments_of(a: Array, b: Array) -> Array:
    return np.asarray(a.T @ b / len(a))


@dataclasses.dataclass
class Data:
    """Inputs of the dense and the compressed model, and what a stream lacks."""

    exact: Array
    found: Array
    lost: Array

    @classmethod
    def random(cls, seed: int, drift: float) -> "Data":
        rng = np.random.default_rng(seed)
        exact = rng.standard_normal((TOKENS, LENGTH)) @ rng.standard_normal((LENGTH, LENGTH))
        found = exact + drift * np.roll(exact, 1, axis=1)
        return cls(exact, found, found @ np.full((LENGTH, ROWS), 0.1))

    def missing(self) -> Missing:
        return Missing(
            moments_of(self.lost, self.found),
            moments_of(self.lost, self.exact),
            float(np.square(self.lost).sum() / TOKENS),
        )


def stats_of(seen: Data, held: Data, *, stream: bool) -> Stats:
    return Stats(
        site(),
        TOKENS,
        moments_of(seen.found, seen.found),
        seen.found.mean(axis=0),
        held_out=moments_of(held.found, held.found),
        cross=moments_of(seen.exact, seen.found),
        held_cross=moments_of(held.exact, held.found),
        held_reference=moments_of(held.exact, held.exact),
        missing=seen.missing() if stream else None,
        held_missing=held.missing() if stream else None,
    )


@pytest.fixture
def weight() -> Array:
    return np.random.default_rng(1).standard_normal((ROWS, LENGTH)).astype(np.float32)


def test_with_equal_inputs_there_is_nothing_to_make_up_for(weight: Array) -> None:
    data = Data.random(2, drift=0.0)
    stats = stats_of(data, data, stream=False)
    assert np.array_equal(anchored(weight, stats), weight)


def test_without_a_reference_the_weight_is_the_target(weight: Array) -> None:
    data = Data.random(2, drift=0.3)
    stats = dataclasses.replace(stats_of(data, data, stream=False), cross=None)
    assert anchored(weight, stats) is weight


@pytest.mark.parametrize("stream", [False, True])
def test_held_out_errors_are_those_of_the_vectors(weight: Array, stream: bool) -> None:
    seen, held = Data.random(2, drift=0.3), Data.random(3, drift=0.3)
    stats = stats_of(seen, held, stream=stream)
    decoded = weight + np.float32(0.05)
    wanted = held.exact @ weight.T + (held.lost if stream else 0.0)
    error = np.linalg.norm(held.found @ decoded.T - wanted) / np.linalg.norm(wanted)
    assert held_out_error(weight, decoded, stats) == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_a_linear_map_of_the_inputs_is_made_up_for(weight: Array, stream: bool) -> None:
    """With the least damping nearly all of it."""
    seen, held = Data.random(2, drift=0.3), Data.random(2, drift=0.3)
    stats = stats_of(seen, held, stream=stream)
    before = held_out_error(weight, weight, stats)
    after = held_out_error(weight, anchored(weight, stats), stats)
    assert before is not None
    assert after is not None
    assert after < 0.3 * before


def test_inputs_that_say_nothing_of_others_change_nothing(weight: Array) -> None:
    """Held-out inputs that drift the other way speak against every correction."""
    seen, held = Data.random(2, drift=0.3), Data.random(2, drift=-0.3)
    assert anchored(weight, stats_of(seen, held, stream=False)) is weight
