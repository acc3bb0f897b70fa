"""Folders for model servers of Python: what is in them, and the model behind each service."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcomp import InferenceSession, package
from onnxcomp.cli import package as command
from onnxcomp.errors import UsageError
from onnxcomp.runtime.package.services import SERVICES


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("served_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("kind", SERVICES)
def test_each_service_is_complete_and_compiles(
    twins: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    made = package(twins[1], tmp_path / kind, kind, name="lm", max_batch_size=4)
    service = SERVICES[kind]
    assert {"model.onnx", "model.py", "service.py", "requirements.txt", "README.md"} <= set(
        made.manifest["files"]
    )
    for name in ("model.py", "service.py"):
        compile((made.path / name).read_text(), name, "exec")
    for name in service.files:
        json.loads((made.path / name).read_text())
    text = (made.path / "README.md").read_text()
    assert service.command in text and service.health in text
    assert "--external-data always" in made.notes[0]
    assert command.SERVICES[kind] == service.title
    body = text.split("```json\n")[1].split("```")[0]
    assert service.body in ("v2", *json.loads(body))


@pytest.mark.usefixtures("library")
def test_requests_of_equal_shape_run_at_once(twins: tuple[Path, Path], tmp_path: Path) -> None:
    made = package(twins[1], tmp_path / "s", "litserve")
    model = load(made.path / "model.py").Model()
    session = InferenceSession(twins[1])
    random = np.random.default_rng(0)
    requests = [
        {"ids": random.integers(0, 30, shape)} for shape in ((1, 5), (2, 5), (1, 3), (1, 5))
    ]
    runs = []
    real = model.session.run

    class Counting:
        def run(self, outputs: list[str], feed: dict[str, np.ndarray]) -> list[np.ndarray]:
            runs.append(feed["ids"].shape)
            answer: list[np.ndarray] = real(outputs, feed)
            return answer

    model.session = Counting()
    assert model.joins
    answers = model.run(requests)
    assert sorted(runs) == [(1, 3), (4, 5)]
    for request, answer in zip(requests, answers, strict=True):
        wanted = session.run(None, request)[0]
        np.testing.assert_allclose(answer["logits"], wanted, rtol=1e-5, atol=1e-5)
    (lists,) = model.run_lists([{"ids": [[1, 2]]}])
    assert np.shape(lists["logits"])[:2] == (1, 2)


def test_rows_that_may_depend_on_each_other_run_alone(
    twins: tuple[Path, Path], tmp_path: Path
) -> None:
    proto = onnx.load(twins[0])
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "other"
    onnx.save(proto, tmp_path / "m.onnx")
    made = package(tmp_path / "m.onnx", tmp_path / "s", "ray")
    model = load(made.path / "model.py").Model()
    ids = np.ones((1, 4), np.int64)
    assert not model.joins and len(model.run([{"ids": ids}, {"ids": ids}])) == 2
    # MLServer joins requests itself, whatever the model is.
    for source, size in ((twins[0], 8), (tmp_path / "m.onnx", 0)):
        made = package(source, tmp_path / str(size), "mlserver")
        settings = json.loads((made.path / "model-settings.json").read_text())
        assert settings["max_batch_size"] == size and bool(settings["max_batch_time"]) == bool(size)
        assert "`max_batch_size` in `model-settings.json`" in (made.path / "README.md").read_text()


def test_a_cancelled_request_does_not_hold_up_others(
    twins: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of those that wait starts the run, and may be gone by then."""
    made = package(twins[0], tmp_path / "s", "kserve")
    base = type("Model", (), {"__init__": lambda self, name: None})
    names = ("kserve", "kserve.utils", "kserve.utils.numpy_codec")
    kserve, _, codec = modules = [ModuleType(name) for name in names]
    vars(kserve).update(Model=base, InferRequest=base, InferResponse=base)
    vars(codec).update(from_np_dtype=str)
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "model", load(made.path / "model.py"))
    service = load(made.path / "service.py").Service("lm")
    request = {"ids": np.ones((1, 4), np.int64)}

    async def ask() -> list[Any]:
        asked = [asyncio.create_task(service.answer(request)) for _ in range(3)]
        await asyncio.sleep(0)
        asked[0].cancel()
        found: list[Any] = await asyncio.gather(*asked, return_exceptions=True)
        return [*found, await service.answer(request)]

    async def limited() -> list[Any]:
        return await asyncio.wait_for(ask(), 30)

    first, *others = asyncio.run(limited())
    assert isinstance(first, asyncio.CancelledError)
    assert [answer["logits"].shape[:2] for answer in others] == [(1, 4)] * 3


def test_names_that_are_no_part_of_a_path_are_refused(
    twins: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="cannot be the name of a model"):
        package(twins[0], tmp_path / "s", "kserve", name="a/b")
    shutil.copyfile(twins[0], tmp_path / "tiny q4.1.onnx")
    made = package(tmp_path / "tiny q4.1.onnx", tmp_path / "s", "kserve")
    assert 'Service("tiny_q4.1")' in (made.path / "service.py").read_text()


def test_types_that_numpy_does_not_have_are_refused(
    twins: tuple[Path, Path], tmp_path: Path
) -> None:
    proto = onnx.load(twins[0])
    to = onnx.TensorProto.BFLOAT16
    proto.graph.node.append(onnx.helper.make_node("Cast", ["logits"], ["short"], to=to))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("short", to, None))
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"'short', a tensor\(bfloat16\)"):
        package(tmp_path / "m.onnx", tmp_path / "s", "litserve")
