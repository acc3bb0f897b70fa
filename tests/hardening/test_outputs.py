"""Outputs that cannot or must not be written: a reason, the right code, and no stray files."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest


def _is_listed(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize("verb", ["optimize", "expand"])
@pytest.mark.parametrize("place", ["file", "absent", "proc"])
def test_a_place_that_cannot_be_written_to(
    onnxcomp: Callable[..., Any], small: Path, tmp_path: Path, verb: str, place: str
) -> None:
    (tmp_path / "file").write_text("a file, not a folder")
    folder = Path("/proc") if place == "proc" else tmp_path / place
    if place == "proc" and not folder.is_dir():
        pytest.skip("no /proc")
    message = onnxcomp(verb, small, "-o", folder / "out.onnx").refused(2)
    assert str(folder) in message
    assert _is_listed(tmp_path, "file")
    (tmp_path / "folder").mkdir()
    assert onnxcomp(verb, small, "-o", tmp_path / "folder").code == 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_write_permission(
    onnxcomp: Callable[..., Any], small: Path, tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    onnxcomp("optimize", small, "-o", tmp_path / "locked" / "out.onnx").refused(2)


@pytest.mark.parametrize("verb", ["optimize", "expand"])
@pytest.mark.parametrize("name", ["link", "same", "hard"])
def test_the_input_is_never_the_output(
    onnxcomp: Callable[..., Any], tools: Any, tmp_path: Path, verb: str, name: str
) -> None:
    path = tools.save(tmp_path / "in", tools.two_products())
    output = path
    if name == "link":
        output = tmp_path / "in" / "link.onnx"
        output.symlink_to("model.onnx")
    before = tools.contents(tmp_path)
    if name == "hard":  # another name of the same bytes: replaced, the input keeps them
        output = tmp_path / "in" / "hard.onnx"
        output.hardlink_to(path)
        assert onnxcomp(verb, path, "-o", output).code == 0
        assert before.items() <= tools.contents(tmp_path).items()
        return
    assert "is the input" in onnxcomp(verb, path, "-o", output).refused(2)
    assert tools.contents(tmp_path) == before


@pytest.mark.parametrize("verb", ["optimize", "expand"])
def test_the_data_of_the_input_is_never_overwritten(
    onnxcomp: Callable[..., Any], tools: Any, tmp_path: Path, verb: str
) -> None:
    path = tools.save(tmp_path, tools.two_products(), external=True)
    path.with_name("model.data").rename(tmp_path / "out.onnx.data")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = "out.onnx.data"
    path.write_bytes(model.SerializeToString())
    before = tools.contents(tmp_path)
    words = (verb, path, "-o", tmp_path / "out.onnx", "--external-data", "always")
    assert "is the input" in onnxcomp(*words).refused(2)
    assert tools.contents(tmp_path) == before


@pytest.mark.parametrize("length", [120, 244])
def test_long_names_of_outputs_work(
    onnxcomp: Callable[..., Any], small: Path, tmp_path: Path, length: int
) -> None:
    output = tmp_path / ("o" * length + ".onnx")
    assert onnxcomp("optimize", small, "-o", output).code == 0
    assert onnxcomp("optimize", small, "-o", tmp_path / ("o" * 300 + ".onnx")).refused(2)
    assert _is_listed(tmp_path, output.name)


# Bytes of the output: 80 KB with one file, 18 KB for its own tensors.
@pytest.mark.parametrize("limit", [100, 5000, 30000])
@pytest.mark.parametrize("verb", ["optimize", "expand"])
def test_a_file_size_limit(
    spawn: Callable[..., Any], small: Path, tmp_path: Path, limit: int, verb: str
) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words: list[object] = [verb, small, "-o", tmp_path / "out.onnx"]
    words += ["--bits", "6"] if verb == "optimize" else []
    done = spawn(*words, preexec_fn=limited)
    if done.code == 0:
        assert limit == 30000 and _is_listed(tmp_path, "out.onnx")
        return
    assert "cannot write" in done.refused(2)
    assert _is_listed(tmp_path)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(onnxcomp: Callable[..., Any], slow: Path, tiny_disk: Path) -> None:
    for words in (("optimize", "--bits", 4, "--external-data", "always"), ("expand",)):
        done = onnxcomp(*words[:1], slow, "-o", tiny_disk / "out.onnx", *words[1:])
        assert "cannot write" in done.refused(2)
        assert _is_listed(tiny_disk)


def test_a_cache_on_a_full_disk_is_done_without(
    onnxcomp: Callable[..., Any], slow: Path, tiny_disk: Path, tmp_path: Path
) -> None:
    words = ("optimize", slow, "-o", tmp_path / "out.onnx", "--no-verify", "--include", "^w0$")
    assert onnxcomp(*words, "--cache", tiny_disk / "cache").code == 0
    assert not list((tiny_disk / "cache").glob("*.part"))
    onnxcomp(*words, "--cache", "/proc/nowhere").refused(2)


def test_stdout_that_is_full_or_closed(spawn: Callable[..., Any], small: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    for words in (("inspect", small, "--json"), ("plan", small)):
        with open("/dev/full", "w") as full:
            done = spawn(*words, stdout=full)
        assert "Traceback" not in done.err and "Exception ignored" not in done.err
        assert done.code == 2 and "No space left" in done.err, done
    reader, writer = os.pipe()
    os.close(reader)
    done = spawn("inspect", small, "--json", "-q", stdout=writer)
    os.close(writer)
    assert done.code == 141 and not done.err.strip()


def test_two_runs_into_one_output_leave_a_whole_model(
    command: Callable[..., Any], spawn: Callable[..., Any], slow: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.onnx"
    words = ("optimize", slow, "-o", output, "--external-data", "always", "--no-verify")
    running = [command(*words, "--bits", bits) for bits in (2, 3)]
    for process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert _is_listed(tmp_path, "out.onnx", "out.onnx.data")
    done = spawn("expand", output, "-o", tmp_path / "dense.onnx")
    assert done.code == 0, done.err


def test_the_data_file_of_a_replaced_model_goes_with_it(
    onnxcomp: Callable[..., Any], small: Path, tmp_path: Path
) -> None:
    output, data = tmp_path / "out.onnx", tmp_path / "out.onnx.data"
    assert onnxcomp("optimize", small, "-o", output, "--external-data", "always").code == 0
    assert data.is_file()
    assert onnxcomp("optimize", small, "-o", output, "--external-data", "never").code == 0
    assert _is_listed(tmp_path, "out.onnx")
    data.write_bytes(b"of somebody else")
    assert onnxcomp("optimize", small, "-o", output).code == 0
    assert onnxcomp("expand", small, "-o", output).code == 0
    assert data.read_bytes() == b"of somebody else"


@pytest.mark.parametrize("command", [("verify", 2), ("bench", 1)])
@pytest.mark.parametrize("dims", [[2], ["n"]])
def test_a_model_without_outputs_is_an_invalid_input(
    onnxcomp: Callable[..., Any], tmp_path: Path, command: tuple[str, int], dims: list[Any]
) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, dims)
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value], [])
    path = tmp_path / "model.onnx"
    imports = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    verb, count = command
    assert "has no outputs" in onnxcomp(verb, *[path] * count).refused(5)
