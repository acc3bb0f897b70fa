"""Files that are no models, or damaged ones: one line, the right code, nothing written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

COMMANDS = ("optimize", "plan", "inspect", "expand", "verify", "bench")


@pytest.fixture
def judge(onnxcomp: Callable[..., Any], tools: Any, tmp_path: Path) -> Callable[..., list[str]]:
    """Give a file to every command; each must refuse it as an invalid model and leave no trace."""

    def run(path: Path, commands: tuple[str, ...] = COMMANDS) -> list[str]:
        output = tmp_path / "out"
        output.mkdir()
        before = tools.contents(path.parent) if path.parent.is_dir() else None
        messages = []
        for command in commands:
            words: list[object] = [command, path]
            words += ["-o", output / "out.onnx"] if command in ("optimize", "expand") else []
            words += [path] if command == "verify" else []
            messages.append(onnxcomp(*words).refused(5))
            assert not list(output.iterdir())
        assert before is None or tools.contents(path.parent) == before
        return messages

    return run


def test_a_missing_file(judge: Callable[..., list[str]], tmp_path: Path) -> None:
    assert all("absent.onnx" in text for text in judge(tmp_path / "no" / "absent.onnx"))


def test_a_folder(judge: Callable[..., list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "models" / "folder.onnx"
    folder.mkdir(parents=True)
    assert all("folder" in text for text in judge(folder))


NOT_ONNX = {
    "empty": b"",
    "text": b"not a model at all\n" * 100,
    "zip": b"PK\x03\x04" + bytes(range(256)) * 8,
    "zeros": bytes(4000),
    "flatbuffer": b"\x1c\x00\x00\x00ORTM" + bytes(range(256)) * 8,
}


@pytest.mark.parametrize("kind", NOT_ONNX)
def test_a_file_that_is_no_model(
    judge: Callable[..., list[str]], tools: Any, tmp_path: Path, kind: str
) -> None:
    judge(tools.save(tmp_path / "in", NOT_ONNX[kind]))


@pytest.mark.parametrize("left", [1, 10, 5000, -1, -60])
def test_a_truncated_model(
    judge: Callable[..., list[str]], tools: Any, tmp_path: Path, left: int
) -> None:
    judge(tools.save(tmp_path / "in", tools.two_products().SerializeToString()[:left]))


def _entry(model: onnx.ModelProto, key: str, value: str) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value


ENTRIES = [
    ("location", "/etc/hostname"),
    ("location", "../other/model.data"),
    ("location", "C:\\model.data"),
    ("location", ""),
    ("location", "."),
    ("location", "model\0.data"),
    ("location", "a" * 5000),
    ("location", "model.onnx"),
    ("offset", "-4"),
    ("offset", "four"),
    ("offset", "131071"),
    ("offset", "9" * 30),
    ("length", "-1"),
    ("length", "7"),
    ("length", "9" * 30),
]


@pytest.mark.parametrize(("key", "value"), ENTRIES)
def test_external_data_outside_the_folder_or_the_file(
    judge: Callable[..., list[str]], tools: Any, tmp_path: Path, key: str, value: str
) -> None:
    path = tools.save(tmp_path / "in", tools.two_products(), external=True)
    tools.save(tmp_path / "other", tools.two_products(), external=True)
    model = onnx.load(path, load_external_data=False)
    _entry(model, key, value)
    path.write_bytes(model.SerializeToString())
    # What ONNX Runtime makes of lengths is its own affair.
    judge(path, COMMANDS[:4])


def _missing(data: Path) -> None:
    data.unlink()


def _short(data: Path) -> None:
    data.write_bytes(data.read_bytes()[:1000])


def _folder(data: Path) -> None:
    data.unlink()
    data.mkdir()


def _pipe(data: Path) -> None:
    data.unlink()
    os.mkfifo(data)


def _loop(data: Path) -> None:
    data.unlink()
    data.symlink_to(data.name)


def _link_out(data: Path) -> None:
    data.rename(data.parent.parent / "elsewhere")
    data.symlink_to("../elsewhere")


@pytest.mark.parametrize("damage", [_missing, _short, _folder, _pipe, _loop, _link_out])
def test_a_data_file_that_cannot_be_used(
    judge: Callable[..., list[str]], tools: Any, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    path = tools.save(tmp_path / "in", tools.two_products(), external=True)
    damage(path.with_name("model.data"))
    judge(path)


def test_a_cache_of_links_is_read_and_plain_files_are_written(
    onnxcomp: Callable[..., Any], tools: Any, tmp_path: Path
) -> None:
    """Content-addressed caches: model and data are both links into one folder of blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "v1"
    path = tools.save(blobs, tools.two_products(), external=True)
    snapshot.mkdir(parents=True)
    for name in ("model.onnx", "model.data"):
        path.with_name(name).rename(blobs / f"hash-{name}")
        (snapshot / name).symlink_to(f"../../blobs/hash-{name}")
    before = tools.contents(tmp_path)
    output = tmp_path / "out" / "out.onnx"
    output.parent.mkdir()
    words = ("optimize", snapshot / "model.onnx", "-o", output, "--external-data", "always")
    assert onnxcomp(*words, "--json").json["coverage"] == 1.0
    written = [output, output.with_name("out.onnx.data")]
    assert all(file.is_file() and not file.is_symlink() for file in written)
    assert {**tools.contents(tmp_path), **before} == tools.contents(tmp_path)


def _dims(*dims: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims[:] = dims

    return change


def _nothing_stored(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].dims[:] = [2**31, 64]


def _few_values(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].ClearField("raw_data")
    model.graph.initializer[0].float_data.extend([1.0] * 5)


def _type(number: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].data_type = number

    return change


def _undefined_input(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "nothing"


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "y"


def _no_name(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].name = ""


def _no_nodes(model: onnx.ModelProto) -> None:
    del model.graph.node[:]


def _same_output(model: onnx.ModelProto) -> None:
    model.graph.node.append(model.graph.node[0])


def _no_version(model: onnx.ModelProto) -> None:
    model.ir_version = 0


DAMAGES = {
    "a dim of 2^31": _dims(2**31, 256),
    "dims whose product wraps": _dims(2**32, 2**32),
    "a negative dim": _dims(-64, 256),
    "negative dims": _dims(-64, -256),
    "no dims": _dims(),
    "too many dims": _dims(*[2] * 40),
    "no values": _nothing_stored,
    "few values": _few_values,
    "no type": _type(0),
    "an unknown type": _type(99),
    "type string": _type(TensorProto.STRING),
    "an undefined input": _undefined_input,
    "a cycle": _cycle,
    "no name": _no_name,
    "no nodes": _no_nodes,
    "an output twice": _same_output,
    "no version": _no_version,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_graph(
    judge: Callable[..., list[str]], tools: Any, tmp_path: Path, damage: str
) -> None:
    model = tools.two_products()
    DAMAGES[damage](model)
    judge(tools.save(tmp_path / "in", model), COMMANDS[:4])


def test_a_graph_without_outputs(
    judge: Callable[..., list[str]], tools: Any, tmp_path: Path
) -> None:
    model = tools.two_products()
    del model.graph.output[:]
    judge(tools.save(tmp_path / "in", model), ("optimize", "plan", "expand"))


def test_nodes_in_any_order_are_sorted(
    onnxcomp: Callable[..., Any], tools: Any, tmp_path: Path
) -> None:
    model = tools.two_products()
    last = onnx.NodeProto.FromString(model.graph.node[1].SerializeToString())
    del model.graph.node[1]
    model.graph.node.insert(0, last)
    path = tools.save(tmp_path / "in", model)
    assert onnxcomp("optimize", path, "-o", tmp_path / "out.onnx").code == 0
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"))


def test_operators_of_unknown_domains_stay_and_are_no_obstacle(
    onnxcomp: Callable[..., Any], tools: Any, tmp_path: Path
) -> None:
    model = tools.two_products()
    model.graph.node[0].domain = "some.vendor"
    model.opset_import.append(helper.make_opsetid("some.vendor", 3))
    path = tools.save(tmp_path / "in", model)
    message = onnxcomp("optimize", path, "-o", tmp_path / "out.onnx").refused(6)
    assert "some.vendor::" in message
    assert not (tmp_path / "out.onnx").exists()
    done = onnxcomp("optimize", path, "-o", tmp_path / "out.onnx", "--no-verify")
    assert done.code == 0, done.err
    assert onnx.load(tmp_path / "out.onnx").graph.node[-1].op_type == "HyperMatMul"


@pytest.mark.parametrize("opset", [None, 6])
def test_operator_sets_that_are_too_old_or_absent_are_a_reason_to_keep_weights(
    onnxcomp: Callable[..., Any], tools: Any, tmp_path: Path, opset: int | None
) -> None:
    path = tools.save(tmp_path / "in", tools.two_products(opset=opset))
    done = onnxcomp("optimize", path, "-o", tmp_path / "out.onnx", "--no-verify", "--json")
    assert done.code == 0, done.err
    reasons = {site["name"]: site["reason"] for site in done.json["sites"]}
    assert "operator set" in reasons["w"] and done.json["coverage"] == 0.0


def _with(value: float) -> np.ndarray[Any, Any]:
    weight = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    weight[3, 5] = value
    return weight


KEPT = {
    "NaN": (_with(np.nan), "NaN"),
    "infinite": (_with(-np.inf), "infinite"),
    "no elements": (np.zeros((0, 256), np.float32), "empty: a dimension is 0"),
}


@pytest.mark.parametrize("kind", KEPT)
def test_weights_that_cannot_be_stored_in_bits_stay_as_they_are(
    onnxcomp: Callable[..., Any], tools: Any, tmp_path: Path, kind: str
) -> None:
    weight, reason = KEPT[kind]
    path = tools.save(tmp_path / "in", tools.two_products(weight))
    # An infinite activation is infinite in dense products and NaN in rotated ones: not compared.
    words = ("optimize", path, "-o", tmp_path / "out.onnx", "--no-verify", "--json")
    done = onnxcomp(*words)
    assert done.code == 0, done.err
    sites = {site["name"]: site for site in done.json["sites"]}
    assert sites["w"]["method"] == "dense" and reason in sites["w"]["reason"]
    assert sites["v"]["method"] == "hyper"
    kept = {t.name: t for t in onnx.load(tmp_path / "out.onnx").graph.initializer}["w"]
    assert onnx.numpy_helper.to_array(kept).tobytes() == weight.tobytes()


def test_names_with_control_characters_do_not_reach_the_terminal(
    onnxcomp: Callable[..., Any], tools: Any, tmp_path: Path
) -> None:
    model = tools.two_products()
    evil = "w\n\x1b[31m../../etc"
    model.graph.initializer[0].name = evil
    model.graph.node[0].input[1] = evil
    path = tools.save(tmp_path / "in", model)
    for words in (("inspect", path, "-v"), ("optimize", path, "-o", tmp_path / "out.onnx")):
        done = onnxcomp(*words)
        assert done.code == 0 and "\x1b" not in done.out + done.err
    assert sorted(item.name for item in tmp_path.iterdir()) == ["in", "out.onnx"]
    model.graph.node[0].input[0] = evil + "absent"
    assert "\x1b" not in onnxcomp("inspect", tools.save(tmp_path / "in", model)).refused(5)


@pytest.mark.parametrize("name", [b"MatMul", b"first"])
def test_names_that_are_no_text(
    onnxcomp: Callable[..., Any], tools: Any, tmp_path: Path, name: bytes
) -> None:
    model = tools.two_products()
    model.graph.node[0].name = "first"
    data = model.SerializeToString()
    assert name in data
    (tmp_path / "in.onnx").write_bytes(data.replace(name, b"\xd6" * len(name)))
    assert "not a string" in onnxcomp("inspect", tmp_path / "in.onnx").refused(5)
