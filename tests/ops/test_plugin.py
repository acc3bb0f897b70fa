"""The library as a plugin execution provider, and the wheel around it."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "packaging" / "onnxruntime-ep-onnxcomp"
OLDEST = (1, 24)

VERSION = tuple(map(int, onnxruntime.__version__.split(".")[:2]))
needs_plugins = pytest.mark.skipif(
    VERSION < OLDEST,
    reason=f"ONNX Runtime {onnxruntime.__version__} asks providers for no operators, 1.24 does",
)

# Opens a model that needs the operators, by options made in one way; prints what came of it.
PROGRAM = """
import json, sys
import numpy as np
import onnxruntime as ort

library, model, way = sys.argv[1:]
ort.set_default_logger_severity(4)
ort.register_execution_provider_library("mine", library)
ours = [d for d in ort.get_ep_devices() if d.ep_name == "OnnxCompExecutionProvider"]
options = ort.SessionOptions()
for step in way.split():
    if step == "add":
        options.add_provider_for_devices(ours, {})
    elif step == "custom":
        options.register_custom_ops_library(library)
    elif step == "onnxcomp":
        import onnxcomp
        onnxcomp.register(options)
    elif step == "unregister":
        ort.unregister_execution_provider_library("mine")
        assert not [d for d in ort.get_ep_devices() if d.ep_vendor == "onnxcomp"]
        ort.register_execution_provider_library("other", library)
        ours = [d for d in ort.get_ep_devices() if d.ep_vendor == "onnxcomp"]
answer = {"devices": [[d.ep_vendor, d.device.type.name, d.ep_metadata] for d in ours]}
try:
    for _ in range(2):
        session = ort.InferenceSession(model, options)
    answer["providers"] = session.get_providers()
    answer["y"] = session.run(None, {"x": np.ones((1, 64), np.float32)})[0].tolist()
except Exception as error:
    answer["error"] = str(error)
print(json.dumps(answer))
"""

# What a program in C does: no provider is named, a policy chooses.
IN_C = """
import ctypes, sys
from pathlib import Path
import onnxruntime

runtime = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so*"), None)
if runtime is None:
    sys.exit("no C library in this wheel")
base = ctypes.CDLL(str(runtime)).OrtGetApiBase
base.restype = ctypes.POINTER(ctypes.c_void_p)
table = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint32)(base()[0])(24)

def call(index, *arguments):
    kinds = [ctypes.c_int if isinstance(a, int) else ctypes.c_void_p for a in arguments]
    status = ctypes.CFUNCTYPE(ctypes.c_void_p, *kinds)(table[index])(*arguments)
    if status:
        sys.exit(ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(table[2])(status).decode())

def make(index, *arguments):
    made = ctypes.c_void_p()
    call(index, *arguments, ctypes.byref(made))
    return made

environment, options = make(3, 3, b"c"), make(10)           # CreateEnv, CreateSessionOptions
call(301, environment, b"onnxcomp", sys.argv[1].encode())   # RegisterExecutionProviderLibrary
call(305, options, 1)                                       # SetEpSelectionPolicy, PREFER_CPU
make(7, environment, sys.argv[2].encode(), options)         # CreateSession
print("loaded")
"""


@pytest.fixture(scope="module")
def bare(hyper: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A product on codes, without definitions of its operators."""
    weight = hyper.random_weight(16, 64, group=32)
    model = hyper.make_model("HyperMatMul", weight, (onnx.TensorProto.FLOAT, [None, 64]))
    del model.functions[:]
    path = tmp_path_factory.mktemp("plugin") / "bare.onnx"
    onnx.save(model, path)
    return path


def run(library: Path, model: Path, way: str) -> dict[str, Any]:
    command = [sys.executable, "-c", PROGRAM, str(library), str(model), way]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@needs_plugins
@pytest.mark.parametrize(
    "way", ["add", "add custom", "custom add", "add onnxcomp", "onnxcomp add", "unregister add"]
)
def test_the_provider_brings_the_operators_once(
    way: str, library: Path, bare: Path, open_session: Callable[..., Any]
) -> None:
    answer = run(library, bare, way)
    assert "error" not in answer, answer["error"]
    assert answer["providers"][-1] == "CPUExecutionProvider"
    wanted = open_session(bare).run(None, {"x": np.ones((1, 64), np.float32)})[0]
    assert answer["y"] == wanted.tolist()


@needs_plugins
def test_registering_the_library_is_not_enough_for_the_runtime(library: Path, bare: Path) -> None:
    """If this fails, ONNX Runtime has become better: say so in docs/clients.md."""
    answer = run(library, bare, "")
    assert [device[:2] for device in answer["devices"]] == [["onnxcomp", "CPU"]]
    assert "com.onnxcomp" in answer["error"]


@needs_plugins
def test_a_selection_policy_is_enough_in_c(library: Path, bare: Path) -> None:
    command = [sys.executable, "-c", IN_C, str(library), str(bare)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "no C library" in done.stderr:
        pytest.skip("this wheel of ONNX Runtime has no C library")
    assert done.stdout == "loaded\n", done.stderr


def test_an_older_runtime_is_told_what_is_needed(library: Path) -> None:
    """By a table of functions of which the runtime has only the first: CreateStatus."""
    program = """
import ctypes, sys
said = []
Create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
create = Create(lambda code, text: said.append(text.decode()) or 1)
table = (ctypes.c_void_p * 1)(ctypes.cast(create, ctypes.c_void_p))
Get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
get = Get(lambda version: ctypes.addressof(table) if version <= 20 else None)
base = (ctypes.c_void_p * 2)(ctypes.cast(get, ctypes.c_void_p), None)
factories, made = (ctypes.c_void_p * 1)(), ctypes.c_size_t()
function = ctypes.CDLL(sys.argv[1]).CreateEpFactories
function.restype = ctypes.c_void_p
assert function(b"x", base, None, factories, ctypes.c_size_t(1), ctypes.byref(made)) == 1
print(*said)
"""
    command = [sys.executable, "-c", program, str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "needs ONNX Runtime 1.24 or newer" in done.stdout, done.stderr


def test_the_package_has_the_names_of_its_kind(library: Path, tmp_path: Path) -> None:
    copy = tmp_path / "onnxruntime_ep_onnxcomp"
    shutil.copytree(PROJECT / copy.name, copy, ignore=shutil.ignore_patterns("__pycache__"))
    spec = importlib.util.spec_from_file_location(copy.name, copy / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(RuntimeError, match="holds no library"):
        module.get_library_path()
    shutil.copy(library, copy / "libonnxcomp_ops.so")
    assert module.get_library_path() == str(copy / "libonnxcomp_ops.so")
    name = re.search(r'kName = "(\w+)"', (ROOT / "ops" / "plugin.cc").read_text())
    assert name is not None
    assert module.get_ep_names() == [module.get_ep_name()] == [name[1]]
    header = (ROOT / "ops" / "common" / "custom_op.h").read_text()
    assert f'"ep.{name[1].lower()}.operators"' in header


def test_both_projects_have_one_version() -> None:
    found = {
        re.search(r'^version = "(.+?)"', (folder / "pyproject.toml").read_text(), re.MULTILINE)[1]
        for folder in (ROOT, PROJECT)
    }
    assert len(found) == 1
