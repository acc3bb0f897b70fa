"""One library under many sessions, threads and processes: the same bits, and nothing kept."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import onnxcomp as oc

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tools: Any) -> list[Path]:
    """Two compressed models, one for each arithmetic, and one that decodes at every run."""
    folder = tmp_path_factory.mktemp("models")
    found = []
    for number, options in enumerate(({}, {"precision": "int8"}, {"mode": "decode"})):
        path = tools.save(folder / str(number), tools.two_products(seed=number))
        oc.optimize(path, folder / f"{number}.onnx", verify=False, **options)
        found.append(folder / f"{number}.onnx")
    return found


def _inputs() -> list[Array]:
    rng = np.random.default_rng(1)
    return [rng.standard_normal((rows, 64)).astype(np.float32) for rows in (1, 7, 33)]


def _digest(session: Any) -> str:
    """A hash of all bits of the outputs."""
    digest = hashlib.sha256()
    for x in _inputs():
        digest.update(session.run(None, {"x": x})[0].tobytes())
    return digest.hexdigest()


def _digests(paths: list[str]) -> list[str]:
    return [_digest(oc.InferenceSession(path)) for path in paths]


@pytest.mark.parametrize("threads", [1, 2])
def test_sixteen_threads_on_one_session_get_the_same_bits(models: list[Path], threads: int) -> None:
    for path in models:
        session = oc.InferenceSession(path, threads=threads)
        want = _digest(session)
        with ThreadPoolExecutor(16) as pool:
            assert set(pool.map(lambda _, s=session: _digest(s), range(64))) == {want}


def test_four_sessions_of_every_model_at_once_get_the_same_bits(models: list[Path]) -> None:
    want = _digests([str(path) for path in models])
    sessions = [(path, oc.InferenceSession(path)) for path in models for _ in range(4)]
    expected = dict(zip(models, want, strict=True))
    start = threading.Barrier(len(sessions))

    def work(pair: tuple[Path, Any]) -> bool:
        start.wait()
        return all(_digest(pair[1]) == expected[pair[0]] for _ in range(4))

    with ThreadPoolExecutor(len(sessions)) as pool:
        assert all(pool.map(work, sessions))


def test_sessions_opened_and_closed_in_threads_get_the_same_bits(models: list[Path]) -> None:
    names = [str(path) for path in models]
    want = _digests(names)
    with ThreadPoolExecutor(8) as pool:
        assert all(found == want for found in pool.map(_digests, [names] * 24))


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_child_processes_get_the_same_bits(
    models: list[Path], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    # A spawned child imports this module by the name that pytest gave it, from the root.
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    names = [str(path) for path in models]
    want = _digests(names)  # the parent has run models with threads before it forks
    reader, writer = multiprocessing.get_context(method).Pipe(duplex=False)
    child = multiprocessing.get_context(method).Process(target=_child, args=(names, writer))
    child.start()
    assert reader.poll(90), f"a child by {method} hangs"
    assert reader.recv() == want
    child.join(30)
    assert child.exitcode == 0
    assert _digests(names) == want


def _child(names: list[str], writer: Any) -> None:
    writer.send(_digests(names))


def _resident() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def _open_and_close(path: Path, x: Array) -> None:
    oc.InferenceSession(path, threads=1).run(None, {"x": x})


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_sessions_leave_nothing_behind(models: list[Path]) -> None:
    """Short form of tests/fuzz/sessions.py: the growth of a leak of 5 KB per session shows."""
    x = _inputs()[0]
    for _ in range(30):
        _open_and_close(models[0], x)
    gc.collect()
    before = _resident()
    for _ in range(120):
        _open_and_close(models[0], x)
    gc.collect()
    assert _resident() - before < 600_000


def test_reading_while_an_output_is_replaced_gives_one_of_the_two(
    models: list[Path], tools: Any, tmp_path: Path
) -> None:
    """Outputs appear by renaming: a reader never sees half a file."""
    source = tools.save(tmp_path / "in", tools.two_products())
    output = tmp_path / "out.onnx"
    make: Callable[..., Any] = oc.optimize
    known = set()
    for bits in (2, 4):
        make(source, output, bits=bits, verify=False)
        known.add(_digest(oc.InferenceSession(output)))
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            seen.add(_digest(oc.InferenceSession(output)))

    reader = threading.Thread(target=read)
    reader.start()
    for bits in (2, 4, 2, 4):
        make(source, output, bits=bits, verify=False)
    stop.set()
    reader.join()
    assert seen <= known
