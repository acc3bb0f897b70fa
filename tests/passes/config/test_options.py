"""One table of options: every form is derived from it, and every value is checked by it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import onnxcomp as oc
from onnxcomp.cli import main
from onnxcomp.errors import UsageError
from onnxcomp.passes.config.kinds import Choice, Flag, Kind, Number, Shapes, Size
from onnxcomp.passes.config.option import SECTIONS, options_of
from onnxcomp.passes.config.options import ByteOptions, OptimizeOptions, PlanOptions
from onnxcomp.passes.config.schema import file_options, schema
from onnxcomp.passes.config.settings import Settings, settings_from
from onnxcomp.passes.weight import Mode

ROOT = Path(__file__).parents[3]
FOLDERS = ("passes", "ops", "runtime", "cli", "models")
ENTRY = """    loudness: float = option(
        0.5, Number(least=0, below=11), "run", "How loud the compiler works.", "Zero is silent.",
    )
"""
# What a user sees of the entry above, in all places that are derived from the table.
SEEN = """
import inspect, json, onnxcomp
from click.testing import CliRunner
from onnxcomp.cli import main
from onnxcomp.errors import UsageError
from onnxcomp.passes.config.schema import schema
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.config.template import template_text

try:
    onnxcomp.plan("m.onnx", loudness=11)
except UsageError as error:
    refused = f"{error.message}; {error.hint}"
words = ("plan", "m.onnx", "--loudness", "11")
print(json.dumps({
    "settings": Settings(loudness=2).to_json()["loudness"],
    "schema": schema()["properties"]["run"]["properties"]["loudness"],
    "template": "  # How loud the compiler works.\\n  #loudness: 0.5\\n" in template_text(),
    "signature": [
        str(inspect.signature(function).parameters["loudness"])
        for function in (onnxcomp.optimize, onnxcomp.plan, onnxcomp.frontier)
    ],
    "docstring": "loudness: How loud the compiler works. Zero is silent." in onnxcomp.plan.__doc__,
    "help": CliRunner().invoke(main, ["optimize", "--help"]).output,
    "refused": refused,
    "refused_on_the_command_line": CliRunner().invoke(main, words).stderr,
}))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What follows from one more entry in a copy of the sources, with no other file changed."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.cc", "*.h", "*.cu", "*.onnx", "*.npz")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    shutil.copytree(ROOT / "src", copy / "src", symlinks=True)
    shutil.copytree(ROOT / "docs", copy / "docs")
    table = copy / "passes" / "config" / "options.py"
    text = table.read_text(encoding="utf-8")
    place = text.index("    stock: bool = option(")
    table.write_text(text[:place] + ENTRY + text[place:], encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(copy / "src")}
    run = subprocess.run(
        [sys.executable, "-c", SEEN], env=environment, capture_output=True, text=True, check=True
    )
    command = [sys.executable, copy / "docs" / "option_tables.py", "--write"]
    subprocess.run(command, env=environment, check=True)
    manual = (copy / "docs" / "cli.md").read_text(encoding="utf-8")
    return {**json.loads(run.stdout), "manual": manual}


def test_one_entry_makes_a_setting(seen: Mapping[str, Any]) -> None:
    assert seen["settings"] == 2
    assert seen["signature"] == ["loudness: 'float' = 0.5"] * 3
    assert seen["docstring"] and seen["template"]


def test_one_entry_makes_an_option_of_the_command_line(seen: Mapping[str, Any]) -> None:
    assert re.search(r"--loudness NUMBER +How loud the compiler works\. +\[default: 0\.5\]",
                     seen["help"])  # fmt: skip
    row = "| `--loudness 0.5` | How loud the compiler works. Zero is silent. |"
    assert seen["manual"].count(row) == 2  # under optimize and under plan


def test_one_entry_makes_a_setting_of_configuration_files(seen: Mapping[str, Any]) -> None:
    assert seen["schema"] == {
        "description": "How loud the compiler works.",
        "type": "number",
        "minimum": 0,
        "exclusiveMaximum": 11,
        "default": 0.5,
        "x-option": "loudness",
    }


def test_one_entry_has_one_check(seen: Mapping[str, Any]) -> None:
    assert seen["refused"] == "loudness is 11; it must be a number of at least 0 and below 11"
    assert seen["refused_on_the_command_line"] == (
        "error: --loudness is 11.0\nhint: it must be a number of at least 0 and below 11\n"
    )


def test_the_manual_is_up_to_date() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "docs" / "option_tables.py"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def test_the_order_of_settings_in_plans_is_published() -> None:
    assert list(Settings(bits=4).to_json()) == [
        "method", "bits", "min_size", "mode", "include", "exclude", "rules", "external_data",
        "freeze_inputs", "precision", "portable", "seed", "stock", "rest", "detect_sharing",
        "distill", "functions", "target", "objective",
    ]  # fmt: skip
    unset = {"bits", "ratio", "target_size", "max_error", "max_slowdown", "divide"}
    unset |= {"prune_ratio", "target_flops", "prune_score", "prune_caches", "logits_to_keep"}
    unset |= {"sparsity", "prune_experts", "prune_layers", "prune_search"}
    names = {field.name for field in dataclasses.fields(Settings)} - unset
    assert len(names) == 18


@pytest.mark.parametrize("entry", options_of(OptimizeOptions), ids=lambda entry: entry.name)
def test_every_option_is_described_and_its_default_is_valid(entry: Any) -> None:
    assert entry.help[0].isupper() and entry.help.endswith(".") and "\n" not in entry.help
    assert not entry.details or entry.details.endswith(".")
    assert entry.section in SECTIONS
    entry.checked(entry.default)
    if entry.in_file:
        assert jsonschema.Draft202012Validator.check_schema(entry.kind.schema()) is None
        if entry.example:
            jsonschema.validate(yaml.safe_load(entry.example), entry.kind.schema())
        else:
            assert entry.default is not None
    if entry.default is None:
        assert entry.type.endswith(" | None") or entry.type == "Any"


def test_no_two_options_share_a_place() -> None:
    entries = options_of(OptimizeOptions)
    flags = [name for entry in entries for name in entry.spelling if name.startswith("-")]
    assert len(set(flags)) == len(flags)
    places = [entry.path for entry in file_options()]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("function", [oc.optimize, oc.plan, oc.frontier])
def test_signature_and_docstring_have_every_option(function: Any) -> None:
    table = OptimizeOptions if function is oc.optimize else PlanOptions
    parameters = inspect.signature(function).parameters
    own = ["model", "output"] if function is oc.optimize else ["model"]
    assert list(parameters) == [*own, *(entry.name for entry in options_of(table))]
    for entry in options_of(table):
        assert parameters[entry.name].default == entry.default
        assert f"\n        {entry.name}: {entry.help.split()[0]}" in function.__doc__
    assert "asked" not in function.__doc__ and "Converted" not in str(inspect.signature(function))
    assert max(map(len, function.__doc__.splitlines())) <= 100


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"plan\(\) got an unexpected keyword argument 'bitz'"):
        oc.plan("m.onnx", bitz=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"optimize\(\) missing a required argument: 'model'"):
        oc.optimize(bits=3)  # type: ignore[call-arg]


SHARE = Number(above=0, below=1)
COUNT = Number(whole=True, least=1)
WRONG: list[tuple[Kind, Any, str]] = [
    (SHARE, math.nan, "x is nan"),
    (SHARE, math.inf, "x is inf"),
    (SHARE, 0, "x is 0"),
    (SHARE, 1.0, "x is 1.0"),
    (SHARE, -0.5, "x is -0.5"),
    (SHARE, "half", "x is 'half'"),
    (SHARE, True, "x is True"),
    (SHARE, np.float32(2), "x is 2.0"),
    (Number(least=0), math.inf, "x is inf"),
    (COUNT, 0, "x is 0"),
    (COUNT, -3, "x is -3"),
    (COUNT, 2.0, "x is 2.0"),
    (COUNT, math.nan, "x is nan"),
    (COUNT, None, "x is None"),
    (Size(), -1, "x is -1"),
    (Size(1), 0, "x is 0"),
    (Size(1), "0MB", "x is '0MB'"),
    (Size(), math.nan, "x is nan"),
    (Size(), math.inf, "x is inf"),
    (Size(), True, "x is True"),
    (Size(), "12 parsecs", "not a size"),
    (Flag(), 1, "x is 1"),
    (Flag(), "yes", "x is 'yes'"),
    (Choice(Mode), "b", "x 'b' is unknown"),
    (Shapes(), {"ids": [1, -2]}, "x of 'ids' is [1, -2]"),
    (Shapes(), {"ids": "12"}, "x of 'ids' is '12'"),
    (Shapes(), [1, 2], "x is [1, 2]"),
]


@pytest.mark.parametrize(("kind", "value", "message"), WRONG, ids=str)
def test_what_is_out_of_range_is_named_with_a_hint(kind: Kind, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        kind.checked(value, "x")
    assert caught.value.hint


def test_numbers_of_numpy_are_taken_and_numbers_stay_what_they_are() -> None:
    assert type(COUNT.checked(np.int64(3), "x")) is int
    assert type(SHARE.checked(np.float32(0.5), "x")) is float
    assert type(Number(above=1).checked(8, "x")) is int
    assert Flag().checked(np.bool_(True), "x") is True
    assert Size().checked(1 << 60, "x") == 1 << 60


FROM_EVERYWHERE = [
    ("prune_ratio", "nan", ".nan", math.nan),
    ("prune_ratio", "1.5", "1.5", 1.5),
    ("max_error", "nan", ".nan", math.nan),
    ("max_error", "0", "0", 0),
    ("max_slowdown", "inf", ".inf", math.inf),
    ("ratio", "1", "1", 1),
    ("bits", "0", "0", 0),
    ("distill", "-1", "-1", -1),
    ("target_size", "0", "0", 0),
    ("tolerance", "-1", "-1", -1),
    ("tolerance", "nan", ".nan", math.nan),
    ("max_drop", "nan", ".nan", math.nan),
    ("seed", "-1", "-1", -1),
    ("jobs", "0", "0", 0),
    ("mode", "fusd", "fusd", "fusd"),
    ("include", "(", "(", "("),
]


@pytest.mark.parametrize(("name", "text", "plain", "value"), FROM_EVERYWHERE)
def test_command_line_file_and_python_refuse_the_same(
    tmp_path: Path, name: str, text: str, plain: str, value: Any
) -> None:
    (entry,) = (entry for entry in options_of(OptimizeOptions) if entry.name == name)
    with pytest.raises(UsageError):
        oc.optimize("m.onnx", "o.onnx", **{name: value})
    run = CliRunner().invoke(main, ["optimize", "m.onnx", "-o", "o", entry.spelling[-1], text])
    assert run.exit_code == 2 and "hint: " in run.stderr and "m.onnx" not in run.stderr
    path = tmp_path / "c.yaml"
    lines = [f"{'  ' * depth}{key}:" for depth, key in enumerate(entry.path)]
    path.write_text("\n".join(["version: 1", *lines]) + f" {plain}\n", encoding="utf-8")
    run = CliRunner().invoke(main, ["config", "check", str(path)])
    line = 1 + len(lines)
    assert run.exit_code == 2 and f"line {line}" in run.stderr, run.stderr


@pytest.mark.parametrize(("text", "value"), [("8", 8.0), ("8x", 8.0), ("7.5X", 7.5)])
def test_ratios_may_end_in_x_on_the_command_line(text: str, value: float) -> None:
    (entry,) = (entry for entry in options_of(ByteOptions) if entry.name == "ratio")
    assert entry.kind.read(text, "--ratio") == value
    for wrong in ("1", "0.5x", "x", "-3", "8:1", "nan"):
        with pytest.raises(UsageError, match=r"--ratio is ") as caught:
            entry.kind.read(wrong, "--ratio")
        assert caught.value.hint == "it must be a number above 1"


def test_shapes_are_read_and_names_may_hold_colons() -> None:
    assert Shapes().read("serving:0:1,128", "--shape") == ("serving:0", (1, 128))
    for wrong in ("1,128", "ids:", "ids:1,,2", "ids:1,-2"):
        with pytest.raises(UsageError, match=r"--shape is ") as caught:
            Shapes().read(wrong, "--shape")
        assert "input_ids:1,128" in caught.value.hint


def test_the_command_line_gives_only_what_was_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: list[dict[str, Any]] = []

    def plan(model: Path, **options: Any) -> None:
        given.append(options)
        raise UsageError("enough")

    monkeypatch.setattr(oc, "plan", plan)
    words = ["--set", "a:bits=3", "--exclude", "b", "--prune-caches", "--ratio", "8x"]
    assert CliRunner().invoke(main, ["plan", "m.onnx", *words, "--stock"]).exit_code == 2
    (options,) = given
    assert set(options) == {"set_", "exclude", "prune_caches", "ratio", "stock"}
    assert options["ratio"] == 8.0 and options["exclude"] == ("b",)
    assert options["prune_caches"] is True and options["set_"][0].params == {"bits": 3}


def test_schema_and_settings_speak_of_the_same_options() -> None:
    assert {entry.name for entry in options_of(ByteOptions)} <= {
        entry.name for entry in file_options()
    }
    assert schema()["properties"]["target"]["properties"]["size"]["x-option"] == "target_size"
    asked = PlanOptions(method="prune+int", ratio=4, min_size="1KiB", include="a")
    settings = settings_from(asked)
    assert (settings.method, settings.divide, settings.min_size) == (("int",), True, 1024)
    assert dataclasses.replace(settings, max_error=0.1).divide is True
    assert Settings.from_json(settings.to_json()) == settings
