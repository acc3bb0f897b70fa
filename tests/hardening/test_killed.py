"""kill -9 at any moment: the next run finishes, gives the same bytes, and cleans up."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxcomp as oc
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.hyper.codec import HyperParams
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.ir.files import workspace
from onnxcomp.passes.weight import Use, WeightSite


def test_a_killed_run_is_finished_by_the_next_one(
    command: Callable[..., Any], slow: Path, tmp_path: Path
) -> None:
    expected = tmp_path / "expected"
    expected.mkdir()
    oc.optimize(slow, expected / "out.onnx", bits=3, verify=False)
    rng = random.Random(5)
    folder = tmp_path / "out"
    folder.mkdir()
    output, cache = folder / "out.onnx", tmp_path / "cache"
    words = ("optimize", slow, "-o", output, "--bits", 3, "--cache", cache, "--no-verify")
    found = []
    for _ in range(3):
        process = command(*words)
        while process.poll() is None and not list(folder.iterdir()):
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        found.append(len(list(cache.glob("*.payload"))))
    assert found == sorted(found)
    process = command(*words)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, (out, err)
    assert [path.name for path in folder.iterdir()] == ["out.onnx"]
    assert output.read_bytes() == (expected / "out.onnx").read_bytes()
    assert not list(cache.glob("*.part"))


def test_abandoned_workspaces_are_removed_and_others_are_not(tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    abandoned = tmp_path / ".out.onnx.0123abcd"
    (abandoned / "deep").mkdir(parents=True)
    unrelated = [tmp_path / ".out.onnx.backup", tmp_path / ".other.onnx.0123abcd"]
    for folder in unrelated:
        folder.mkdir()
    with workspace(output) as first, workspace(output) as second:
        assert first.is_dir() and second.is_dir()
        assert not abandoned.exists()
    assert sorted(tmp_path.iterdir()) == sorted(unrelated)


SITE = WeightSite("w", (8, 64), "float32", (Use("n", "Gather", 0, "gather"),), "", 8, 64, False)


def test_parts_of_dead_runs_are_removed_from_the_cache(tmp_path: Path) -> None:
    dead, own = tmp_path / "k.999999999.1.part", tmp_path / "k.1.1.part"
    for part in (dead, own):
        part.write_bytes(b"part")
    PayloadCache(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [own.name]


def test_a_full_disk_leaves_the_cache_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    codec, params = CODECS["hyper"], HyperParams(3)
    payload = codec.encode(SITE, weight, params)
    cache = PayloadCache(tmp_path)
    key = cache.key(SITE, weight, codec, params)

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    cache.put(key, payload)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    cache.put(key, payload)
    found = cache.get(key, SITE, codec, params)
    assert found is not None
    assert np.array_equal(found.tensors["codes"], payload.tensors["codes"])


def test_a_file_that_cannot_be_read_counts_as_missing(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    codec, params = CODECS["hyper"], HyperParams(3)
    cache = PayloadCache(tmp_path)
    key = cache.key(SITE, weight, codec, params)
    cache.path(key).mkdir()
    assert cache.get(key, SITE, codec, params) is None
    cache.put(key, codec.encode(SITE, weight, params))
    assert cache.get(key, SITE, codec, params) is None
