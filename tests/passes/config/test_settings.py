"""What a user may ask for, and how mistakes are answered."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.hyper.codec import HyperParams
from onnxcomp.passes.config.methods import method_names, typed_params
from onnxcomp.passes.config.rules import Rule, match_rule, parse_rule
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.config.values import parse_size
from onnxcomp.passes.suggest import suggest


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16384", 16384),
        (16384, 16384),
        ("120MB", 120_000_000),
        ("1.5 GiB", 3 << 29),
        ("16kib", 16384),
        (".5KB", 500),
        ("7b", 7),
    ],
)
def test_sizes_are_read_with_their_units(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "12 parsecs", "-3", "1,5MB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        parse_size(text)


def test_a_rule_keeps_the_colons_of_its_expression() -> None:
    rule = parse_rule("onnx::MatMul_1.*:method=hyper+dense,bits=5,mode=folded")
    assert rule == Rule("onnx::MatMul_1.*", ("hyper", "dense"), "folded", {"bits": 5})
    assert parse_rule(str(rule)) == rule


@pytest.mark.parametrize("text", ["a.*", "a:", "a:bits", "(:bits=3", "a:mode=fast"])
def test_a_rule_with_a_mistake_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_rule(text)
    assert caught.value.hint


def test_the_first_matching_rule_wins() -> None:
    rules = [parse_rule("fc1:bits=5"), parse_rule("fc:bits=3")]
    assert match_rule(rules, ["block.fc1.weight"]).params == {"bits": 5}
    assert match_rule(rules, ["fc2.weight"]).params == {"bits": 3}
    assert match_rule(rules, ["head", "node_of_fc1"]).params == {"bits": 5}
    assert match_rule(rules, ["head"]) is None


def test_a_rule_can_ask_for_an_operator() -> None:
    rules = [parse_rule(".*:op=Conv,bits=5"), parse_rule("a:bits=3")]
    assert match_rule(rules, ["a"], ["Conv", "Add"]).params == {"bits": 5}
    assert match_rule(rules, ["a"], ["MatMul"]).params == {"bits": 3}
    assert str(rules[0]) == ".*:op=Conv,bits=5" and parse_rule(str(rules[0])) == rules[0]


def test_auto_stands_for_every_codec_but_dense() -> None:
    known = {"dense": CODECS["dense"], "hyper": CODECS["hyper"], "hash": CODECS["hyper"]}
    assert method_names("auto", known) == ("hyper", "hash")
    assert method_names(["hash+hyper", "auto"], known) == ("hash", "hyper")
    assert method_names("dense", known) == ("dense",)
    with pytest.raises(UsageError, match="method 'hasch'") as caught:
        method_names("hasch", known)
    assert "'hash'" in caught.value.hint


def test_parameters_are_checked_by_name_and_type() -> None:
    assert typed_params(HyperParams, {"bits": 2}, "hyper") == HyperParams(2)
    with pytest.raises(UsageError, match="no parameter 'bit'"):
        typed_params(HyperParams, {"bit": 2}, "hyper")
    with pytest.raises(UsageError, match=r"bits is 2\.5"):
        typed_params(HyperParams, {"bits": 2.5}, "hyper")


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 4, "ratio": 8.0},
        {"ratio": 8.0, "target_size": 100},
        {"bits": 0},
        {"ratio": -1.0},
        {"min_size": -1},
        {"mode": "fusd"},
        {"external_data": "sometimes"},
        {"precision": "int4"},
        {"include": ("(",)},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Settings(**wrong)  # type: ignore[arg-type]


names = st.text(st.characters(codec="ascii", exclude_characters="()[]{}*+?\\|^$"), min_size=1)


@settings(deadline=None, max_examples=50)
@given(
    bits=st.none() | st.integers(1, 6),
    min_size=st.integers(0, 1 << 20),
    include=st.lists(names, max_size=3),
    pattern=names,
)
def test_settings_come_back_from_json(
    bits: int | None, min_size: int, include: list[str], pattern: str
) -> None:
    rule = Rule(pattern, ("hyper",), "fused", {"bits": 3})
    made = Settings(bits=bits, min_size=min_size, include=tuple(include), set_=(rule,))
    assert Settings.from_json(made.to_json()) == made


def test_a_hint_names_the_closest_word_or_all() -> None:
    assert suggest("hypr", ["hyper", "hash"]) == "did you mean 'hyper'?"
    assert suggest("x", ["hyper", "hash"]) == "known: hash, hyper"
    assert suggest("x", []) == "there is none"
