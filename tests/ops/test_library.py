"""The library as a file: how it is found, what it exports, which runtimes load it."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from onnxcomp.errors import RuntimeMissingError
from onnxcomp.ops import library_path, register

F32 = TensorProto.FLOAT


def test_a_missing_library_is_reported_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNXCOMP_OPS_LIBRARY", str(tmp_path / "absent.so"))
    with pytest.raises(RuntimeMissingError, match=r"absent\.so does not exist") as caught:
        library_path()
    assert "ONNXCOMP_OPS_LIBRARY" in caught.value.hint


def test_a_file_that_is_no_library_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    (tmp_path / "broken.so").write_bytes(b"not a library")
    monkeypatch.setenv("ONNXCOMP_OPS_LIBRARY", str(tmp_path / "broken.so"))
    with pytest.raises(RuntimeMissingError, match="cannot load"):
        register(onnxruntime.SessionOptions())


def test_only_what_the_runtime_calls_and_the_cuda_functions_are_exported(library: Path) -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    command = [nm, "-D", "--defined-only", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in listing.splitlines()}
    assert {name for name in names if not name.startswith("onnxcomp_cuda_")} == {
        "RegisterCustomOps",
        "CreateEpFactories",
        "ReleaseEpFactory",
    }


def test_the_library_stays_loaded_after_its_last_session(
    hyper: Any, open_session: Callable[..., Any], library: Path
) -> None:
    weight = hyper.random_weight(16, 32, group=32)
    model = hyper.make_model("HyperDecode", weight, None)
    for _ in range(3):
        session = open_session(model)
        np.testing.assert_array_equal(session.run(None, {})[0], weight.dense())
        del session
    assert library.name in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("precision", [0, 1])
@pytest.mark.parametrize("m", [1, 5, 200])
def test_two_threads_give_the_bits_of_one(
    hyper: Any, open_session: Callable[..., Any], precision: int, m: int
) -> None:
    weight = hyper.random_weight(500, 700)
    model = hyper.make_model(
        "HyperMatMul", weight, (F32, [None, None]), attributes={"precision": precision}
    )
    x = np.random.default_rng(1).normal(size=(m, 700)).astype(np.float32)
    one = open_session(model, threads=1).run(None, {"x": x})[0]
    for threads in (2, 3):
        np.testing.assert_array_equal(open_session(model, threads).run(None, {"x": x})[0], one)


def test_eight_threads_share_one_session(hyper: Any, open_session: Callable[..., Any]) -> None:
    weight = hyper.random_weight(130, 300)
    model = hyper.make_model(
        "HyperMatMul", weight, (F32, [None, None]), attributes={"precision": 1}
    )
    session = open_session(model, threads=2)
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for step in range(10):
            x = rng.normal(size=(1 + step * 3, 300)).astype(np.float32)
            if not np.array_equal(session.run(None, {"x": x})[0], hyper.product_int8(x, weight)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


_VERSION_SCRIPT = """
import sys
import numpy as np
import onnxruntime as ort

options = ort.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
feeds = dict(np.load(sys.argv[3]))
want = feeds.pop("want")
session = ort.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
assert session.get_outputs()[0].shape == ["batch", 40], session.get_outputs()[0].shape
assert np.array_equal(session.run(None, feeds)[0], want)
try:
    session.run(None, {"x": feeds["x"][:, 1:]})
except Exception as error:
    assert "200" in str(error), error
else:
    raise AssertionError("a bad shape was accepted")
print(ort.__version__, "ok")
"""


def test_other_releases_of_the_runtime_load_the_same_library(
    hyper: Any, library: Path, tmp_path: Path
) -> None:
    pythons = os.environ.get("ONNXCOMP_ORT_PYTHONS", "")
    if not pythons:
        pytest.skip("ONNXCOMP_ORT_PYTHONS names no interpreters with other ONNX Runtime releases")
    weight = hyper.random_weight(40, 200)
    model = hyper.make_model(
        "HyperMatMul", weight, (F32, ["batch", "length"]), attributes={"precision": 1}
    )
    onnx.save(model, tmp_path / "model.onnx")
    x = np.random.default_rng(5).normal(size=(3, 200)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, want=hyper.product_int8(x, weight))
    for python in pythons.split(":"):
        command = [python, "-c", _VERSION_SCRIPT, str(library)]
        command += [str(tmp_path / "model.onnx"), str(tmp_path / "data.npz")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith("ok")


_MAPPED_SCRIPT = """
import sys
import numpy as np
import onnxruntime as ort

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.register_custom_ops_library(sys.argv[1])
x = np.ones((1, 8192), np.float32)
before = anonymous()
session = ort.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
session.run(None, {"x": x})
print(anonymous() - before)
"""


def test_codes_in_a_mapped_file_are_used_in_place(
    hyper: Any, library: Path, tmp_path: Path
) -> None:
    import sys

    weight = hyper.random_weight(8192, 8192, bits=4)
    model = hyper.make_model("HyperMatMul", weight, (F32, [None, 8192]))
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, size_threshold=1024)
    command = [sys.executable, "-c", _MAPPED_SCRIPT, str(library), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < weight.codes.nbytes // 2
