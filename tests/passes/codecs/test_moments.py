"""Second moments say of products what a direct computation says."""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from onnxcomp.passes.codecs.anchoring import anchored
from onnxcomp.passes.codecs.held_out import HeldOut, held_out_error
from onnxcomp.passes.codecs.moments import damped, mean_shift
from onnxcomp.passes.weight import (
    Held,
    HeldMoments,
    HeldVectors,
    Means,
    Missing,
    Stats,
    WeightSite,
)

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
            self.lost.mean(axis=0),
        )


def held_of(held: Data, form: str, *, stream: bool) -> Held:
    """What is held out, in one of its two forms."""
    if form == "vectors":
        single = [a.astype(np.float32) for a in (held.found, held.exact, held.lost)]
        return HeldVectors(single[0], single[1], single[2] if stream else None)
    return HeldMoments(
        moments_of(held.found, held.found),
        moments_of(held.exact, held.found),
        moments_of(held.exact, held.exact),
        held.missing() if stream else None,
    )


def stats_of(seen: Data, held: Data, *, stream: bool, form: str = "moments") -> Stats:
    return Stats(
        site(),
        TOKENS,
        moments_of(seen.found, seen.found),
        seen.found.mean(axis=0),
        held=held_of(held, form, stream=stream),
        drift=moments_of(seen.exact - seen.found, seen.found),
        lack=moments_of(seen.lost, seen.found) if stream else None,
    )


forms = pytest.mark.parametrize("form", ["moments", "vectors"])


@pytest.fixture
def weight() -> Array:
    return np.random.default_rng(1).standard_normal((ROWS, LENGTH)).astype(np.float32)


def test_with_equal_inputs_there_is_nothing_to_make_up_for(weight: Array) -> None:
    data = Data.random(2, drift=0.0)
    stats = stats_of(data, data, stream=False)
    assert np.array_equal(anchored(weight, stats), weight)


def test_without_a_reference_the_weight_is_the_target(weight: Array) -> None:
    data = Data.random(2, drift=0.3)
    stats = dataclasses.replace(stats_of(data, data, stream=False), drift=None)
    assert anchored(weight, stats) is weight


@forms
@pytest.mark.parametrize("stream", [False, True])
def test_held_out_errors_are_those_of_the_vectors(weight: Array, stream: bool, form: str) -> None:
    seen, held = Data.random(2, drift=0.3), Data.random(3, drift=0.3)
    stats = stats_of(seen, held, stream=stream, form=form)
    decoded = weight + np.float32(0.05)
    wanted = held.exact @ weight.T + (held.lost if stream else 0.0)
    error = np.linalg.norm(held.found @ decoded.T - wanted) / np.linalg.norm(wanted)
    assert held_out_error(weight, decoded, stats) == pytest.approx(error, rel=1e-6)


@forms
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_a_linear_map_of_the_inputs_is_made_up_for(
    weight: Array, stream: bool, form: str
) -> None:
    """With the least damping nearly all of it."""
    seen, held = Data.random(2, drift=0.3), Data.random(2, drift=0.3)
    stats = stats_of(seen, held, stream=stream, form=form)
    before = held_out_error(weight, weight, stats)
    after = held_out_error(weight, anchored(weight, stats), stats)
    assert before is not None
    assert after is not None
    assert after < 0.3 * before


def means_of(data: Data) -> Means:
    return Means(data.found.mean(axis=0), data.exact.mean(axis=0))


def with_means(stats: Stats, seen: Data, held: Data) -> Stats:
    if isinstance(stats.held, HeldMoments):
        stats = dataclasses.replace(
            stats, held=dataclasses.replace(stats.held, means=means_of(held))
        )
    return dataclasses.replace(stats, means=means_of(seen))


@forms
@pytest.mark.parametrize("stream", [False, True])
def test_held_out_errors_count_what_is_added_to_products(
    weight: Array, stream: bool, form: str
) -> None:
    seen, held = Data.random(2, drift=0.3), Data.random(3, drift=0.3)
    stats = with_means(stats_of(seen, held, stream=stream, form=form), seen, held)
    decoded = weight + np.float32(0.05)
    shift = np.random.default_rng(4).standard_normal(ROWS)
    wanted = held.exact @ weight.T + (held.lost if stream else 0.0)
    error = np.linalg.norm(held.found @ decoded.T + shift - wanted) / np.linalg.norm(wanted)
    assert HeldOut(weight, stats).error(decoded, shift) == pytest.approx(error, rel=1e-6)


def test_an_equal_weight_shifts_no_mean(weight: Array) -> None:
    data = Data.random(2, drift=0.3)
    stats = with_means(stats_of(data, data, stream=False), data, data)
    shift = mean_shift(weight, weight.copy(), stats)
    assert shift is not None
    assert not shift.any()


def test_a_shift_takes_back_what_a_change_does_to_means(weight: Array) -> None:
    data = Data.random(2, drift=0.0)
    stats = with_means(stats_of(data, data, stream=False), data, data)
    decoded = weight + np.random.default_rng(5).standard_normal(weight.shape).astype(np.float32)
    shift = mean_shift(weight, decoded, stats)
    assert shift is not None
    means = (data.found @ decoded.T + shift).mean(axis=0)
    assert means == pytest.approx((data.found @ weight.T).mean(axis=0), abs=1e-5)
    assert mean_shift(weight, decoded, stats_of(data, data, stream=False)) is None


def test_errors_within_groups_are_those_of_all_of_them(weight: Array) -> None:
    """Two groups with inputs of their own, against vectors of both with zeros in the weight."""
    both = [(Data.random(n, drift=0.3), Data.random(n + 9, drift=0.3)) for n in (2, 3)]
    alone = [with_means(stats_of(*pair, stream=False), *pair) for pair in both]
    rows = np.concatenate([weight, 2 * weight])
    decoded, shift = rows + np.float32(0.05), np.linspace(-1, 1, len(rows))
    stacked = {
        name: np.stack([getattr(stats, name) for stats in alone])
        for name in ("gram", "drift", "mean")
    }
    held = [stats.held for stats in alone if isinstance(stats.held, HeldMoments)]
    means = [found.means for found in held if found.means is not None]
    together = HeldMoments(
        *(
            np.stack([getattr(found, name) for found in held])
            for name in ("inputs", "cross", "reference")
        ),
        means=Means(
            np.stack([m.inputs for m in means]),
            np.stack([m.reference for m in means if m.reference is not None]),
        ),
    )
    stats = dataclasses.replace(alone[0], **stacked, held=together)
    wanted = np.concatenate(
        [d.exact @ w.T for (_, d), w in zip(both, np.split(rows, 2), strict=True)], 1
    )
    made = np.concatenate(
        [d.found @ w.T for (_, d), w in zip(both, np.split(decoded, 2), strict=True)], 1
    )
    error = np.linalg.norm(made + shift - wanted) / np.linalg.norm(wanted)
    assert HeldOut(rows, stats).error(decoded, shift) == pytest.approx(error, rel=1e-6)


@pytest.mark.parametrize("rows", [ROWS, 3 * LENGTH])
def test_what_products_lack_may_be_summed_up_with_that_of_the_stream(rows: int) -> None:
    weight = np.random.default_rng(1).standard_normal((rows, LENGTH)).astype(np.float32)
    seen = Data.random(2, drift=0.3)
    lack = moments_of((seen.exact - seen.found) @ weight.T, seen.found)
    apart = dataclasses.replace(stats_of(seen, seen, stream=False), held=None)
    joined = dataclasses.replace(apart, drift=None, lack=lack)
    targets = [anchored(weight, stats) for stats in (apart, joined)]
    np.testing.assert_allclose(targets[0], targets[1], rtol=1e-3, atol=1e-4)
    assert not np.array_equal(targets[0], weight)


@forms
def test_inputs_that_say_nothing_of_others_change_nothing(weight: Array, form: str) -> None:
    """Held-out inputs that drift the other way speak against every correction."""
    seen, held = Data.random(2, drift=0.3), Data.random(2, drift=-0.3)
    assert anchored(weight, stats_of(seen, held, stream=False, form=form)) is weight


@pytest.mark.parametrize("paired", [False, True])
def test_an_equal_weight_has_no_error_but_that_of_its_inputs(weight: Array, paired: bool) -> None:
    data = Data.random(2, drift=0.3 if paired else 0.0)
    held = held_of(data, "vectors", stream=False)
    stats = dataclasses.replace(stats_of(data, data, stream=False), held=held)
    error = held_out_error(weight, weight.copy(), stats)
    assert error is not None
    assert (error > 0.1) if paired else (error == 0.0)


def test_moments_that_nobody_reads_later_are_damped_where_they_are() -> None:
    gram = np.eye(LENGTH, dtype=np.float32) + np.float32(0.25)
    stats = Stats(site(), TOKENS, gram.copy(), np.zeros(LENGTH))
    copied = damped(stats, np.float32)
    assert np.array_equal(stats.gram, gram)
    assert not np.array_equal(copied, gram)
    changed = damped(stats, np.float32, in_place=True)
    assert np.array_equal(changed, copied)
    assert np.shares_memory(changed, stats.gram)
    stats.gram.flags.writeable = False
    assert not np.shares_memory(damped(stats, np.float32, in_place=True), stats.gram)
