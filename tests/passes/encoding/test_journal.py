"""Calibrated runs that were interrupted or killed continue where they were, to the same bytes."""

import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.passes.conftest import build, weight

import onnxcomp
from onnxcomp.passes.calibration.segmented_run import Chain
from onnxcomp.passes.codecs.hyper.codec import HyperCodec
from onnxcomp.passes.encoding import journal
from onnxcomp.passes.encoding.stored_arrays import read_arrays, storable, write_arrays

Array = npt.NDArray[Any]
Model = tuple[Path, dict[str, Any]]

# Two convolutions that read one value, with offsets of their own, one behind a normalisation.
PICTURES = """
pictures (float[n, 16, 8, 8] x) => (float[n, 32] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    ar = Relu (a)
    c = Conv <pads = [1, 1, 1, 1]> (ar, w2)
    d = Conv <pads = [1, 1, 1, 1]> (ar, w3, b3)
    cn = BatchNormalization (c, scale, shift, mean, var)
    e = Add (cn, d)
    er = Relu (e)
    f = Conv (er, w4, b4)
    g = ReduceMean <axes = [2, 3], keepdims = 0> (f)
    y = MatMul (g, w5)
}
"""


class _InterruptedError(Exception):
    pass


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many weights were calibrated and how many pieces of the model ran."""
    found: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(HyperCodec, "encode_calibrated")
    count(Chain, "advance")
    monkeypatch.setattr(journal, "_PATIENCE", 0.0)
    return found


@pytest.fixture(scope="module")
def decoder(decoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A decoder with a table that is looked up and multiplied, and inputs."""
    model, data = decoder_folder / "model.onnx", tmp_path_factory.mktemp("data") / "data.npz"
    ids = np.random.default_rng(0).integers(0, 320, (20, 12))
    cache = np.zeros((20, 2, 0, 16), np.float32)
    names = [value.name for value in onnx.load(model, load_external_data=False).graph.input]
    feeds = {name: cache for name in names if name.startswith("past_key_values.")}
    feeds |= {"input_ids": ids, "attention_mask": np.ones((20, 12), np.int64)}
    feeds |= {"position_ids": np.tile(np.arange(12), (20, 1))} if "position_ids" in names else {}
    np.savez(data, **feeds)
    return model, {"data": data, "bits": 3}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Convolutions whose offsets are shifted, and inputs."""
    folder = tmp_path_factory.mktemp("pictures")
    shapes = {"w1": (32, 16, 3, 3), "w2": (32, 32, 3, 3), "w3": (32, 32, 3, 3)}
    shapes |= {"w4": (64, 32, 1, 1), "w5": (64, 32)}
    weights = {name: weight(*shape) / 8 for name, shape in shapes.items()}
    weights |= {name: weight(size) for name, size in (("b1", 32), ("b3", 32), ("b4", 64))}
    weights |= {name: weight(32, seed=1) for name in ("scale", "shift", "mean")}
    weights |= {"var": np.ones(32, np.float32)}
    onnx.save(build(PICTURES, weights), folder / "model.onnx")
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", x=rng.uniform(0, 1, (20, 16, 8, 8)).astype(np.float32))
    return folder / "model.onnx", {"data": folder / "data.npz", "bits": 2}


def compress(model: Model, out: Path, cache: Path | None, stop: int = 0, **more: Any) -> bytes:
    """The bytes of a run, which ends at a call of its progress where that is asked for."""
    calls = 0

    def progress(done: int, total: int, name: str) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise _InterruptedError

    options = {"tune": 0, "min_size": 1 << 10, "jobs": 1, "verify": False, **model[1], **more}
    onnxcomp.optimize(model[0], out, cache=cache, progress=progress, **options)
    return out.read_bytes()


def endings(cache: Path) -> Counter[str]:
    return Counter(path.suffix for path in cache.iterdir())


@pytest.mark.parametrize(
    ("name", "mode", "stops"),
    [
        ("decoder", "sequential", (2, 5, 6)),
        ("pictures", "sequential", (2, 2, 2)),
        ("pictures", "parallel", (3, 2)),
    ],
)
def test_an_interrupted_run_continues_with_the_same_bytes(
    name: str,
    mode: str,
    stops: tuple[int, ...],
    counts: Counter[str],
    tmp_path: Path,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model: Model = request.getfixturevalue(name)
    wanted = compress(model, tmp_path / "whole.onnx", None, calibration=mode)
    whole = Counter(counts)
    cache, out = tmp_path / "cache", tmp_path / "out.onnx"
    counts.clear()
    for stop in stops:
        with pytest.raises(_InterruptedError):
            compress(model, out, cache, stop, calibration=mode)
    before = Counter(counts)
    assert before["encode_calibrated"] == sum(stops) - len(stops)
    assert endings(cache)[".activations"] == 1
    counts.clear()
    assert compress(model, out, cache, calibration=mode) == wanted
    assert counts["encode_calibrated"] + before["encode_calibrated"] == whole["encode_calibrated"]
    assert counts["advance"] <= 0.6 * whole["advance"]
    assert endings(cache).keys() <= {".calibrated", ".payload"}
    counts.clear()
    caplog.set_level("INFO")
    assert compress(model, out, cache, calibration=mode) == wanted
    assert not counts
    assert f"{endings(cache)['.calibrated']} weights are known" in caplog.text


def test_other_inputs_and_other_settings_find_nothing(
    pictures: Model, counts: Counter[str], tmp_path: Path
) -> None:
    compress(pictures, tmp_path / "out.onnx", tmp_path / "cache")
    whole = Counter(counts)
    with np.load(pictures[1]["data"]) as data:
        np.savez(tmp_path / "changed.npz", x=data["x"][::-1])
    for other in ({"data": tmp_path / "changed.npz"}, {"bits": 3}, {"calibration": "parallel"}):
        counts.clear()
        compress(pictures, tmp_path / "out.onnx", tmp_path / "cache", **other)
        assert counts["encode_calibrated"] == whole["encode_calibrated"]


@pytest.mark.parametrize("ending", ["calibrated", "activations"])
def test_damaged_files_are_made_again(
    pictures: Model, counts: Counter[str], tmp_path: Path, ending: str
) -> None:
    wanted = compress(pictures, tmp_path / "whole.onnx", None)
    whole, cache = Counter(counts), tmp_path / "cache"
    with pytest.raises(_InterruptedError):
        compress(pictures, tmp_path / "out.onnx", cache, 4)
    for path in cache.glob(f"*.{ending}"):
        path.write_bytes(path.read_bytes()[:-7])
    counts.clear()
    assert compress(pictures, tmp_path / "out.onnx", cache) == wanted
    missing = ("encode_calibrated", "advance")[ending == "activations"]
    assert counts[missing] == whole[missing]


def test_activations_of_old_runs_give_way(
    pictures: Model, counts: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    kept = []
    for bits in (1, 2, 3):
        with pytest.raises(_InterruptedError):
            compress(pictures, tmp_path / "out.onnx", cache, 4, bits=bits)
        kept.append(sorted(path.name for path in cache.glob("*.activations")))
        size = max(path.stat().st_size for path in cache.glob("*.activations"))
        monkeypatch.setattr(journal, "_MOST_BYTES", 7 * size // 2)
    assert [len(names) for names in kept] == [1, 2, 2]
    assert kept[0][0] not in kept[2]
    monkeypatch.setattr(journal, "_MOST_BYTES", 1000)
    with pytest.raises(_InterruptedError):
        compress(pictures, tmp_path / "out.onnx", tmp_path / "small", 4)
    assert not endings(tmp_path / "small")[".activations"]


def test_killed_runs_leave_nothing_but_a_faster_next_one(pictures: Model, tmp_path: Path) -> None:
    wanted = compress(pictures, tmp_path / "whole.onnx", None, tune=1)
    (tmp_path / "out").mkdir()
    cache = tmp_path / "cache"
    words = [
        *(sys.executable, "-m", "onnxcomp", "optimize", str(pictures[0])),
        *("-o", str(tmp_path / "out" / "out.onnx"), "--data", str(pictures[1]["data"])),
        *("--bits", "2", "--min-size", "1024", "--tune", "1", "--no-verify", "--jobs", "1"),
        *("--cache", str(cache), "-q"),
    ]
    rng = random.Random(0)
    for finished in (1, 3):
        with subprocess.Popen(words) as run:
            while len(list(cache.glob("*.calibrated"))) < finished and run.poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 0.05))
            run.kill()
    subprocess.run(words, check=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["out.onnx"]
    assert (tmp_path / "out" / "out.onnx").read_bytes() == wanted
    assert endings(cache).keys() <= {".calibrated", ".payload"}


ARRAYS = {
    "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
    "scalar": np.asarray(7, np.int64),
    "empty": np.zeros((0, 3), np.float16),
    "half": weight(5).astype("bfloat16"),
    "flags": np.asarray([True, False]),
}


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    assert all(storable(array) for array in ARRAYS.values())
    assert not storable(np.asarray(["a", None], object))
    assert not storable([1, 2])
    write_arrays(tmp_path / "file", {"x": [1.5, None]}, ARRAYS)
    found = read_arrays(tmp_path / "file")
    assert found is not None
    assert found[0] == {"x": [1.5, None]}
    for name, array in ARRAYS.items():
        assert (found[1][name].dtype, found[1][name].shape) == (array.dtype, array.shape)
        assert found[1][name].tobytes() == array.tobytes()


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_files_that_are_not_whole_count_as_missing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("arrays") / "file"
    assert read_arrays(path) is None
    write_arrays(path, {"a": 1}, ARRAYS)
    whole = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "cut short"):
        whole = whole[: data.draw(st.integers(0, len(whole) - 1), "length")]
    else:
        place = data.draw(st.integers(0, len(whole) - 1), "place")
        whole[place] ^= data.draw(st.integers(1, 255), "bits")
    path.write_bytes(whole)
    assert read_arrays(path) is None
