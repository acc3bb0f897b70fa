"""Archives give back every byte, say what they gain, and are refused when a byte is wrong."""

import json
import lzma
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp as oc
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.runtime.package import archive_format, archives
from onnxcomp.runtime.package.tensor_bytes import places

SaveModel = Callable[..., Path]
FLOAT = TensorProto.FLOAT
RNG = np.random.default_rng(5)


@pytest.fixture
def dense(save_model: SaveModel) -> Path:
    """A product with a float32 weight, and a float16 one with an odd number of bytes behind it."""
    weights = {
        "w": RNG.standard_normal((96, 64)).astype(np.float32),
        "h": RNG.standard_normal((64, 32)).astype(np.float16),
        "b": RNG.integers(0, 255, 7).astype(np.uint8),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Cast", ["h"], ["f"], to=FLOAT),
        helper.make_node("MatMul", ["y", "f"], ["z"]),
        helper.make_node("Cast", ["b"], ["c"], to=FLOAT),
    ]
    shapes = {"z": (FLOAT, ["n", 32]), "c": (FLOAT, [7])}
    return save_model(nodes, {"x": (FLOAT, ["n", 96])}, shapes, weights)


def archived(model: Path, folder: Path) -> oc.Archive:
    made = oc.archive(model, folder / "model.ocarc")
    assert made.bytes == (folder / "model.ocarc").stat().st_size
    restored = oc.restore(folder / "model.ocarc", folder / "restored")
    assert restored.files == made.files
    for name, entry in made.files.items():
        content = (model.parent / name).read_bytes()
        assert (folder / "restored" / name).read_bytes() == content
        assert entry["bytes"] == len(content)
    return made


def test_every_byte_comes_back(dense: Path, tmp_path: Path) -> None:
    made = archived(dense, tmp_path)
    assert made.model == "model.onnx" and list(made.files) == ["model.onnx"]
    assert {"graph", "1 byte", "2 bytes", "4 bytes"} <= made.streams.keys()
    assert made.streams["4 bytes"]["stored"] < 0.92 * made.streams["4 bytes"]["bytes"]
    assert made.gain > 0.05 and not made.notes


def test_external_data_of_several_blocks_come_back(
    save_model: SaveModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks end within tensors; padding and what no tensor says stands between them."""
    monkeypatch.setattr(archive_format, "BLOCK", 1 << 12)
    monkeypatch.setattr(archives, "BLOCK", 1 << 12)
    weight = RNG.standard_normal((5000, 3)).astype(np.float16)
    path = save_model(
        [helper.make_node("Cast", ["w"], ["y"], to=FLOAT)], {}, {"y": (FLOAT, [5000, 3])},
        {"w": weight},
    )  # fmt: skip
    model = onnx.load(path)
    folder = tmp_path / "external"
    (folder / "data").mkdir(parents=True)
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="data/w.bin",
              size_threshold=0)  # fmt: skip
    with (folder / "data" / "w.bin").open("ab") as file:
        file.write(b"behind")
    made = archived(folder / "m.onnx", tmp_path)
    assert list(made.files) == ["m.onnx", "data/w.bin"]
    assert made.streams["2 bytes"]["bytes"] == weight.nbytes


def test_codes_have_no_entropy_to_lose(save_model: SaveModel, tmp_path: Path) -> None:
    codes = RNG.integers(0, 256, 1 << 19).astype(np.uint8)
    path = save_model(
        [helper.make_node("Cast", ["w"], ["y"], to=FLOAT)], {}, {"y": (FLOAT, [1 << 19])},
        {"w": codes},
    )  # fmt: skip
    made = archived(path, tmp_path)
    assert made.bytes < made.model_bytes + 400
    assert made.gain < 0.03
    (note,) = made.notes
    assert "no entropy" in note and "100 %" in note


def test_numbers_are_found_wherever_tensors_are(tmp_path: Path) -> None:
    arrays = [RNG.standard_normal(10 + n).astype(np.float32) for n in range(4)]
    tensors = [numpy_helper.from_array(array, f"t{n}") for n, array in enumerate(arrays)]
    constant = helper.make_node("Constant", [], ["c"], value=tensors[1])
    inner = helper.make_graph([constant], "inner", [], [
        helper.make_tensor_value_info("c", FLOAT, [11])])  # fmt: skip
    node = helper.make_node("If", ["yes"], ["y"], then_branch=inner, else_branch=inner)
    body = helper.make_node("Constant", [], ["o"], value=tensors[2])
    function = helper.make_function("d", "f", [], ["o"], [body], [helper.make_opsetid("", 17)])
    plain = helper.make_tensor("t3", FLOAT, [13], arrays[3])  # float_data, not raw bytes
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("yes", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("y", FLOAT, [11])], [tensors[0], plain],
    )  # fmt: skip
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, functions=[function]), path)
    content = path.read_bytes()
    found = [content[start:stop] for start, stop, width in places(path)[""] if width == 4]
    expected = [arrays[n].tobytes() for n in (0, 1, 1, 2, 3)]
    assert sorted(found) == sorted(expected)


def test_a_cut_archive_is_refused(dense: Path, tmp_path: Path) -> None:
    made = oc.archive(dense, tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    for size in {0, 4, 8, 12, 60, made.bytes // 3, made.bytes // 2, made.bytes - 1}:
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(ModelError):
            oc.restore(tmp_path / "cut", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    (tmp_path / "cut").write_bytes(content + b"x")
    with pytest.raises(ModelError, match="behind its end"):
        oc.restore(tmp_path / "cut", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "cut", "model.onnx"]


def test_a_byte_that_changed_is_noticed(dense: Path, tmp_path: Path) -> None:
    oc.archive(dense, tmp_path / "a")
    content = (tmp_path / "a").read_bytes()
    for position in {*range(40), *range(40, len(content), 211), len(content) - 1}:
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        (tmp_path / "b").write_bytes(damaged)
        with pytest.raises(ModelError):
            oc.restore(tmp_path / "b", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def with_header(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """An archive whose header says something else, with a checksum that fits."""
    start = len(archive_format.MAGIC) + 8
    size, _ = struct.unpack("<II", content[start - 8 : start])
    header = json.loads(lzma.decompress(content[start : start + size]))
    change(header)
    stored = lzma.compress(json.dumps(header).encode())
    words = struct.pack("<II", len(stored), zlib.crc32(stored))
    return archive_format.MAGIC + words + stored + content[start + size :]


def rename(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.update(files={name: header["files"]["model.onnx"]})


def first_extent(*values: int) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header["streams"][0]["extents"][0] = list(values)

    return change


@pytest.mark.parametrize(
    "change",
    [
        rename("../model.onnx"),
        rename("/tmp/model.onnx"),
        rename("a/../../model.onnx"),
        rename(""),
        first_extent(0, 1, 5),
        first_extent(0, 0, -5),
        first_extent(7, 0, 5),
        lambda header: header["streams"].pop(),
        lambda header: header["streams"][0].update(width=3),
        lambda header: header["files"]["model.onnx"].update(sha256="0" * 64),
        lambda header: header["files"]["model.onnx"].update(bytes="many"),
        lambda header: header.pop("streams"),
        lambda header: header.update(format=2),
    ],
)
def test_a_header_that_lies_writes_nothing(
    dense: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    oc.archive(dense, tmp_path / "a")
    (tmp_path / "b").write_bytes(with_header((tmp_path / "a").read_bytes(), change))
    home = tmp_path / "home"
    home.mkdir()
    with pytest.raises(ModelError):
        oc.restore(tmp_path / "b", home / "out")
    assert not any(home.iterdir())


def test_nothing_is_replaced_by_accident(dense: Path, tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists already"):
        oc.archive(dense, target)
    assert target.read_bytes() == b"mine"
    with pytest.raises(UsageError, match="cannot become"):
        oc.archive(dense, dense, force=True)
    with pytest.raises(UsageError, match="does not exist"):
        oc.archive(dense, tmp_path / "none" / "a")
    oc.archive(dense, target, force=True)
    (tmp_path / "out").mkdir()
    oc.restore(target, tmp_path / "out")  # an empty folder may be filled
    with pytest.raises(UsageError, match="exists already"):
        oc.restore(target, tmp_path / "out")
    with pytest.raises(ModelError, match="not an archive"):
        oc.restore(dense, tmp_path / "other")
    with pytest.raises(ModelError, match="cannot read"):
        oc.restore(tmp_path / "none", tmp_path / "other")


def test_a_model_that_changes_meanwhile_is_not_archived(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = archives._streams

    def slow(*given: Any) -> Any:
        dense.write_bytes(dense.read_bytes()[:-1] + b"?")
        return streams(*given)

    monkeypatch.setattr(archives, "_streams", slow)
    with pytest.raises(ModelError, match="changed"):
        oc.archive(dense, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_planes_are_put_together_again(width: int) -> None:
    for size in (0, 1, width, 3 * width + width - 1, 64 * width):
        data = RNG.bytes(size)
        assert archive_format._joined(archive_format._split(data, width), width) == data
