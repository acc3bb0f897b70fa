"""The drop-in session, and the patch of ONNX Runtime's own class."""

import functools
import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as raised

import onnxcomp
from onnxcomp import ops
from onnxcomp.errors import ModelError, RuntimeMissingError
from onnxcomp.runtime.clients import patching
from onnxcomp.runtime.session import open_session
from onnxcomp.runtime.structure import custom_operators

IDS = {"ids": np.array([[0, 3, -1]])}
CPU = ["CPUExecutionProvider"]
Session = onnxruntime.InferenceSession


@pytest.fixture
def bare(twins: tuple[Path, Path], tmp_path: Path) -> Path:
    """The compressed model without definitions of its operators: it needs the library."""
    model = onnx.load(twins[1])
    del model.functions[:]
    onnx.save(model, tmp_path / "bare.onnx")
    return tmp_path / "bare.onnx"


@pytest.fixture
def patch(library: Path) -> Iterator[patching.SessionPatch]:
    with onnxcomp.patch_onnxruntime() as patch:
        yield patch


def quiet() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return options


def opens(make: Any, path: Path | bytes, options: Any = None) -> bool:
    """Whether a model that needs the library can be opened."""
    try:
        session = make(path, options or quiet(), CPU)
    except Exception as error:
        assert "com.onnxcomp" in str(error), error
        return False
    return session.run(None, IDS)[0].shape == (1, 3, 40)


def test_the_class_is_one_of_onnx_runtime_with_its_signature() -> None:
    assert issubclass(onnxcomp.InferenceSession, Session)
    theirs = list(inspect.signature(Session.__init__).parameters.values())
    ours = list(inspect.signature(onnxcomp.InferenceSession.__init__).parameters.values())
    positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [p.name for p in theirs if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.default for p in ours[2:5]] == [p.default for p in theirs[2:5]]
    assert ours[-1].kind is inspect.Parameter.VAR_KEYWORD


def test_every_way_to_call_works(bare: Path, library: Path) -> None:
    make = onnxcomp.InferenceSession
    sessions = [
        make(bare),
        make(str(bare)),
        make(bare.read_bytes()),
        make(bare, quiet()),
        make(bare, quiet(), CPU),
        make(bare, None, CPU, [{}]),
        make(bare, sess_options=quiet(), providers=CPU, provider_options=[{}]),
        make(path_or_bytes=bare, providers=[("CPUExecutionProvider", {})]),
        make(bare, session_options=quiet(), threads=1),
        make(bare, disabled_optimizers=["ConstantFolding"], enable_fallback=0),
    ]
    wanted = sessions[0].run(None, IDS)[0]
    for session in sessions:
        assert isinstance(session, Session)
        np.testing.assert_array_equal(session.run(None, IDS)[0], wanted)
    sessions[0].set_providers(CPU)  # opens it again
    np.testing.assert_array_equal(sessions[0].run(None, IDS)[0], wanted)
    with pytest.raises(TypeError, match="the same"):
        make(bare, quiet(), session_options=quiet())


def test_options_may_be_used_again_and_may_know_the_operators_already(
    bare: Path, library: Path
) -> None:
    options = quiet()
    for _ in range(2):
        assert opens(onnxcomp.InferenceSession, bare, options)
    assert opens(Session, bare, options)
    options = quiet()
    for _ in range(2):  # without `register`, and twice
        options.register_custom_ops_library(str(library))
    assert opens(onnxcomp.InferenceSession, bare, options)


def test_options_of_models_without_the_operators_stay_as_they_are(
    twins: tuple[Path, Path], library: Path, patch: patching.SessionPatch, tmp_path: Path
) -> None:
    plain = onnx.load(twins[0])
    del plain.opset_import[1:]
    onnx.save(plain, tmp_path / "plain.onnx")
    options = quiet()
    for make in (onnxcomp.InferenceSession, Session):
        make(str(tmp_path / "plain.onnx"), options)
        make(plain.SerializeToString(), options)
    with pytest.raises(RuntimeError):
        options.get_session_config_entry(patching._MARK)
    assert ops._MARK == patching._MARK


def test_errors_are_of_both_kinds(bare: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.onnx") as caught:
        onnxcomp.InferenceSession(tmp_path / "absent.onnx", quiet())
    assert isinstance(caught.value, raised.NoSuchFile)
    assert caught.value.exit_code == 5 and caught.value.hint
    with pytest.raises(raised.InvalidProtobuf, match="7 bytes"):
        onnxcomp.InferenceSession(b"nothing", quiet())
    with pytest.raises(TypeError):
        onnxcomp.InferenceSession(7)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"com\.onnxcomp"):
        onnxcomp.InferenceSession(bare, quiet(), library=False)


def test_a_missing_library_matters_only_where_it_is_needed(
    twins: tuple[Path, Path], no_library: None, tmp_path: Path
) -> None:
    onnxcomp.InferenceSession(twins[0])
    onnxcomp.InferenceSession(twins[1], library=False)
    for model in (twins[1], twins[1].read_bytes()):
        with pytest.raises(RuntimeMissingError, match=r"absent\.so does not exist"):
            onnxcomp.InferenceSession(model)
    folded = tmp_path / "folded.onnx"
    onnxcomp.optimize(twins[0], folded, method="winding", mode="folded", min_size=0, verify=False)
    assert custom_operators(folded)
    onnxcomp.InferenceSession(folded)
    onnxcomp.InferenceSession(folded.read_bytes())
    with pytest.raises(RuntimeMissingError):
        onnxcomp.patch_onnxruntime()


def test_the_patch_reaches_earlier_imports_and_subclasses(
    bare: Path, library: Path, patch: patching.SessionPatch
) -> None:
    class Own(Session):  # type: ignore[misc]
        pass

    for make in (Session, Own, functools.partial(Own), onnxcomp.InferenceSession):
        assert opens(make, bare)
        assert opens(make, bare.read_bytes())
    keywords = Session(path_or_bytes=bare, sess_options=None, providers=CPU)
    assert keywords.run(None, IDS)


def test_the_patch_is_applied_once_and_taken_back(bare: Path, library: Path) -> None:
    before = Session.__init__
    assert not opens(Session, bare)
    patch = onnxcomp.patch_onnxruntime()
    assert onnxcomp.patch_onnxruntime() is patch
    options = quiet()
    assert opens(Session, bare, options) and opens(Session, bare, options)
    patch.undo()
    patch.undo()
    assert Session.__init__ is before
    assert not opens(Session, bare)
    with onnxcomp.patch_onnxruntime():
        assert opens(Session, bare)
    assert not opens(Session, bare)


def test_the_patch_can_be_taken_back_below_another(
    bare: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Session.__init__
    patch = onnxcomp.patch_onnxruntime()
    inner = Session.__init__
    outer = functools.wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs))
    Session.__init__ = outer
    try:
        assert opens(Session, bare)
        patch.undo()
        assert Session.__init__ is outer
        assert not opens(Session, bare)
    finally:
        Session.__init__ = first


def test_the_portable_form_can_still_be_asked_for(
    bare: Path, twins: tuple[Path, Path], library: Path, patch: patching.SessionPatch
) -> None:
    with pytest.raises(ModelError):
        onnxcomp.InferenceSession(bare, quiet(), library=False)
    with pytest.raises(ModelError):
        open_session(bare, library=False)
    assert opens(Session, bare)
    assert onnxcomp.InferenceSession(twins[1], library=False).run(None, IDS)


def test_a_library_that_does_not_load_is_the_opener_s_error(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"no library")
    monkeypatch.setenv("ONNXCOMP_OPS_LIBRARY", str(damaged))
    with onnxcomp.patch_onnxruntime(), pytest.raises(raised.Fail, match=r"damaged\.so"):
        Session(str(bare), quiet())


def test_nothing_is_imported_before_it_is_used(twins: tuple[Path, Path], library: Path) -> None:
    program = f"""
        import sys
        import onnxcomp
        assert "onnxruntime" not in sys.modules
        import onnxcomp.runtime.session, onnxcomp.runtime.evaluate
        assert "onnxruntime" not in sys.modules
        from onnxcomp import InferenceSession
        print(InferenceSession({str(twins[1])!r}).get_providers())
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (run.stdout, run.stderr) == ("['CPUExecutionProvider']\n", "")
