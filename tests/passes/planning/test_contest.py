"""Plans of one size are compared by what they lose, and equal bits left for more than chance."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from onnxcomp.passes.calibration.output_difference import OutputDifference
from onnxcomp.passes.codecs.hyper.codec import HyperParams
from onnxcomp.passes.planning.candidates import Candidate
from onnxcomp.passes.planning.contest import Entry, Referee, contest, expected_of
from onnxcomp.passes.planning.search_space import CandidateSet
from onnxcomp.passes.planning.size_fitting import fit
from onnxcomp.passes.planning.solver import plans_of_bits
from onnxcomp.passes.weight import Use, WeightSite

RUNS = 12


def weights(*, sensitivities: Sequence[float]) -> list[CandidateSet]:
    """Weights with 2 to 5 bits, whose outputs are differently sensitive."""
    found = []
    for number, sensitivity in enumerate(sensitivities):
        use = Use(f"n{number}", "MatMul", 1, "matmul")
        own = WeightSite(f"w{number}", (512, 256), "float32", (use,), "", 256, 512, True)
        options = tuple(
            Candidate(own, "hyper", HyperParams(bits), 2**14 * bits, 2.0**-bits)
            for bits in (2, 3, 4, 5)
        )
        found.append(CandidateSet(own, options, sensitivity))
    return found


def bits(picks: Sequence[Candidate]) -> list[int]:
    return [pick.params.bits for pick in picks if isinstance(pick.params, HyperParams)]


def size(picks: Sequence[Candidate]) -> int:
    return sum(pick.bytes for pick in picks)


def judge(loss: Callable[[list[int]], Sequence[float]]) -> Callable[..., OutputDifference]:
    """Measures the losses that a function says for bits, by runs."""

    def judged(picks: Sequence[Candidate]) -> OutputDifference:
        found = OutputDifference({})
        for one in loss(bits(picks)):
            found.add({"y": np.ones(1)}, {"y": np.array([1.0 + np.sqrt(one)])})
        return found

    return judged


def run(loss: Callable[[list[int]], Sequence[float]], margin: float = 0.0) -> list[Entry]:
    sets = weights(sensitivities=(1.0, 1.0, 1.0, 60.0))
    target = 4 * 3 * 2**14
    picks, total = fit(sets, target, size)
    assert len(set(bits(picks))) > 1
    first = Entry("expected best", picks, total)
    return contest(sets, first, target, size, Referee(judge(loss), margin), plans_of_bits(sets))


def true(found: list[int]) -> float:
    """What the sensitivities say: the last weight counts for most."""
    return sum(k * 4.0**-b for k, b in zip((1, 1, 1, 60), found, strict=True))


def wrong(found: list[int]) -> float:
    """All weights count alike."""
    return sum(4.0**-b for b in found)


def test_a_mixed_plan_wins_where_it_is_better() -> None:
    best, *others = run(lambda found: [true(found)] * RUNS)
    assert best.name == "expected best"
    assert bits(best.picks)[-1] > 3
    assert best.loss < min(entry.loss for entry in others)
    assert all(entry.bytes <= 4 * 3 * 2**14 for entry in (best, *others))


def test_equal_bits_win_where_expectations_are_wrong() -> None:
    best = run(lambda found: [wrong(found)] * RUNS)[0]
    assert best.name == "equal"
    assert bits(best.picks) == [3, 3, 3, 3]


def test_the_plan_without_measurements_wins_where_these_mislead() -> None:
    sets = [
        dataclasses.replace(own, prior=prior)
        for own, prior in zip(weights(sensitivities=(1, 1, 1, 60)), (60, 1, 1, 1), strict=True)
    ]
    target = 4 * 3 * 2**14
    first = Entry("expected best", *fit(sets, target, size))

    def reversed_(found: list[int]) -> Sequence[float]:
        return [true(found[::-1])] * RUNS

    best = contest(sets, first, target, size, Referee(judge(reversed_)), plans_of_bits(sets))[0]
    assert best.name == "mixed by size"
    assert bits(best.picks)[0] > 3 > min(bits(best.picks))


def test_a_gain_that_is_chance_is_none() -> None:
    rng = np.random.default_rng(1)

    def noisy(found: list[int]) -> Sequence[float]:
        spread = 0.01 if len(set(found)) == 1 else 8.0
        return np.abs(true(found) * 0.98 * (1 + spread * rng.standard_normal(RUNS))).tolist()

    assert run(noisy)[0].name == "equal"


@pytest.mark.parametrize("real", [True, False])
def test_a_gain_that_few_inputs_do_not_show_is_looked_for_on_more(real: bool) -> None:
    sets = weights(sensitivities=(1.0, 1.0, 1.0, 60.0))
    target = 4 * 3 * 2**14
    first = Entry("expected best", *fit(sets, target, size))
    asked: list[int] = []

    def losses(picks: Sequence[Candidate], count: int) -> OutputDifference:
        found = bits(picks)
        equal = len(set(found)) == 1
        gain = 0.1 if real or count == RUNS else -0.1
        mean = 1.0 if equal else 1.0 - gain if found[-1] > 3 else 2.0
        return differences([mean + (0.0 if equal else 0.3 * (-1) ** n) for n in range(count)])

    def longer(picks: Sequence[Candidate], count: int) -> OutputDifference:
        asked.append(count)
        return losses(picks, count)

    referee = Referee(lambda picks: losses(picks, RUNS), longer=longer)
    best, *others = contest(sets, first, target, size, referee, plans_of_bits(sets))
    assert asked == [asked[0]] * 2 and RUNS < asked[0] <= 16 * RUNS
    assert (best.name != "equal") == real
    assert best.loss == pytest.approx(0.9 if real else 1.0, rel=0.05)
    assert others[0].loss == pytest.approx(1.0 if real else 1.1, rel=0.05)


@pytest.mark.parametrize(("margin", "wins"), [(0.1, True), (0.95, False)])
def test_inputs_that_are_made_up_have_to_say_more(margin: float, wins: bool) -> None:
    best = run(lambda found: [true(found)] * RUNS, margin)[0]
    assert (best.name == "expected best") == wins


def test_one_run_does_not_tell_chance() -> None:
    assert run(lambda found: [true(found)])[0].name == "equal"


def test_what_cannot_be_measured_leaves_the_expected_plan() -> None:
    sets = weights(sensitivities=(1.0, 60.0))
    picks, total = fit(sets, 2 * 3 * 2**14, size)
    first = Entry("expected best", picks, total)
    found = contest(sets, first, total, size, Referee(lambda _: None), plans_of_bits(sets))
    assert found == [first]


def test_between_two_numbers_of_bits_the_safe_plan_uses_the_room() -> None:
    sets = weights(sensitivities=(1.0, 1.0, 1.0, 1.0))
    target = (4 * 3 + 2) * 2**14
    picks, total = fit(sets, target, size)
    first = Entry("expected best", picks, total)
    found = contest(
        sets, first, target, size, Referee(judge(lambda b: [wrong(b)] * 2)), plans_of_bits(sets)
    )
    assert sorted(bits(found[0].picks)) == [3, 3, 4, 4]


def test_without_inputs_the_safe_plan_is_taken() -> None:
    sets = weights(sensitivities=(1.0, 1.0, 1.0, 60.0))
    target = (4 * 3 + 1) * 2**14
    picks, total = fit(sets, target, size)
    assert max(bits(picks)) > 4
    first = Entry("expected best", picks, total)
    (found,) = contest(sets, first, target, size, Referee(), plans_of_bits(sets))
    assert sorted(bits(found.picks)) == [3, 3, 3, 4]


def test_a_bit_more_for_the_table_of_look_ups_is_tried() -> None:
    """By the sensitivities it would not be: they were taken where it counts for little."""
    sets = weights(sensitivities=(1.0, 2.0, 2.0, 2.0))
    look_up = Use("g", "Gather", 0, "gather")
    site = dataclasses.replace(sets[0].site, uses=(*sets[0].site.uses, look_up))
    sets[0] = dataclasses.replace(sets[0], site=site)
    target = (4 * 3 + 1) * 2**14
    first = Entry("expected best", *fit(sets, target, size))

    def table(found: list[int]) -> Sequence[float]:
        return [9 * 4.0 ** -found[0] + wrong(found[1:])] * RUNS

    found = contest(sets, first, target, size, Referee(judge(table)), plans_of_bits(sets))
    assert bits(found[0].picks) == [4, 3, 3, 3]
    assert found[0].name == "equal, and a bit more for tables"

    def others(factor: float) -> Callable[[list[int]], Sequence[float]]:
        return lambda found: [true(found) * (factor if found[0] == 4 else 1.0)] * RUNS

    # Where the loss is estimated, others have to be better by a margin.
    for factor, wins in ((1.1, True), (40.0, False)):
        referee = Referee(judge(others(factor)), 0.2, estimated=True)
        best = contest(sets, first, target, size, referee, plans_of_bits(sets))[0]
        assert (bits(best.picks) == [4, 3, 3, 3]) == wins


def differences(losses: Sequence[float]) -> OutputDifference:
    found = OutputDifference({})
    for loss in losses:
        found.add({"y": np.ones(1)}, {"y": np.array([1.0 + np.sqrt(loss)])})
    return found


def expected(
    first: Sequence[float], everything: Sequence[float]
) -> tuple[list[int], OutputDifference | None]:
    """How many inputs were asked for, and what is expected of a plan by `expected_of`."""
    asked: list[int] = []

    def longer(picks: Sequence[Candidate], count: int) -> OutputDifference:
        del picks
        asked.append(count)
        return differences(everything[: min(count, len(everything))])

    entry = Entry("plan", [], 0, differences(first))
    return asked, expected_of(entry, Referee(lambda _: None, longer=longer))


def test_as_many_inputs_are_run_as_the_mean_takes() -> None:
    rng = np.random.default_rng(3)
    heavy = rng.pareto(3.0, 4000) + 1e-3  # few inputs make up most of it
    asked, found = expected(heavy[:64], heavy)
    assert 64 < asked[0] <= 16 * 64 and asked == sorted(asked)
    assert found is not None and len(found.losses()) == asked[-1]
    assert found.mean().loss == pytest.approx(heavy[: asked[-1]].mean())
    assert found.uncertainty() < differences(heavy[:64]).uncertainty()
    even = 1 + 0.1 * rng.standard_normal(64)
    asked, found = expected(even, heavy)
    assert asked == [] and found is not None and len(found.losses()) == 64


def test_few_inputs_are_asked_twice_how_many_it_takes() -> None:
    # Of the first eight none is one of those that make up most of it.
    losses = np.tile(np.r_[np.full(31, 1.0), 100.0], 40)
    wavering = np.tile([0.4, 1.6], 4)
    asked, found = expected(wavering, losses)
    assert len(asked) == 2 and 8 < asked[0] <= 8 * 16 < asked[1] <= 8 * 16 * 16
    assert found is not None and found.mean().loss == pytest.approx(losses.mean(), rel=0.1)


def test_inputs_that_there_are_no_more_of_change_nothing() -> None:
    heavy = np.random.default_rng(3).pareto(2.0, 20) + 1e-3
    (count,), found = expected(heavy, heavy)
    assert count > 20 and found is not None and len(found.losses()) == 20
    (count, _), found = expected(heavy[:1], heavy)
    assert count == 16 and found is not None and len(found.losses()) == 20
    entry = Entry("plan", [], 0, None)
    assert expected_of(entry, Referee(lambda _: None, longer=lambda *_: None)) is None


def test_the_standard_error_is_that_of_the_mean() -> None:
    losses = np.random.default_rng(4).random(50)
    error = losses.std(ddof=1) / np.sqrt(50) / losses.mean()
    assert differences(losses).uncertainty() == pytest.approx(error)
    assert differences([0.5]).uncertainty() == np.inf
    assert differences([0.0, 0.0]).uncertainty() == 0.0
