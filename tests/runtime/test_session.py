"""Sessions with and without the operator library."""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from onnxcomp import InferenceSession
from onnxcomp.errors import ModelError, RuntimeMissingError
from onnxcomp.runtime.session import (
    get_library_path,
    import_runtime,
    needs_library,
    register,
)
from onnxcomp.runtime.structure import custom_operators, model_bytes, read_structure

IDS = {"ids": np.array([[0, 3, -1]])}


def operators_after_optimization(path: Path, library: bool, folder: Path) -> set[str]:
    """Operator names of the graph that ONNX Runtime really runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    InferenceSession(path, library=library, session_options=options)
    return {node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node}


def test_a_session_is_an_ordinary_session_of_onnx_runtime(twins: tuple[Path, Path]) -> None:
    session = InferenceSession(twins[0], threads=1)
    assert isinstance(session, onnxruntime.InferenceSession)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert session.get_session_options().intra_op_num_threads == 1


def test_the_library_runs_kernels(twins: tuple[Path, Path], library: Path, tmp_path: Path) -> None:
    assert operators_after_optimization(twins[1], True, tmp_path) == {"HyperGather", "HyperMatMul"}
    wanted = InferenceSession(twins[0]).run(None, IDS)[0]
    assert np.allclose(InferenceSession(twins[1]).run(None, IDS)[0], wanted, atol=1e-5)


def test_without_the_library_definitions_run(
    twins: tuple[Path, Path], no_library: None, tmp_path: Path
) -> None:
    operators = operators_after_optimization(twins[1], False, tmp_path)
    assert "MatMul" in operators
    assert not any(name.startswith("Hyper") for name in operators)
    wanted = InferenceSession(twins[0]).run(None, IDS)[0]
    found = InferenceSession(twins[1], library=False).run(None, IDS)[0]
    assert np.allclose(found, wanted, atol=1e-5)


def test_a_missing_library_matters_only_to_models_that_need_it(
    twins: tuple[Path, Path], no_library: None
) -> None:
    InferenceSession(twins[0])
    with pytest.raises(RuntimeMissingError, match=r"absent\.so does not exist") as caught:
        InferenceSession(twins[1])
    assert caught.value.exit_code == 6
    assert caught.value.hint


def test_a_missing_runtime_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeMissingError, match="cannot be imported") as caught:
        import_runtime()
    assert "onnxcomp[cpu]" in caught.value.hint


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"absent\.onnx"):
        InferenceSession(tmp_path / "absent.onnx")
    (tmp_path / "text.onnx").write_text("this is no model")
    with pytest.raises(ModelError, match=r"text\.onnx"):
        InferenceSession(tmp_path / "text.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(ModelError, match=r"empty\.onnx"):
        InferenceSession(tmp_path / "empty.onnx")
    for name in ("absent.onnx", "text.onnx", "empty.onnx"):
        with pytest.raises(ModelError, match=name):
            read_structure(tmp_path / name)


def test_custom_operators_are_counted_where_they_are_called(twins: tuple[Path, Path]) -> None:
    assert custom_operators(twins[1]) == {"HyperGather": 1, "HyperMatMul": 1}
    assert custom_operators(twins[0]) == {}
    assert needs_library(twins[1])
    assert not needs_library(twins[0])


def test_folded_operators_need_no_library(twins: tuple[Path, Path], tmp_path: Path) -> None:
    model = onnx.load(twins[1])
    model.graph.node[1].op_type = "HyperWeight"
    del model.graph.node[0]
    onnx.save(model, tmp_path / "folded.onnx")
    assert custom_operators(tmp_path / "folded.onnx") == {"HyperWeight": 1}
    assert not needs_library(tmp_path / "folded.onnx")


def test_operators_in_subgraphs_count(twins: tuple[Path, Path], tmp_path: Path) -> None:
    model = onnx.load(twins[1])
    inner = helper.make_graph(
        list(model.graph.node),
        "then",
        [],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
    )
    del model.graph.node[:]
    model.graph.node.append(
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    )
    onnx.save(model, tmp_path / "if.onnx")
    assert custom_operators(tmp_path / "if.onnx") == {"HyperGather": 2, "HyperMatMul": 2}


def test_external_data_counts_as_bytes_of_the_model(
    twins: tuple[Path, Path], tmp_path: Path
) -> None:
    assert model_bytes(twins[0]) == twins[0].stat().st_size
    external = tmp_path / "external.onnx"
    onnx.save(
        onnx.load(twins[0]), external, save_as_external_data=True, location="w", size_threshold=0
    )
    both = external.stat().st_size + (tmp_path / "w").stat().st_size
    assert model_bytes(external) == both
    (tmp_path / "w").unlink()
    with pytest.raises(ModelError, match="external data"):
        model_bytes(external)


def test_register_and_the_path_are_public(library: Path, twins: tuple[Path, Path]) -> None:
    assert get_library_path() == library
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    register(options)
    register(options)
    for _ in range(2):
        assert InferenceSession(twins[1], session_options=options).run(None, IDS)
    session = onnxruntime.InferenceSession(str(twins[1]), options)
    assert session.run(None, IDS)[0].shape == (1, 3, 40)
