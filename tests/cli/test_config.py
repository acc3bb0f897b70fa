"""Configuration files: strict, with lines in errors, and layered under the command line."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import onnxcomp
from onnxcomp.errors import UsageError
from onnxcomp.passes.config.file import checked_options, config_options, merged
from onnxcomp.passes.config.options import TARGETS
from onnxcomp.passes.config.presets import PRESETS, preset_options
from onnxcomp.passes.config.schema import schema
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.config.template import template_text

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(text: str) -> Path:
        path = tmp_path / "plan.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return written


def options_of(properties: dict[str, Any]) -> list[str]:
    found = []
    for rules in properties.values():
        found += [rules["x-option"]] if "x-option" in rules else []
        if "x-option" not in rules:
            found += options_of(rules.get("properties", {}))
    return found


def test_the_schema_is_one_and_its_options_are_arguments_of_optimize() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    names = options_of(schema()["properties"])
    assert len(set(names)) == len(names)
    assert set(names) <= set(inspect.signature(onnxcomp.optimize).parameters)
    assert set(TARGETS) <= set(names)
    # A setting that decides about bytes must be reachable from a file.
    fields = {field.name for field in dataclasses.fields(Settings)}
    # `divide` follows from the method prune and a target.
    assert fields - {"divide"} <= set(names)


def test_the_template_is_valid_with_and_without_its_comments(write: Write) -> None:
    assert config_options(write(template_text())) == {"ratio": 8}
    # Everything that is commented out, but one target only.
    opened = [
        line if any(f"#{key}: " in line for key in ONE_TARGET) else re.sub("#(?! )", "", line)
        for line in template_text().splitlines()
    ]
    opened = [re.sub("^#  -", "  -", line) for line in opened]
    text = "\n".join(opened).replace("path: calibration/*.npz", "path: .")
    jsonschema.validate(yaml.safe_load(text), schema())
    options = checked_options(write(text))
    closed = {"bits", "target_size", "max_error", "max_slowdown", "target_flops"}
    assert set(options) == set(options_of(schema()["properties"])) - closed


ONE_TARGET = ("bits", "size", "max_error", "max_slowdown", "flops")


WRONG = [
    ("version: 1\nmehtod: int\n", 2, "mehtod", "did you mean 'method'?"),
    ("version: 1\ntarget:\n  ratoi: 8\n", 3, "ratoi", "did you mean 'ratio'?"),
    ("version: 1\ntarget:\n  ratio: 1\n", 3, "ratio is 1", "more than 1"),
    ("version: 1\ntarget:\n  ratio: eight\n", 3, "ratio", "a number"),
    ("version: 1\ntarget:\n  bits: true\n", 3, "bits", "a whole number"),
    ("version: 1\nmode: fusd\n", 2, "fusd", "did you mean 'fused'?"),
    ("version: 2\n", 1, "version cannot be 2", "known: 1"),
    ("version: true\n", 1, "version cannot be true", "known: 1"),
    ("method: int\n", 1, "'version' is missing", "add version:"),
    ("version: 1\nmethod: []\n", 2, "method is empty", "at least one"),
    ("version: 1\nrules:\n  - {mode: fused}\n", 3, "matches no weight", "match: or op:"),
    ("version: 1\nrules:\n  - {match: a}\n", 3, "no settings", "method, mode or params"),
    ("version: 1\nrules:\n  - {match: a, keep: true, mode: fused}\n", 3, "keeps", "choose one"),
    ("version: 1\nrules:\n  - match: '['\n    mode: fused\n", 3, "regular expression", "\\."),
    ("version: 1\nrules:\n  - {match: a, params: {bits: [1]}}\n", 3, "bits is [1]", "number"),
    ("version: 1\nmode: auto\nmode: fused\n", 3, "'mode' is given twice", "remove one"),
    ("version: 1\n  mode: auto\n", 2, "", "indentation"),
    ("version: 1\ntarget: {ratio: 8, bits: 4}\n", 2, "together", "choose one"),
    ("version: 1\ndata:\n  path: none/*.npz\n", 3, "no file matches", "start at this file"),
    ("version: 1\nprune:\n  ratio: 1\n", 3, "ratio is 1", "less than 1"),
    ("version: 1\ndata:\n  shapes: {x: [1, -2]}\n", 3, "is -2", "at least 0"),
    ("- 1\n", None, "not a mapping", "config init"),
    ("", None, "not a mapping", "config init"),
    ("version: !!python/object:os.system 1\n", 1, "could not determine", "indentation"),
]


@pytest.mark.parametrize(("text", "line", "message", "hint"), WRONG)
def test_what_is_wrong_is_named_with_its_line(
    write: Write, text: str, line: int | None, message: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        config_options(write(text))
    assert message in caught.value.message and hint in caught.value.hint
    assert line is None or f"plan.yaml, line {line}:" in caught.value.message
    assert "\n" not in caught.value.message


def test_our_checks_agree_with_json_schema() -> None:
    validator = jsonschema.Draft202012Validator(schema())
    for text, *_ in WRONG[:10]:
        assert not validator.is_valid(yaml.safe_load(text)), text


def test_values_become_arguments(write: Write, tmp_path: Path) -> None:
    (tmp_path / "calib").mkdir()
    for name in ("b.npz", "a.npz"):
        (tmp_path / "calib" / name).touch()
    text = """
version: 1
target: {size: 120MB}
method: [hyper, int]
rules:
  - {match: "a:b", method: int, params: {bits: 8}}
  - {match: norm, keep: true}
  - {op: Conv, mode: folded}
data: {path: [calib/*.npz, "ids=x.npy"]}
output: {portable: false}
verify: {run: false, tolerance: 0.1, evaluate: "a/m.py:score", max_drop: 0}
run: {cache: c}
"""
    options = checked_options(write(text))
    assert options["target_size"] == "120MB" and options["method"] == ("hyper", "int")
    first, second, third = options["set_"]
    assert (third.pattern, third.op, third.mode) == ("", "Conv", "folded")
    assert (first.pattern, first.methods, first.params) == ("a:b", ("int",), {"bits": 8})
    assert (second.pattern, second.methods) == ("norm", ("dense",))
    folder = tmp_path.resolve()
    assert options["data"] == (
        f"{folder}/calib/a.npz", f"{folder}/calib/b.npz", f"ids={folder}/x.npy",
    )  # fmt: skip
    assert (options["portable"], options["verify"], options["tolerance"]) == (False, False, 0.1)
    assert options["cache"] == f"{folder}/c"
    assert (options["evaluate"], options["max_drop"]) == (f"{folder}/a/m.py:score", 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: hypr", "method 'hypr' is unknown"),
        ("min_size: 5 parsecs", "is not a size"),
        ("include: '['", "regular expression"),
        ("stock: true\nmethod: hyper", "contradict"),
        ("rules: [{match: a, method: nope}]", "method 'nope' is unknown"),
    ],
)
def test_check_finds_what_the_schema_cannot(write: Write, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        checked_options(write(f"version: 1\n{text}\n"))


def test_a_later_target_replaces_an_earlier_one() -> None:
    assert merged({"bits": 3, "rest": "fp16"}, {"ratio": 8}) == {"ratio": 8, "rest": "fp16"}
    assert merged({"ratio": 8}, {"mode": "fused"}) == {"ratio": 8, "mode": "fused"}
    assert merged({"bits": 3, "rest": "fp16"}, {"max_error": 0.1}) == {
        "rest": "fp16",
        "max_error": 0.1,
    }
    assert merged({"ratio": 8}, {"max_error": 0.1}) == {"ratio": 8, "max_error": 0.1}
    assert merged({"ratio": 8}, {"bits": 2}, {"target_size": 9}) == {"target_size": 9}


def test_a_file_wins_over_its_preset(write: Write) -> None:
    path = write("version: 1\npreset: small\ntarget: {ratio: 9}\n")
    assert config_options(path) == {"rest": "fp16", "ratio": 9}
    assert config_options(path, preset="lossless")["method"] == "dense"


def test_every_preset_can_do_without_the_library(
    onnxcomp: Callable[..., Any], small_model: Path, write: Write
) -> None:
    found = {}
    for name in PRESETS:
        plan = onnxcomp("plan", small_model, "--preset", name, "--stock", "--json")
        assert plan.code == 0
        found[name] = plan.json["settings"].get("bits")
    assert found == {"lossless": None, "balanced": 8, "small": 4, "max": 4, "web": 8}
    path = write("version: 1\npreset: balanced\nstock: true\n")
    assert config_options(path)["bits"] == 8


def test_presets_are_known_to_schema_and_optimize() -> None:
    assert list(PRESETS) == schema()["properties"]["preset"]["enum"]
    arguments = inspect.signature(onnxcomp.optimize).parameters
    for preset in PRESETS.values():
        assert set(preset.options) <= set(arguments) and preset.meaning
    with pytest.raises(UsageError) as caught:
        preset_options("smal")
    assert "small" in caught.value.hint


def test_the_command_line_wins_over_file_and_preset(
    onnxcomp: Callable[..., Any], small_model: Path, write: Write
) -> None:
    path = write(
        "version: 1\npreset: small\nmethod: int\ntarget: {bits: 8}\nmin_size: 1KiB\n"
        "rules: [{match: ^up$, params: {bits: 4}}]\n"
    )
    plan = onnxcomp("plan", small_model, "--config", path, "--json").json
    assert plan["settings"]["bits"] == 8 and plan["settings"]["method"] == ["int"]
    assert plan["settings"]["rest"] == "fp16" and plan["settings"]["min_size"] == 1024
    bits = {site["name"]: site["params"].get("bits") for site in plan["sites"]}
    assert bits == {"table": 8, "up": 4, "down": 8}
    words = ("--ratio", "3", "--set", "^up$:bits=8", "--min-size", "2KiB")
    plan = onnxcomp("plan", small_model, "--config", path, *words, "--json").json
    assert plan["settings"]["ratio"] == 3 and "bits" not in plan["settings"]
    assert plan["settings"]["rules"] == ["^up$:bits=8", "^up$:bits=4"]
    assert plan["settings"]["min_size"] == 2048


def test_the_effective_settings_are_in_the_report(
    onnxcomp: Callable[..., Any], small_model: Path, write: Write, tmp_path: Path
) -> None:
    path = write("version: 1\npreset: small\nmethod: int\nverify: {tolerance: 0.5}\n")
    answer = onnxcomp(
        "optimize", small_model, "-o", tmp_path / "s.onnx", "--config", path, "--json"
    )
    config = answer.json["config"]
    assert answer.code == 0 and config["bits"] == 4 and config["rest"] == "fp16"
    assert config["tolerance"] == 0.5 and config["method"] == ["int"]


def test_a_file_gives_arguments_in_python(small_model: Path, write: Write, tmp_path: Path) -> None:
    text = "version: 1\npreset: small\nmethod: int\nrules: [{op: Gather, params: {bits: 8}}]\n"
    options = config_options(write(text))
    result = onnxcomp.optimize(small_model, tmp_path / "s.onnx", **options)
    bits = {site.name: site.params["bits"] for site in result.report.sites}
    assert bits == {"table": 8, "up": 4, "down": 4}


def test_the_lossless_preset_changes_no_output(
    onnxcomp: Callable[..., Any], small_model: Path, tmp_path: Path
) -> None:
    import numpy as np
    import onnx

    model = onnx.load(small_model)
    for tensor in model.graph.initializer:
        if tensor.name == "up":  # this one is exact in half precision
            half = onnx.numpy_helper.to_array(tensor).astype(np.float16).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(half, "up"))
    onnx.save(model, tmp_path / "m.onnx")
    answer = onnxcomp(
        "optimize", tmp_path / "m.onnx", "-o", tmp_path / "s.onnx", "--preset", "lossless", "--json"
    )
    assert answer.code == 0
    methods = {site["name"]: site["method"] for site in answer.json["sites"]}
    assert methods == {"table": "dense", "up": "fp16", "down": "dense"}
    assert answer.json["verify"]["outputs"]["y"]["rel_l2"] == 0
    assert answer.json["ratio"] > 1.1


def test_config_init_writes_a_file_that_config_check_accepts(
    onnxcomp: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "new.yaml"
    assert onnxcomp("config", "init", "-o", path).code == 0
    assert path.read_text() == template_text()
    answer = onnxcomp("config", "check", path, "--json")
    assert answer.code == 0 and answer.json == {"options": {"ratio": 8}}
    again = onnxcomp("config", "init", "-o", path)
    assert again.code == 2 and "exists" in again.err
    assert onnxcomp("config", "init").out.rstrip() == template_text().rstrip()
    assert json.loads(onnxcomp("config", "schema").out) == schema()
    assert onnxcomp("config", "schema", "--json").json == schema()


def test_config_check_fails_with_one_line(onnxcomp: Callable[..., Any], write: Write) -> None:
    answer = onnxcomp("config", "check", write("version: 1\nmetod: int\n"))
    assert answer.code == 2
    assert "line 2: unknown setting 'metod'" in answer.err
    assert "did you mean 'method'?" in answer.err


def test_presets_say_what_was_measured() -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results" / "presets.json"
    rows = json.loads(results.read_text())["rows"]
    for name, preset in PRESETS.items():
        own = [row for row in rows if row["preset"] == name]
        words = [f"{r['model']} {r['ratio']:.1f}x, {100 * r['loss']:.1f} %" for r in own]
        assert len(own) >= 2 and preset.measured == "; ".join(words)
