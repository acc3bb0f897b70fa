"""Every command on a real file: what it prints, what it writes, how it exits."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest

from onnxcomp.runtime.machine import can_run

Run = Callable[..., Any]  # gives an Answer: code, out, err, json, verdict
ROOT = Path(__file__).parents[2]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def compressed(onnxcomp: Run, small_model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "small.onnx"
    assert onnxcomp("optimize", small_model, "-o", path, "--no-verify").code == 0
    return path


def test_optimize_writes_a_smaller_verified_model(
    onnxcomp: Run, small_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "small.onnx"
    answer = onnxcomp("optimize", small_model, "-o", path)
    assert answer.code == 0, answer.err
    assert path.stat().st_size * 5 < small_model.stat().st_size
    assert answer.verdict.endswith(f"{path}, runs; loss not judged (inputs made up)")
    for name in ("table", "up", "down"):
        assert re.search(rf"^{name} .* hyper ", answer.out, re.MULTILINE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.onnx"]


@pytest.mark.skipif(not can_run("avx2"), reason="this processor has no AVX2")
def test_codes_that_suit_the_processor_are_named_before_the_verdict(
    onnxcomp: Run, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXCOMP_ISA", "avx2")
    answer = onnxcomp("optimize", small_model, "-o", tmp_path / "small.onnx")
    assert answer.code == 0, answer.err
    note = answer.out.index("note: other codes run")
    assert note < answer.out.index(answer.verdict)
    assert answer.verdict.endswith("runs; loss not judged (inputs made up)")


def test_the_result_of_optimize_follows_its_schema(
    onnxcomp: Run, small_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "small.onnx"
    result = onnxcomp("optimize", small_model, "-o", path, "--bits", 3, "--json").json
    schema = json.loads((ROOT / "docs" / "result.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(result)
    assert result["output"]["bytes"] == path.stat().st_size
    assert result["output"]["sha256"] == digest(path)
    assert result["input"]["sha256"] == digest(small_model)
    assert result["ratio"] == pytest.approx(small_model.stat().st_size / path.stat().st_size)
    assert result["verify"]["passed"] and result["verify"]["portable"]["passed"]
    assert {site["params"]["bits"] for site in result["sites"] if site["method"] != "dense"} == {3}


def test_with_json_stdout_holds_nothing_else_and_the_table_goes_to_stderr(
    onnxcomp: Run, small_model: Path, tmp_path: Path
) -> None:
    answer = onnxcomp("optimize", small_model, "-o", tmp_path / "s.onnx", "--json", "--no-verify")
    assert answer.json["verify"] is None
    assert "not verified" in answer.err.splitlines()[-1]


def test_quiet_means_silent(onnxcomp: Run, small_model: Path, tmp_path: Path) -> None:
    answer = onnxcomp("optimize", small_model, "-o", tmp_path / "s.onnx", "-q", "--no-verify")
    assert (answer.code, answer.out, answer.err) == (0, "", "")


def test_a_dry_run_writes_nothing_and_promises_the_exact_bytes(
    onnxcomp: Run, small_model: Path, tmp_path: Path, compressed: Path
) -> None:
    path = tmp_path / "dry.onnx"
    result = onnxcomp("optimize", small_model, "-o", path, "--dry-run", "--json").json
    assert not path.exists()
    assert abs(result["output"]["bytes"] - compressed.stat().st_size) <= 4
    assert result["output"]["files"] == []


def test_a_reachable_ratio_is_met(onnxcomp: Run, small_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    answer = onnxcomp("optimize", small_model, "-o", path, "--ratio", "5x", "--no-verify")
    assert answer.code == 0, answer.err
    assert path.stat().st_size * 5 <= small_model.stat().st_size
    assert "target" in answer.verdict and "met" in answer.verdict


def test_an_unreachable_target_exits_3_and_still_writes_the_smallest_output(
    onnxcomp: Run, small_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "small.onnx"
    options = ("--target-size", "1KB", "--no-verify", "--json")
    answer = onnxcomp("optimize", small_model, "-o", path, *options)
    assert answer.code == 3
    assert answer.json["target"] == {"bytes": 1000, "met": False}
    assert path.exists()
    assert "hint:" in answer.err


def test_a_loss_above_the_tolerance_exits_4_and_keeps_the_output_aside(
    onnxcomp: Run, small_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "small.onnx"
    options = ("--bits", 1, "--tolerance", 1e-6)
    answer = onnxcomp("optimize", small_model, "-o", path, *options, "--json")
    assert answer.code == 4
    assert answer.json["verify"]["passed"] is False
    assert [p.name for p in tmp_path.iterdir()] == ["small.rejected.onnx"]
    answer = onnxcomp("optimize", small_model, "-o", path, *options, "--force")
    assert path.exists()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("missing.onnx", "-o", "out.onnx"), 5, "missing.onnx"),
        (("MODEL", "-o", "out.onnx", "--bits", "3", "--ratio", "8"), 2, "bits and ratio"),
        (("MODEL", "-o", "out.onnx", "--method", "hypre"), 2, "hyper"),
        (("MODEL", "-o", "out.onnx", "--set", "table:bites=3"), 2, "bites"),
        (("MODEL", "-o", "out.onnx", "--exclude", "("), 2, "regular expression"),
        (("MODEL", "-o", "out.onnx", "--min-size", "16 apples"), 2, "not a size"),
        (("MODEL", "-o", "MODEL"), 2, "is the input"),
        (("MODEL", "-o", "no/such/folder/out.onnx"), 2, "no/such/folder"),
        (("MODEL",), 2, "-o"),
        (("MODEL", "-o", "out.onnx", "--shape", "idz:1,4"), 2, "idz"),
        (("MODEL", "-o", "out.onnx", "--plan", "no-plan.json"), 2, "no-plan.json"),
        (("README.md", "-o", "out.onnx"), 5, "README.md"),
    ],
)
def test_what_cannot_work_is_refused_with_its_code_and_reason(
    options: tuple[str, ...],
    code: int,
    words: str,
    onnxcomp: Run,
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("not a model")
    before = digest(small_model)
    named = [str(small_model) if option == "MODEL" else option for option in options]
    answer = onnxcomp("optimize", *named)
    assert (answer.code, answer.out) == (code, "")
    assert words in answer.err
    assert "Traceback" not in answer.err
    assert digest(small_model) == before
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_plan_promises_what_optimize_writes_and_replays_byte_for_byte(
    onnxcomp: Run, small_model: Path, tmp_path: Path
) -> None:
    plan, first, second = (tmp_path / name for name in ("plan.json", "a.onnx", "b.onnx"))
    options = ("--ratio", 6, "--set", "down:bits=6")
    answer = onnxcomp("plan", small_model, *options, "-o", plan, "--json")
    assert answer.code == 0, answer.err
    assert json.loads(plan.read_text()) == answer.json
    assert onnxcomp("optimize", small_model, "-o", first, *options, "--no-verify").code == 0
    assert onnxcomp("optimize", small_model, "-o", second, "--plan", plan, "--no-verify").code == 0
    assert first.read_bytes() == second.read_bytes()
    assert abs(first.stat().st_size - answer.json["bytes"]) <= 16


def test_a_plan_that_misses_its_target_says_so_and_exits_3(
    onnxcomp: Run, small_model: Path
) -> None:
    answer = onnxcomp("plan", small_model, "--ratio", 200)
    assert answer.code == 3
    assert "MISSED" in answer.verdict


def test_include_and_exclude_choose_weights(onnxcomp: Run, small_model: Path) -> None:
    result = onnxcomp(
        "plan", small_model, "--include", "table|up", "--exclude", "^up$", "--json"
    ).json
    touched = [site["name"] for site in result["sites"] if site["codec"] != "dense"]
    assert touched == ["table"]


def test_verify_passes_and_reports_the_loss(
    onnxcomp: Run, small_model: Path, compressed: Path
) -> None:
    answer = onnxcomp("verify", small_model, compressed, "--shape", "ids:3,5", "--json")
    assert answer.code == 0, answer.err
    metrics = answer.json["outputs"]["y"]
    assert 0.01 < metrics["rel_l2"] < 0.3
    assert metrics["cosine"] > 0.95
    assert answer.json["portable"]["passed"]


def test_verify_reads_inputs_from_a_file(
    onnxcomp: Run, small_model: Path, compressed: Path, tmp_path: Path
) -> None:
    np.savez(tmp_path / "ids.npz", ids=np.arange(12).reshape(3, 4))
    answer = onnxcomp("verify", small_model, compressed, "--data", tmp_path / "ids.npz")
    assert answer.code == 0, answer.err
    assert answer.verdict.startswith("runs; loss not judged: 1 input")


def test_verify_fails_above_the_tolerance(
    onnxcomp: Run, small_model: Path, compressed: Path
) -> None:
    answer = onnxcomp("verify", small_model, compressed, "--tolerance", 1e-6)
    assert answer.code == 4
    assert answer.verdict == "FAILED"


def test_inspect_lists_weights_and_says_how_they_are_stored(
    onnxcomp: Run, small_model: Path, compressed: Path
) -> None:
    dense = onnxcomp("inspect", small_model, "--json").json
    assert [site["name"] for site in dense["sites"]] == ["table", "up", "down"]
    small = onnxcomp("inspect", compressed, "--json").json
    assert [weight["name"] for weight in small["compressed"]] == ["table", "up", "down"]
    assert "can be compressed" in onnxcomp("inspect", small_model).verdict


def test_inspect_shows_differences(onnxcomp: Run, small_model: Path, compressed: Path) -> None:
    answer = onnxcomp("inspect", small_model, "--diff", compressed)
    assert answer.verdict.endswith("the interface is the same")
    assert re.search(r"operator +MatMul +2 +0", answer.out)
    result = onnxcomp("inspect", small_model, "--diff", compressed, "--json").json
    assert result["interface"] == []


def test_expand_gives_plain_onnx_that_computes_the_same(
    onnxcomp: Run, small_model: Path, tmp_path: Path
) -> None:
    compressed, path = tmp_path / "small.onnx", tmp_path / "dense.onnx"
    exact = ("--precision", "exact", "--no-verify")
    assert onnxcomp("optimize", small_model, "-o", compressed, *exact).code == 0
    answer = onnxcomp("expand", compressed, "-o", path, "--json")
    assert answer.code == 0, answer.err
    assert answer.json["output"]["bytes"] == path.stat().st_size
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    assert onnxcomp("verify", compressed, path, "--tolerance", 1e-5).code == 0


def test_bench_measures_all_forms(onnxcomp: Run, small_model: Path, compressed: Path) -> None:
    answer = onnxcomp(
        "bench", small_model, compressed, "--portable", "--seconds", 0.01, "--threads", 1, "--json"
    )
    assert answer.code == 0, answer.err
    models = answer.json["models"]
    assert [model["form"] for model in models] == ["standard", "library", "portable"]
    for model in models:
        assert 0 < model["p10_ms"] <= model["median_ms"] <= model["p90_ms"]
        assert model["load_ms"] > 0 and model["rss_bytes"] > 0
    assert models[1]["file_bytes"] == compressed.stat().st_size


def test_bench_says_what_does_not_fit_into_memory(
    onnxcomp: Run, small_model: Path, compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXCOMP_MEMORY", "1MB")
    answer = onnxcomp("bench", small_model, compressed, "--portable")
    assert answer.code == 2
    wanted = (
        r"3 sessions side by side need about 2\d\d\.\d MB of memory, and 1\.00 MB are available"
    )
    assert re.search(wanted, answer.err)


def test_a_model_that_does_not_fit_into_memory_is_verified_layer_by_layer(
    onnxcomp: Run,
    small_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "small.onnx"
    whole = onnxcomp("optimize", small_model, "-o", path, "--json")
    monkeypatch.setenv("ONNXCOMP_MEMORY", "1MB")
    answer = onnxcomp("optimize", small_model, "-o", path, "--json")
    assert answer.code == 0, answer.err
    assert "the original needs about" in caplog.text and "layer by layer" in caplog.text
    schema = json.loads((ROOT / "docs" / "result.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(answer.json)
    found, known = answer.json["verify"], whole.json["verify"]
    assert found["layer_by_layer"][0] == "the original"
    assert found["outputs"]["y"]["rel_l2"] == pytest.approx(known["outputs"]["y"]["rel_l2"])
    assert answer.json["output"]["sha256"] == whole.json["output"]["sha256"]


def test_an_interrupt_ends_a_run_with_130_and_leaves_no_process(small_model: Path) -> None:
    command = [sys.executable, "-m", "onnxcomp", "bench", str(small_model), "--seconds", "60"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not children.exists():
            process.kill()
            pytest.skip("the system does not list children of a process")
        while not children.read_text():
            time.sleep(0.05)
        worker = Path(f"/proc/{children.read_text().split()[0]}")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "error: interrupted\n"
    deadline = time.monotonic() + 60
    while worker.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.exists()


def test_ops_path_is_a_file_alone_on_its_line(onnxcomp: Run) -> None:
    answer = onnxcomp("ops", "path")
    assert Path(answer.out.strip()).is_file()


def test_ops_list_names_the_operators(onnxcomp: Run) -> None:
    listed = [entry["name"] for entry in onnxcomp("ops", "list", "--json").json["operators"]]
    names = set(listed)
    assert len(names) == len(listed)
    assert names >= {"HyperMatMul", "HyperGather", "HyperDecode", "HyperWeight"}


def test_ops_info_loads_the_library(onnxcomp: Run) -> None:
    answer = onnxcomp("ops", "info")
    assert answer.code == 0
    assert answer.verdict == "the library loads"


def test_a_missing_library_exits_6(onnxcomp: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNXCOMP_OPS_LIBRARY", "/nowhere/libonnxcomp_ops.so")
    answer = onnxcomp("ops", "path")
    assert answer.code == 6
    assert "/nowhere/libonnxcomp_ops.so" in answer.err


def test_codecs_lists_them_and_explains_one(onnxcomp: Run) -> None:
    names = [entry["name"] for entry in onnxcomp("codecs", "--json").json["codecs"]]
    assert names[:2] == ["dense", "hyper"]
    (hyper,) = onnxcomp("codecs", "hyper", "--json").json["codecs"]
    assert all(parameter["meaning"] for parameter in hyper["params"])
    sizes = [setting["bits_per_weight"] for setting in hyper["settings"]]
    assert min(sizes) < 1.2 and max(sizes) < 7
    assert onnxcomp("codecs", "hypper").code == 2


def test_demo_compresses_the_model_that_ships_and_keeps_its_accuracy(
    onnxcomp: Run, tmp_path: Path
) -> None:
    answer = onnxcomp("demo", "-o", tmp_path / "demo", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["ratio"] > 6.4
    accuracies = [form["accuracy"] for form in answer.json["forms"]]
    assert accuracies[0] > 0.9
    assert min(accuracies) > accuracies[0] - 0.01
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == ["model.onnx", "small.onnx"]
    assert "next:" in answer.err


def test_a_loss_on_made_up_inputs_is_said_to_be_one(
    onnxcomp: Run, small_model: Path, tmp_path: Path
) -> None:
    ids = tmp_path / "ids.npy"
    np.save(ids, np.arange(8).reshape(2, 4))
    note = "inputs were made up: give real ones with --data"
    made_up = onnxcomp("optimize", small_model, "-o", tmp_path / "a.onnx")
    real = onnxcomp("optimize", small_model, "-o", tmp_path / "b.onnx", "--data", f"ids={ids}")
    assert (made_up.code, real.code) == (0, 0)
    assert note in made_up.out and note not in real.out
    assert note in onnxcomp("verify", small_model, tmp_path / "a.onnx").out


def test_a_loss_that_nobody_judged_is_warned_of_before_the_verdict(
    onnxcomp: Run, small_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.onnx"
    for options, warned in (
        (("--bits", 3), True), (("--bits", 3, "--tolerance", 0.4), False), (("--bits", 6), False),
    ):  # fmt: skip
        answer = onnxcomp("optimize", small_model, "-o", path, *options)
        assert answer.code == 0
        assert ("answers may change: judge them by --eval" in answer.out) == warned
        assert answer.verdict.startswith(tuple("0123456789"))


def test_a_large_loss_is_warned_of(onnxcomp: Run, small_model: Path, tmp_path: Path) -> None:
    close = onnxcomp("optimize", small_model, "-o", tmp_path / "a.onnx", "--bits", "5")
    far = onnxcomp("optimize", small_model, "-o", tmp_path / "b.onnx", "--bits", "1")
    assert "warning" not in close.out
    assert far.verdict.startswith("warning: output 'y' differs by")
