"""Packages hold all that a model needs, say so in a manifest, and replace nothing by accident."""

import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcomp import InferenceSession, package
from onnxcomp.errors import ModelError, RuntimeMissingError, UsageError
from onnxcomp.runtime.package import Package
from onnxcomp.runtime.package.contents import gather
from onnxcomp.runtime.package.triton import Server, config_text

SaveModel = Callable[..., Path]
FLOAT = TensorProto.FLOAT


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def check_hashes(made: Package) -> None:
    written = json.loads((made.path / "onnxcomp.json").read_text(encoding="utf-8"))
    assert written == made.manifest
    assert sorted([*written["files"], "onnxcomp.json"]) == listing(made.path)
    for name, entry in written["files"].items():
        content = (made.path / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert not (made.path / name).is_symlink()


def interpreters() -> list[str]:
    return [sys.executable, *filter(None, os.environ.get("ONNXCOMP_ORT_PYTHONS", "").split(":"))]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("python", interpreters())
def test_a_folder_runs_with_onnx_runtime_and_numpy_alone(
    twins: tuple[Path, Path], tmp_path: Path, python: str
) -> None:
    made = package(twins[1], tmp_path / "bundle", shapes={"ids": (2, 5)})
    assert listing(made.path) == [
        "README.md", "inputs.npz", "libonnxcomp_ops.so", "model.onnx", "onnxcomp.json", "run.py",
    ]  # fmt: skip
    check_hashes(made)
    assert made.manifest["operators"] == {"HyperGather": 1, "HyperMatMul": 1}
    assert made.manifest["portable"] and not made.notes
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for _ in range(2):  # with the library, and without
        run = subprocess.run(
            [python, "run.py"], cwd=made.path, env=environment, capture_output=True, text=True
        )
        assert run.stdout == "logits (2, 5, 40)\n", run.stderr
        (made.path / "libonnxcomp_ops.so").unlink(missing_ok=True)


@pytest.mark.usefixtures("library")
def test_data_files_come_along_through_links(twins: tuple[Path, Path], tmp_path: Path) -> None:
    store, cache = tmp_path / "store", tmp_path / "cache"
    store.mkdir()
    cache.mkdir()
    onnx.save(onnx.load(twins[1]), store / "m.onnx", save_as_external_data=True,
              location="weights.bin", size_threshold=0)  # fmt: skip
    for name in ("m.onnx", "weights.bin"):
        (cache / name).symlink_to(store / name)
    made = package(cache / "m.onnx", tmp_path / "bundle")
    assert {"model.onnx", "weights.bin"} <= made.manifest["files"].keys()
    check_hashes(made)
    shutil.rmtree(store)
    assert InferenceSession(made.path / "model.onnx") is not None


def test_a_model_without_own_operators_needs_no_library(
    twins: tuple[Path, Path], tmp_path: Path
) -> None:
    made = package(twins[0], tmp_path / "bundle")
    assert made.manifest["library"] is None
    assert "needs no operator library" in (made.path / "README.md").read_text()
    assert "model_operations" not in config_text(gather(twins[0], portable=False), Server(), "m")


def test_portable_packages_do_without_the_library(twins: tuple[Path, Path], tmp_path: Path) -> None:
    made = package(twins[1], tmp_path / "bundle", portable=True)
    assert "libonnxcomp_ops.so" not in listing(made.path)
    bare = onnx.load(twins[1])
    del bare.functions[:]
    onnx.save(bare, tmp_path / "bare.onnx")
    with pytest.raises(UsageError, match="no definitions of HyperGather, HyperMatMul"):
        package(tmp_path / "bare.onnx", tmp_path / "other", portable=True)


@pytest.mark.usefixtures("no_library")
def test_a_missing_library_is_an_error(twins: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RuntimeMissingError):
        package(twins[1], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_the_folder_is_replaced_only_when_it_is_ours_and_force_is_given(
    twins: tuple[Path, Path], tmp_path: Path
) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    package(twins[0], target)  # an empty folder holds nothing to lose
    (target / "mark").touch()
    with pytest.raises(UsageError, match="exists already") as caught:
        package(twins[0], target)
    assert "--force" in caught.value.hint and (target / "mark").exists()
    package(twins[0], target, force=True)
    assert not (target / "mark").exists()
    (target / "onnxcomp.json").unlink()
    with pytest.raises(UsageError, match="not a package of onnxcomp"):
        package(twins[0], target, force=True)
    with pytest.raises(UsageError, match="does not exist"):
        package(twins[0], tmp_path / "absent" / "bundle")


@pytest.mark.parametrize("kind", ["dir", "triton"])
def test_a_failure_leaves_what_was_there(
    twins: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    target = tmp_path / "bundle"
    package(twins[0], target, kind)
    before = listing(tmp_path)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(UsageError, match="No space left"):
        package(twins[0], target, kind, force=True)
    with pytest.raises(UsageError, match="No space left"):
        package(twins[0], tmp_path / "new", kind)
    assert listing(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"bundle"}


def test_data_outside_the_folder_are_refused(save_model: SaveModel, tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    values = {"x": (FLOAT, ["n", 4])}, {"y": (FLOAT, ["n", 4])}
    path = save_model(nodes, *values, {"w": np.ones((4, 4), np.float32)})
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "m.onnx").write_bytes(path.read_bytes().replace(b"w.bin", b"../w."))
    with pytest.raises(ModelError, match="cannot be packaged"):
        package(tmp_path / "inner" / "m.onnx", tmp_path / "bundle")
    onnx.save(onnx.load(path), tmp_path / "m.onnx", save_as_external_data=True, location="run.py",
              size_threshold=0)  # fmt: skip
    with pytest.raises(ModelError, match=r"'run\.py'"):
        package(tmp_path / "m.onnx", tmp_path / "bundle")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="no /proc")
@pytest.mark.parametrize("kind", ["dir", "triton"])
def test_a_place_that_cannot_be_written_to(twins: tuple[Path, Path], kind: str) -> None:
    with pytest.raises(UsageError, match="cannot write /proc/bundle"):
        package(twins[0], "/proc/bundle", kind)


# Triton


@pytest.fixture(scope="module")
def parse() -> Iterator[Callable[[str], Any]]:
    """Triton's own protobuf reads the configuration."""
    from google.protobuf import text_format

    try:
        files = metadata.files("tritonclient") or []
    except metadata.PackageNotFoundError:
        pytest.skip("tritonclient is not installed: pip install '.[test]'")
    (path,) = [file.locate() for file in files if str(file).endswith("grpc/model_config_pb2.py")]
    # By its path: the package around it needs a network library.
    spec = importlib.util.spec_from_file_location("model_config_pb2", str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield lambda text: text_format.Parse(text, module.ModelConfig())


def shapes_the_backend_accepts(config: Any, session: Any) -> bool:
    """What the backend compares when it loads a model: outputs exactly, inputs where fixed."""
    for values, entries in (
        (session.get_inputs(), config.input),
        (session.get_outputs(), config.output),
    ):
        given = {
            entry.name: list(entry.reshape.shape if entry.HasField("reshape") else entry.dims)
            for entry in entries
        }
        for value in values:
            shape = [size if isinstance(size, int) else -1 for size in value.shape]
            dims = given.pop(value.name)
            if config.max_batch_size > 0:
                dims = [-1, *dims]
            if dims != shape and not (shape == [] and dims == [1]):
                return False
        if given:
            return False
    return True


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("batch", [0, 8])
def test_the_triton_configuration_is_read_back_by_triton(
    twins: tuple[Path, Path], tmp_path: Path, parse: Callable[[str], Any], batch: int
) -> None:
    made = package(
        twins[1], tmp_path / "repository", "triton", name="lm", mount_prefix="/mnt/models/",
        max_batch_size=batch, model_version=3, instances=2, target="cuda",
    )  # fmt: skip
    assert made.path == tmp_path / "repository" / "lm"
    assert "--external-data always" in made.notes[-1]
    assert listing(made.path) == [
        "3/libonnxcomp_ops.so", "3/model.onnx", "README.md", "config.pbtxt", "onnxcomp.json",
    ]  # fmt: skip
    check_hashes(made)
    config = parse((made.path / "config.pbtxt").read_text(encoding="utf-8"))
    assert (config.name, config.backend, config.default_model_filename) == (
        "lm", "onnxruntime", "model.onnx",
    )  # fmt: skip
    library = "/mnt/models/lm/3/libonnxcomp_ops.so"
    assert list(config.model_operations.op_library_filename) == [library]
    assert config.max_batch_size == batch and config.HasField("dynamic_batching") == bool(batch)
    assert [(g.count, g.kind) for g in config.instance_group] == [(2, 1)]
    assert list(config.input[0].dims) == ([-1] if batch else [-1, -1])
    assert shapes_the_backend_accepts(config, InferenceSession(made.path / "3" / "model.onnx"))
    assert "/mnt/models" in (made.path / "README.md").read_text(encoding="utf-8")


# The calls of Triton's backend, by their places in ONNX Runtime's table of functions.
BACKEND = """
import ctypes, sys
from pathlib import Path
import onnxruntime

runtime = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*"), None)
if runtime is None:
    sys.exit("no C library in this wheel")
base = ctypes.CDLL(str(runtime)).OrtGetApiBase
base.restype = ctypes.POINTER(ctypes.c_void_p)
table = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint32)(base()[0])(18)

def make(index, *arguments):
    made = ctypes.c_void_p()
    arguments = [*arguments, ctypes.byref(made)]
    kinds = [ctypes.c_void_p] * len(arguments)
    status = ctypes.CFUNCTYPE(ctypes.c_void_p, *kinds)(table[index])(*arguments)
    if status:
        sys.exit(ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(table[2])(status).decode())
    return made

environment, options = make(3, 3, b"triton"), make(10)  # CreateEnv, CreateSessionOptions
make(29, options, sys.argv[1].encode())                 # RegisterCustomOpsLibrary
make(7, environment, sys.argv[2].encode(), options)     # CreateSession
print("loaded")
"""


@pytest.mark.usefixtures("library")
def test_the_configured_path_loads_by_the_call_that_the_backend_makes(
    twins: tuple[Path, Path], tmp_path: Path, parse: Callable[[str], Any]
) -> None:
    bare = onnx.load(twins[1])
    del bare.functions[:]  # so that it loads with the library only
    onnx.save(bare, tmp_path / "bare.onnx")
    root = tmp_path / "repository"
    made = package(tmp_path / "bare.onnx", root, "triton", mount_prefix=str(root))
    config = parse((made.path / "config.pbtxt").read_text(encoding="utf-8"))
    (library,) = config.model_operations.op_library_filename
    model = str(made.path / "1" / config.default_model_filename)

    def load(library: str) -> str:
        command = [sys.executable, "-c", BACKEND, library, model]
        run = subprocess.run(command, cwd=made.path / "1", capture_output=True, text=True)
        return run.stdout + run.stderr

    answer = load(library)
    if "no C library" in answer:
        pytest.skip("this wheel of ONNX Runtime has no C library")
    assert answer == "loaded\n"
    # A bare file name is not looked for beside the model.
    assert "cannot open shared object file" in load(Path(library).name)


@pytest.mark.parametrize("batch", [0, 4])
def test_types_scalars_and_strange_names(
    save_model: SaveModel, parse: Callable[[str], Any], batch: int
) -> None:
    nodes = [
        helper.make_node("Cast", ['a "b"\\é'], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Identity", ["text"], ["same"]),
    ]
    inputs = {'a "b"\\é': (FLOAT, ["n"]), "text": (TensorProto.STRING, ["n", 2])}
    outputs = {"half": (TensorProto.FLOAT16, ["n"]), "same": (TensorProto.STRING, ["n", 2])}
    if not batch:
        nodes.append(helper.make_node("ReduceSum", ["half"], ["sum"], keepdims=0))
        outputs["sum"] = (TensorProto.FLOAT16, [])
    path = save_model(nodes, inputs, outputs)
    config = parse(config_text(gather(path, portable=False), Server(max_batch_size=batch), "m"))
    types = [entry.data_type for entry in (*config.input, *config.output)]
    assert types == [11, 13, 10, 13, 10][: 4 + (not batch)]
    assert config.input[0].name == 'a "b"\\é'
    assert shapes_the_backend_accepts(config, InferenceSession(path))


def test_what_triton_cannot_serve_is_refused(save_model: SaveModel, tmp_path: Path) -> None:
    fixed = save_model(
        [helper.make_node("Relu", ["x"], ["y"])], {"x": (FLOAT, [1, 4])}, {"y": (FLOAT, [1, 4])}
    )
    with pytest.raises(UsageError, match="input 'x' has the fixed shape"):
        package(fixed, tmp_path / "r", "triton", max_batch_size=2)
    listed = save_model([helper.make_node("SequenceConstruct", ["x"], ["y"])],
                        {"x": (FLOAT, [1, 4])}, {}, name="listed.onnx")  # fmt: skip
    model = onnx.load(listed)
    model.graph.output.append(helper.make_tensor_sequence_value_info("y", FLOAT, None))
    onnx.save(model, listed)
    with pytest.raises(UsageError, match="cannot serve output 'y', a seq"):
        package(listed, tmp_path / "r", "triton")
    unranked = onnx.load(fixed)
    for value in (*unranked.graph.input, *unranked.graph.output):
        value.type.tensor_type.ClearField("shape")
    onnx.save(unranked, tmp_path / "unranked.onnx")
    with pytest.raises(UsageError, match="how many dimensions 'x' has"):
        package(tmp_path / "unranked.onnx", tmp_path / "r", "triton")
    with pytest.raises(UsageError, match="cannot be the name of a model"):
        package(fixed, tmp_path / "r", "triton", name="../up")
    with pytest.raises(UsageError, match="not an absolute path"):
        package(fixed, tmp_path / "r", "triton", mount_prefix="models")
    with pytest.raises(UsageError, match="package kind 'tar' is unknown"):
        package(fixed, tmp_path / "r", "tar")
    assert not (tmp_path / "r").exists()


def test_a_repository_takes_several_models(twins: tuple[Path, Path], tmp_path: Path) -> None:
    package(twins[0], tmp_path / "r", "triton", name="a")
    package(twins[0], tmp_path / "r", "triton", name="b")
    with pytest.raises(UsageError, match="exists already"):
        package(twins[0], tmp_path / "r", "triton", name="a")
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == ["a", "b"]
