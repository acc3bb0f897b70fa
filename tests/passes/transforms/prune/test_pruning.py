"""Whole runs of pruning: shares that are met, data or none, codecs behind it, bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxcomp
from onnxcomp.errors import UsageError
from onnxcomp.passes.analysis.prune_report import PruneReport
from onnxcomp.passes.ir.model import load, save
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.transforms.prune.axes import analyse
from onnxcomp.passes.transforms.prune.choose import Numerical, by_obs
from onnxcomp.passes.transforms.prune.compensate import measured_loss
from onnxcomp.passes.transforms.prune.consumers import find_consumers
from onnxcomp.passes.transforms.prune.cost import Ledger, measure
from onnxcomp.passes.transforms.prune.feeds import probe_feeds
from onnxcomp.passes.transforms.prune.groups import find_groups
from onnxcomp.passes.transforms.prune.observe import moments
from onnxcomp.passes.transforms.prune.observed_shapes import observe_shapes
from onnxcomp.passes.transforms.prune.options import PruneOptions
from onnxcomp.passes.transforms.prune.prepare import prepare
from onnxcomp.passes.transforms.prune.pruning import prune
from onnxcomp.passes.transforms.prune.select import Step
from onnxcomp.runtime.evaluate import run_model

from .graphs import GRAPHS, Draft

SCORES = ["obs", "numerical", "wanda", "flap", "magnitude"]


def wide(bias: bool = True, seed: int = 0) -> onnx.ModelProto:
    """Two hidden layers whose neurons are correlated, so that fits make up for lost ones."""
    d = Draft(seed=seed)
    h = d.add("Relu", d.linear("x", 8, 64, bias))
    h = d.add("Relu", d.linear(h, 64, 48, bias))
    return d.model({"x": ["n", 8]}, {d.linear(h, 48, 4, bias): ["n", 4]})


def feeds(count: int = 20, rows: int = 64) -> list[dict[str, Any]]:
    """Inputs for `wide`."""
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((rows, 8)).astype(np.float32)} for _ in range(count)]


def run(
    proto: onnx.ModelProto, options: PruneOptions, data: Any = (), folder: Path | None = None
) -> tuple[PruneReport, float]:
    """The report, and the relative squared error of the first output."""
    model = load(proto)
    canonicalize(model)
    report = prune(model, options, feeds=data)
    if folder is None:
        return report, 0.0
    before, after = folder / "before.onnx", folder / "after.onnx"
    onnx.save(proto, before)
    save(model, after)
    held = {"x": np.random.default_rng(7).standard_normal((200, 8)).astype(np.float32)}
    exact, own = (next(iter(run_model(path, [held])[0].values())) for path in (before, after))
    return report, float(np.square(exact - own).sum() / np.square(exact).sum())


@pytest.mark.parametrize("score", SCORES)
def test_every_score_reaches_the_ratio_and_fits_help(score: Any, tmp_path: Path) -> None:
    proto = wide()
    errors = {}
    for how in ("fit", "none"):
        options = PruneOptions(ratio=0.3, score=score, compensate=how)  # type: ignore[arg-type]
        report, errors[how] = run(proto, options, feeds(), tmp_path)
        assert report.met and 0.3 <= report.reached < 0.45
        assert report.after.parameters < report.before.parameters
        assert report.after.flops < report.before.flops
        assert report.calibrated and report.score == score
    assert errors["fit"] < errors["none"]
    assert all(fit.after <= fit.before for fit in report.fits)


def mean_error(options: PruneOptions, folder: Path, *, bias: bool = True) -> float:
    """Over some models: on a single small one, chance decides."""
    return float(np.mean([run(wide(bias, s), options, feeds(), folder)[1] for s in range(6)]))


def test_biases_alone_make_up_for_means(tmp_path: Path) -> None:
    fitted, plain = (
        mean_error(PruneOptions(ratio=0.3, score="flap", compensate=how), tmp_path, bias=False)
        for how in ("bias", "none")  # type: ignore[arg-type]
    )
    assert fitted < 0.8 * plain


def test_the_default_is_better_than_magnitude(tmp_path: Path) -> None:
    obs, magnitude = (
        mean_error(PruneOptions(ratio=0.4, score=score), tmp_path)
        for score in ("obs", "magnitude")  # type: ignore[arg-type]
    )
    assert obs < 0.8 * magnitude


def test_without_data_weights_alone_decide() -> None:
    report, _ = run(wide(), PruneOptions(ratio=0.3))
    assert report.met and not report.calibrated
    assert report.score == "magnitude" and report.fits == ()


def test_uniform_allocation_takes_the_same_share_of_every_group() -> None:
    options = PruneOptions(ratio=0.4, score="wanda", allocation="uniform", round_to=1)
    report, _ = run(wide(), options, feeds(4))
    shares = [group.after / group.before for group in report.groups]
    assert max(shares) - min(shares) < 0.05


def test_sizes_of_large_groups_stay_multiples() -> None:
    report, _ = run(wide(), PruneOptions(ratio=0.4, round_to=16), feeds(4))
    assert [group.after % 16 for group in report.groups if group.before == 64] == [0]


def test_a_target_for_flops_is_met() -> None:
    proto = GRAPHS["convolutions"]()
    report, _ = run(proto, PruneOptions(target_flops=0.7))
    assert report.met and report.unit == "flops"
    assert report.after.flops <= 0.7 * report.before.flops


def test_floors_can_forbid_a_ratio() -> None:
    report, _ = run(wide(), PruneOptions(ratio=0.9, least=0.5))
    assert not report.met
    assert 0.3 < report.reached < 0.9
    assert all(group.after >= group.before / 2 for group in report.groups)


def test_patterns_say_what_may_shrink() -> None:
    proto = wide()
    whole, _ = run(proto, PruneOptions(ratio=0.2))
    first = whole.groups[0].name
    only, _ = run(proto, PruneOptions(ratio=0.2, include=(f"^{first}$",)))
    assert [group.name for group in only.groups] == [first]
    without, _ = run(proto, PruneOptions(ratio=0.2, exclude=(f"^{first}$",)))
    assert first not in [name for group in without.groups for name in group.weights]


def test_caches_shrink_only_when_they_may() -> None:
    proto = GRAPHS["attention with a cache"]()
    allowed, _ = run(proto, PruneOptions(ratio=0.3))
    assert {name for name, _, _ in allowed.inputs} >= {"past_key", "past_value"}
    assert allowed.after.cache_bytes < allowed.before.cache_bytes
    model = load(proto)
    canonicalize(model)
    rng = np.random.default_rng(0)
    steps = (5, 0)  # a cache may be empty
    shapes = [
        {"x": (2, 9, 10)} | dict.fromkeys(("past_key", "past_value"), (2, 2, n, 6)) for n in steps
    ]
    data = [
        {k: rng.standard_normal(s).astype(np.float32) for k, s in one.items()} for one in shapes
    ]
    report = prune(model, PruneOptions(ratio=0.3), feeds=data[::-1])
    assert 0.3 < report.after.flops / report.before.flops < 0.8  # on the same inputs
    kept, _ = run(proto, PruneOptions(ratio=0.3, caches=False))
    assert kept.inputs == () and kept.groups == ()


def test_newton_steps_choose_what_the_closed_form_chooses() -> None:
    reports = [
        run(
            wide(),
            PruneOptions(ratio=0.3, score="numerical", numerical=Numerical(steps=n)),
            feeds(),
        )
        for n in (0, 1, 50)
    ]
    assert len({report.groups for report, _ in reports}) == 1


def test_heads_are_spared_by_the_published_weight_alone() -> None:
    d = Draft()
    h = d.add("LayerNormalization", "x", d.weight(8), axis=-1)
    q, k, v = (d.linear(h, 8, 32) for _ in range(3))
    y = d.add("MultiHeadAttention", q, k, v, num_heads=8, domain="com.microsoft")
    y = d.add("Add", "x", d.linear(y, 32, 8))
    y = d.add("Add", y, d.linear(d.add("Relu", d.linear(y, 8, 40)), 40, 8))
    d.opsets.append(onnx.helper.make_opsetid("com.microsoft", 1))
    proto = d.model({"x": ["b", "t", 8]}, {y: ["b", "t", 8]})
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((4, 9, 8)).astype(np.float32)} for _ in range(10)]
    heads = []
    for reading in ("score", "cost"):
        options = PruneOptions(
            ratio=0.3,
            score="numerical",
            numerical=Numerical(heads=reading),  # type: ignore[arg-type]
        )
        model = load(proto)
        canonicalize(model)
        report = prune(model, options, feeds=data)
        heads.append(sum(g.before - g.after for g in report.groups if g.kind == "heads"))
    assert heads[0] == 0 < heads[1]


def test_a_reshape_of_free_size_keeps_its_channels_and_says_so() -> None:
    d = Draft()
    h = d.add("Relu", d.linear("x", 8, 12))
    mixed = d.add("Reshape", h, d.ints(-1, 4))  # channels join the free axis
    proto = d.model({"x": ["n", 8]}, {d.linear(mixed, 4, 3): ["m", 3]})
    report, _ = run(proto, PruneOptions(ratio=0.2))
    assert report.groups == () and not report.met
    assert any("joins it with an axis of free size" in reason for _, reason in report.kept)


@pytest.mark.parametrize("op_type", ["MultiHeadAttention", "Attention of opset 23"])
def test_operations_of_attention_count(op_type: str) -> None:
    model = load(GRAPHS[op_type]())
    canonicalize(model)
    (one, *_) = probe_feeds(model)
    seen = observe_shapes(model, [one])
    weights = sum(
        math.prod(i.dims) for i in GRAPHS[op_type]().graph.initializer if len(i.dims) == 2
    )
    b, t = one["x"].shape[:2]
    assert measure(model, seen).flops == 2 * b * t * weights + 4 * b * t * t * 32


@pytest.mark.parametrize(
    "options",
    [
        PruneOptions(),
        PruneOptions(ratio=0.2, target_flops=0.5),
        PruneOptions(ratio=1.2),
        PruneOptions(target_flops=0.0),
        PruneOptions(ratio=0.2, score="size"),  # type: ignore[arg-type]
    ],
)
def test_options_out_of_range_are_refused(options: PruneOptions) -> None:
    with pytest.raises(UsageError):
        run(wide(), options)


def matrix_elements(path: Path) -> int:
    """Elements of the matrices of a model."""
    tensors = onnx.load(path).graph.initializer
    return sum(math.prod(tensor.dims) for tensor in tensors if len(tensor.dims) == 2)


@pytest.mark.parametrize("method", ["int", "hyper", "lowrank"])
def test_optimize_prunes_first_and_encodes_what_is_left(method: str, tmp_path: Path) -> None:
    onnx.save(wide(), tmp_path / "m.onnx")
    inputs = {"x": np.concatenate([feed["x"] for feed in feeds()])}
    np.savez(tmp_path / "data.npz", **inputs)
    result = onnxcomp.optimize(
        tmp_path / "m.onnx", tmp_path / "s.onnx", method=f"prune+{method}", prune_ratio=0.25,
        min_size=1024,
        set_=".*:rank=8" if method == "lowrank" else (), data=tmp_path / "data.npz",
    )  # fmt: skip
    assert result.verify is not None and result.verify.passed
    assert result.report.prune is not None and result.report.prune["met"]
    assert {site.method for site in result.report.sites if site.compressed} == {method}
    before = matrix_elements(tmp_path / "m.onnx")
    after = sum(math.prod(site.shape) for site in result.report.sites if len(site.shape) == 2)
    assert after <= 0.8 * before


def test_pruning_alone_leaves_weights_dense(tmp_path: Path) -> None:
    onnx.save(wide(), tmp_path / "m.onnx")
    result = onnxcomp.optimize(
        tmp_path / "m.onnx", tmp_path / "s.onnx", method="prune", prune_ratio=0.25
    )
    assert not any(site.compressed for site in result.report.sites)
    assert result.report.output.bytes < result.report.input.bytes
    again = onnxcomp.optimize(
        tmp_path / "m.onnx", tmp_path / "t.onnx", method="prune", prune_ratio=0.25, jobs=1
    )
    assert again.report.output.sha256 == result.report.output.sha256


def test_a_ratio_that_cannot_be_met_is_written_and_said(tmp_path: Path) -> None:
    onnx.save(wide(), tmp_path / "m.onnx")
    with pytest.raises(onnxcomp.TargetMissedError, match=r"99\.0 % were asked for") as caught:
        onnxcomp.optimize(
            tmp_path / "m.onnx", tmp_path / "s.onnx", method="prune", prune_ratio=0.99
        )
    assert caught.value.exit_code == 3
    assert caught.value.result.report.prune is not None
    assert (tmp_path / "s.onnx").exists()


def test_a_model_without_channels_is_left_as_it_is(tmp_path: Path) -> None:
    d = Draft()
    onnx.save(d.model({"x": ["n", 8]}, {d.linear("x", 8, 4): ["n", 4]}), tmp_path / "m.onnx")
    with pytest.raises(onnxcomp.TargetMissedError, match=r"0\.0 %"):
        onnxcomp.optimize(tmp_path / "m.onnx", tmp_path / "s.onnx", method="prune", prune_ratio=0.2)
    before, after = (onnx.load(tmp_path / name) for name in ("m.onnx", "s.onnx"))
    assert [node.op_type for node in before.graph.node] == [n.op_type for n in after.graph.node]


def test_how_much_to_prune_must_be_said(tmp_path: Path) -> None:
    onnx.save(wide(), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match="how much"):
        onnxcomp.optimize(tmp_path / "m.onnx", tmp_path / "s.onnx", method="prune")
    with pytest.raises(UsageError, match="how much"):
        onnxcomp.optimize(tmp_path / "m.onnx", tmp_path / "s.onnx", prune_score="wanda")


def test_a_cache_may_change_its_shape_in_a_run(tmp_path: Path) -> None:
    onnx.save(GRAPHS["attention with a cache"](), tmp_path / "m.onnx")
    result = onnxcomp.optimize(
        tmp_path / "m.onnx", tmp_path / "s.onnx", method="prune", prune_ratio=0.3,
        prune_caches=True,
    )  # fmt: skip
    assert result.report.prune is not None
    assert {change["name"] for change in result.report.prune["inputs"]} >= {"past_key"}
    assert result.verify is not None and result.verify.passed


def test_few_vectors_do_not_promise_what_others_do_not_keep() -> None:
    """Thirty vectors seem to need thirty of 64 columns; the losses of steps say better."""
    model = load(wide())
    canonicalize(model)
    prepare(model)
    analysis = analyse(model, probe_feeds(model))
    groups, consumers = find_groups(analysis), find_consumers(analysis)
    data = feeds(1, 33)
    known = {consumer.name: sums for consumer, sums in moments(analysis, consumers, data)}
    assert all(sums.held is not None for sums in known.values())
    ledger = Ledger(analysis, groups)
    seen = [(consumer, known[consumer.name]) for consumer in consumers]
    (choice,) = by_obs(groups.groups, consumers, seen, ledger, 0.99, least=0.2, round_to=8)
    for consumer in consumers:
        own = [step for step in choice.steps if consumer.columns(_gone(ledger, step)).size]
        weight = consumer.matrix(consumer.weight.const_value.numpy())  # type: ignore[union-attr]
        gone = consumer.columns(ledger.gone)
        sums = known[consumer.name]
        loss = measured_loss(weight, sums, gone, biased=True) / sums.power
        assert sum(step.loss for step in own) >= 0.99 * loss > 0.0


def _gone(ledger: Ledger, step: Step) -> np.ndarray:
    gone = np.zeros_like(ledger.gone)
    gone[list(step.classes)] = True
    return gone


def test_inputs_that_losses_are_measured_on_take_no_part_in_moments() -> None:
    model = load(wide())
    canonicalize(model)
    prepare(model)
    analysis = analyse(model, probe_feeds(model))
    consumers = find_consumers(analysis)
    data = feeds(20, 8)
    other = [feed if n % 10 != 9 else {"x": 5.0 * feed["x"]} for n, feed in enumerate(data)]
    for centred in (False, True):
        first, second = (dict(moments(analysis, consumers, of, centred=centred))
                         for of in (data, other))  # fmt: skip
        for consumer, sums in first.items():
            assert sums.held is not None and second[consumer].held is not None
            np.testing.assert_array_equal(sums.mean, second[consumer].mean)
            assert not np.array_equal(sums.held.gram, second[consumer].held.gram)  # type: ignore[union-attr]
