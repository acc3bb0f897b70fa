"""Plans: their JSON, their edits, and what they refuse."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import onnxcomp as oc
from onnxcomp.errors import UsageError
from onnxcomp.passes.analysis.weight_sites import SkippedWeight
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.hyper.codec import HyperParams
from onnxcomp.passes.config.rules import parse_rule
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.files import Source
from onnxcomp.passes.planning.candidates import Candidate, Choice
from onnxcomp.passes.planning.plan import Budget, Plan
from onnxcomp.passes.planning.size_model import portable_load_bytes
from onnxcomp.passes.planning.solver import default_bits
from onnxcomp.passes.weight import Use, WeightSite


def site(name: str, rows: int = 256, length: int = 512, dtype: str = "float32") -> WeightSite:
    use = Use(f"{name}.node", "MatMul", 1, "matmul")
    return WeightSite(name, (length, rows), dtype, (use,), "", rows, length, True)


def choice(name: str, bits: int = 4) -> Choice:
    where, params, codec = site(name), HyperParams(bits), CODECS["hyper"]
    size, error = codec.size(where, params), codec.predict(where, params)
    return Choice.of(Candidate(where, "hyper", params, size, error))


@pytest.fixture
def plan() -> Plan:
    choices = [choice("a.weight"), choice("b.weight", 3), Choice.kept_dense(site("c"), "why")]
    return Plan(
        source=Source("m.onnx", 123456, "00ff"),
        settings=Settings(method=("hyper",), ratio=8.0, set_=(parse_rule("a.*:bits=4"),)),
        budget=Budget(bytes=15432, ratio=8.0),
        choices={item.site: item for item in choices},
        skipped=(SkippedWeight("bias", (7,), "float32", 28, ("Add",), "below min_size"),),
        bytes=15000,
    )


def test_a_plan_comes_back_from_its_text(plan: Plan) -> None:
    text = plan.dumps()
    again = Plan.loads(text)
    assert again.dumps() == text
    assert again["a.weight"].params == HyperParams(4)
    assert again.settings == plan.settings
    assert again.skipped == plan.skipped


def test_the_text_has_one_line_for_each_weight(plan: Plan) -> None:
    lines = plan.dumps().splitlines()
    assert sum('"name": "b.weight"' in line for line in lines) == 1
    assert list(json.loads(plan.dumps())) == list(plan.to_json())


def test_a_plan_comes_back_from_its_file(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path).to_json() == plan.to_json()


def test_a_choice_is_changed_by_name(plan: Plan) -> None:
    plan["a.weight"] = plan["a.weight"].with_(bits=2, mode="folded")
    assert plan["a.weight"].params == HyperParams(2)
    assert plan["a.weight"].mode == "folded"
    assert plan.bytes is None
    settled = plan.settle([site("a.weight"), site("b.weight"), site("c")])
    expected = CODECS["hyper"].size(site("a.weight"), HyperParams(2))
    assert settled["a.weight"].bytes == expected


def test_another_codec_starts_from_its_defaults(plan: Plan) -> None:
    dense = plan["b.weight"].with_(codec="dense")
    assert dense.params == CODECS["dense"].params_type()
    assert dense.kept
    assert dense.settle(site("b.weight")).reason == "set in the plan"
    assert plan["c"].kept
    assert plan["c"].with_(codec="hyper").params == HyperParams()


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"codec": "hiper"}, "did you mean 'hyper'?"),
        ({"bit": 3}, "did you mean 'bits'?"),
        ({"bits": "3"}, "int"),
        ({"bits": True}, "int"),
        ({"bits": 9}, "bits are 1 to 6"),
        ({"mode": "fold"}, "did you mean 'folded'?"),
    ],
)
def test_an_impossible_change_is_refused_with_a_hint(
    plan: Plan, change: dict[str, object], hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        plan["a.weight"].with_(**change)  # type: ignore[arg-type]
    assert hint in caught.value.hint


def test_an_unknown_site_is_refused_with_the_closest_name(plan: Plan) -> None:
    with pytest.raises(UsageError, match=r"no site 'a\.weigth'") as caught:
        plan["a.weigth"]
    assert "'a.weight'" in caught.value.hint
    with pytest.raises(UsageError, match="cannot be given"):
        plan["a.weight"] = plan["b.weight"]


def test_a_plan_for_another_model_is_refused(plan: Plan) -> None:
    with pytest.raises(UsageError, match=r"has a site 'b.weight', the model has none"):
        plan.settle([site("a.weight"), site("b.weights"), site("c")])


def test_a_weight_without_a_line_stays_as_it_is(plan: Plan) -> None:
    del plan.choices["b.weight"]
    settled = plan.settle([site("a.weight"), site("b.weight"), site("c")])
    assert settled["b.weight"].kept
    assert settled["b.weight"].reason == "not in the plan"
    assert list(settled.choices) == ["a.weight", "b.weight", "c"]


def test_a_codec_that_refuses_its_site_is_an_error(plan: Plan) -> None:
    integers = dataclasses.replace(site("a.weight"), dtype="int8")
    with pytest.raises(UsageError, match=r"cannot store 'a\.weight'"):
        plan.settle([integers, site("b.weight"), site("c")])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 1', '"version": 2', "version 2"),
        ('"codec": "hyper"', '"codec": "hypr"', "codec 'hypr' is unknown"),
        ('"bits": 3', '"bitz": 3', "no parameter 'bitz'"),
        ('"budget"', '"budgets"', "key 'budgets'"),
        ('"name": "b.weight"', '"name": "a.weight"', "'a.weight' twice"),
        ('"min_size"', '"minsize"', "setting 'minsize'"),
        ('"mode": "auto", "bytes_before"', '"mode": "auto", "byte_before"', "'byte_before'"),
        ('{\n  "version"', '\n  "version"', "not JSON"),
    ],
)
def test_an_edited_plan_with_a_mistake_is_refused(
    plan: Plan, old: str, new: str, message: str
) -> None:
    text = plan.dumps()
    assert old in text
    with pytest.raises(UsageError, match=message) as caught:
        Plan.loads(text.replace(old, new))
    assert caught.value.hint


def test_a_missing_plan_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Plan.load(tmp_path / "none.json")


def test_a_plan_knows_whether_it_meets_its_budget(plan: Plan) -> None:
    assert plan.met
    plan.bytes = 15433
    assert not plan.met
    assert dataclasses.replace(plan, budget=Budget(bits=4)).met
    assert plan.ratio == pytest.approx(123456 / 15433)


@pytest.mark.parametrize("mode", ["auto", "fused", "folded", "decode"])
def test_loading_without_the_library_takes_several_times_the_dense_weights(mode: str) -> None:
    sites = [site("a"), site("b")]
    choices = [choice(item.name).with_(mode=mode) for item in sites]
    dense = sum(item.nbytes for item in sites)
    assert 5 * dense < portable_load_bytes(sites, choices) < 12 * dense
    kept = [Choice.kept_dense(item, "why") for item in sites]
    assert portable_load_bytes(sites, kept) == 0


def test_a_look_up_expands_its_own_rows_only() -> None:
    product = site("a")
    look_up = dataclasses.replace(product, uses=(Use("node", "Gather", 0, "gather"),))
    needs = [portable_load_bytes([item], [choice("a")]) for item in (look_up, product)]
    assert needs[0] < needs[1] / 5


def test_a_plan_keeps_its_prediction_until_it_is_edited(plan: Plan) -> None:
    plan.portable_load_bytes = 5
    assert Plan.loads(plan.dumps()).portable_load_bytes == 5
    plan["a.weight"] = plan["a.weight"].with_(bits=3)
    assert plan.portable_load_bytes is None


def test_filters_of_raw_inputs_get_more_bits(tmp_path: Path) -> None:
    graph = onnx.parser.parse_graph(
        "g (float[1, 1, 900] x) => (float[1, 32, 1] y) "
        "{ h = Conv (x, first) r = Relu (h) y = Conv (r, second) }"
    )
    rng = np.random.default_rng(0)
    for name, shape in {"first": (64, 1, 256), "second": (32, 64, 645)}.items():
        array = rng.standard_normal(shape).astype(np.float32)
        graph.initializer.append(numpy_helper.from_array(array, name))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    plan = oc.plan(tmp_path / "model.onnx", bits=4, method="hyper")
    assert [choice.params.to_json()["bits"] for choice in plan] == [6, 4]
    fixed = oc.plan(tmp_path / "model.onnx", bits=4, method="hyper", set_="first:bits=3")
    assert [choice.params.to_json()["bits"] for choice in fixed] == [3, 4]


@pytest.mark.parametrize(("method", "bits"), [("dynamic", 8), ("int", 4), ("auto", 4)])
def test_bits_that_nobody_asked_for_are_the_nearest_that_methods_offer(
    method: str, bits: int
) -> None:
    assert default_bits(Settings(method=(method,))) == bits
