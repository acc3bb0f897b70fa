"""Made-up inputs mean something, and stored ones are checked."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxcomp.errors import UsageError
from onnxcomp.runtime.evaluate import run_model
from onnxcomp.runtime.inputs import load_inputs, synthesize_inputs
from onnxcomp.runtime.signature import index_bounds, read_signature

F32, I64 = TensorProto.FLOAT, TensorProto.INT64
SaveModel = Callable[..., Path]


def node(op_type: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs.split(), outputs.split(), **attributes)


def table(rows: int) -> dict[str, Any]:
    return {"w": np.ones((rows, 4), np.float32), "shape": np.array([-1], np.int64)}


def test_indices_stay_within_the_table_they_look_up(save_model: SaveModel) -> None:
    nodes = [
        node("Cast", "ids", "wide", to=I64),
        node("Reshape", "wide shape", "flat"),
        node("Identity", "w", "same"),
        node("Gather", "same flat", "y"),
    ]
    path = save_model(
        nodes, {"ids": (TensorProto.INT32, ["b", "t"])}, {"y": (F32, None)}, table(11)
    )
    assert read_signature(path)[0].bound == 11
    (feed,) = synthesize_inputs(path)
    assert feed["ids"].shape == (2, 16)
    assert 0 <= feed["ids"].min() <= feed["ids"].max() <= 10
    assert feed["ids"].max() > 5


def test_indices_into_codes_stay_within_the_rows(twins: tuple[Path, Path]) -> None:
    for path in twins:
        assert read_signature(path)[0].bound == 50
        (feed,) = synthesize_inputs(path)
        assert feed["ids"].max() < 50
        assert run_model(path, [feed], library=False)[0]["logits"].shape == (2, 16, 40)


def test_the_least_of_several_tables_counts(save_model: SaveModel) -> None:
    nodes = [node("Gather", "w ids", "a"), node("Gather", "v ids", "c")]
    path = save_model(
        nodes,
        {"ids": (I64, [3])},
        {"a": (F32, None), "c": (F32, None)},
        {**table(9), "v": np.ones((5, 2), np.float32)},
    )
    assert index_bounds(onnx.load(path)) == {"ids": 5}


def test_indices_are_found_in_subgraphs_and_functions(save_model: SaveModel) -> None:
    inner = helper.make_graph(
        [node("Gather", "w ids", "a")], "t", [], [helper.make_tensor_value_info("a", F32, None)]
    )
    choice = node("If", "c", "y", then_branch=inner, else_branch=inner)
    path = save_model(
        [choice],
        {"c": (TensorProto.BOOL, []), "ids": (I64, [3])},
        {"y": (F32, None)},
        table(7),
    )
    assert index_bounds(onnx.load(path)) == {"ids": 7}
    body = [node("Gather", "w ids", "y")]
    look = helper.make_function(
        "local", "Look", ["ids", "w"], ["y"], body, [helper.make_opsetid("", 17)]
    )
    call = node("Look", "ids w", "y", domain="local")
    path = save_model([call], {"ids": (I64, [3])}, {"y": (F32, None)}, table(8), functions=[look])
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("local", 1))
    assert index_bounds(model) == {"ids": 8}


def test_masks_positions_rates_and_caches_are_recognised(save_model: SaveModel) -> None:
    inputs = {
        "input_ids": (I64, ["batch", "seq"]),
        "attention_mask": (I64, ["batch", "past_len + seq"]),
        "position_ids": (I64, ["batch", "seq"]),
        "token_type_ids": (I64, ["batch", "seq"]),
        "past_key": (F32, ["batch", 4, "past_len", 8]),
        "sr": (I64, []),
        "audio": (F32, ["batch", "samples"]),
        "input_lengths": (I64, ["batch"]),
        "use_cache_branch": (TensorProto.BOOL, [1]),
        "text": (TensorProto.STRING, [2]),
        "pixels": (TensorProto.UINT8, [1, 3, "h", "w"]),
    }
    nodes = [node("Identity", name, f"{name}_out") for name in inputs]
    outputs = {f"{name}_out": (kind, None) for name, (kind, _) in inputs.items()}
    (feed,) = synthesize_inputs(save_model(nodes, inputs, outputs))
    batch, seq = feed["input_ids"].shape
    past = feed["past_key"].shape[2]
    assert batch > 1 and seq > 1
    assert feed["attention_mask"].shape == (batch, past + seq)
    assert (feed["attention_mask"] == 1).all()
    assert feed["position_ids"].tolist() == [list(range(past, past + seq))] * batch
    assert not feed["token_type_ids"].any()
    assert feed["sr"] == 16000
    assert feed["audio"].shape[1] >= 256
    assert feed["input_lengths"].tolist() == [seq] * batch
    assert feed["use_cache_branch"].tolist() == [past > 0]
    assert feed["text"].dtype == object
    assert feed["pixels"].shape[2] >= 32
    assert feed["pixels"].max() > 200


def test_caches_of_grouped_queries_have_the_size_of_a_head(save_model: SaveModel) -> None:
    """Builders of decoders give that size a name alone."""
    nodes = [
        node("MatMul", "x w", "qkv"),
        node(
            "GroupQueryAttention", "qkv", "y present_key present_value", domain="com.microsoft",
            num_heads=4, kv_num_heads=2,
        ),
    ]  # fmt: skip
    nodes[1].input.extend(["", "", "past_key", "past_value", "last", "total"])
    cache = (F32, ["b", 2, "past", "head"])
    inputs = {"x": (F32, ["b", "t", 32]), "past_key": cache, "past_value": cache}
    constants = {
        "w": np.ones((32, 64), np.float32),
        "last": np.array([15, 15], np.int32),
        "total": np.array(16, np.int32),
    }
    path = save_model(nodes, inputs, {"y": (F32, None)}, constants)
    assert [spec.dims[-1] for spec in read_signature(path)] == [32, 8, 8]


def test_a_named_dimension_has_one_size(save_model: SaveModel) -> None:
    inputs = {"a": (F32, ["n", "k"]), "b": (F32, ["k", "m"])}
    path = save_model([node("MatMul", "a b", "y")], inputs, {"y": (F32, None)})
    (feed,) = synthesize_inputs(path, shapes={"a": (3, 7)})
    assert feed["a"].shape == (3, 7)
    assert feed["b"].shape[0] == 7


def test_other_sizes_are_tried_when_the_model_refuses(save_model: SaveModel) -> None:
    w = {"w": np.ones((64, 3), np.float32)}
    nodes = [node("Flatten", "x", "f"), node("MatMul", "f w", "y")]
    path = save_model(nodes, {"x": (F32, ["?a", "?b", "?c", "?d"])}, {"y": (F32, None)}, w)
    with pytest.raises(UsageError, match="fails on all made-up inputs") as caught:
        synthesize_inputs(path)
    assert "--shape" in caught.value.hint
    (feed,) = synthesize_inputs(path, shapes={"x": (5, 4, 4, 4)})
    assert feed["x"].shape == (5, 4, 4, 4)
    wave = {"w": np.ones((576, 3), np.float32)}
    path = save_model(
        [node("MatMul", "x w", "y")], {"x": (F32, ["b", "t"])}, {"y": (F32, None)}, wave
    )
    assert synthesize_inputs(path)[0]["x"].shape[1] == 576


def test_inputs_depend_on_the_seed_alone(twins: tuple[Path, Path]) -> None:
    first, again, other = (synthesize_inputs(twins[0], seed=s, samples=2) for s in (1, 1, 2))
    assert np.array_equal(first[0]["ids"], again[0]["ids"])
    assert not np.array_equal(first[0]["ids"], other[0]["ids"])
    assert not np.array_equal(first[0]["ids"], first[1]["ids"])


def test_initializers_listed_as_inputs_are_not_asked_for(save_model: SaveModel) -> None:
    path = save_model(
        [node("Gather", "w ids", "y")],
        {"ids": (I64, [3]), "w": (F32, [9, 4])},
        {"y": (F32, None)},
        table(9),
    )
    assert [spec.name for spec in read_signature(path)] == ["ids"]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"idz": (1, 2)}, "no input 'idz'"),
        ({"ids": (1, 2, 3)}, r"'ids' is int64 \[batch, seq\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    twins: tuple[Path, Path], shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        synthesize_inputs(twins[0], shapes=shapes)


def test_a_dimension_cannot_have_two_sizes(save_model: SaveModel) -> None:
    inputs = {"a": (F32, ["n"]), "b": (F32, ["n"])}
    path = save_model([node("Add", "a b", "y")], inputs, {"y": (F32, None)})
    with pytest.raises(UsageError, match="'n' is given two sizes: 2 and 3"):
        synthesize_inputs(path, shapes={"a": (2,), "b": (3,)})


def test_inputs_that_are_no_tensors_are_refused(save_model: SaveModel, tmp_path: Path) -> None:
    path = save_model([node("Neg", "x", "y")], {"x": (F32, [1])}, {"y": (F32, None)})
    model = onnx.load(path)
    sequence = helper.make_tensor_sequence_value_info("x", F32, None)
    model.graph.input[0].CopyFrom(sequence)
    onnx.save(model, tmp_path / "sequence.onnx")
    with pytest.raises(UsageError, match="a sequence_type, not a tensor"):
        read_signature(tmp_path / "sequence.onnx")


def test_stored_inputs_are_read_in_every_form(twins: tuple[Path, Path], tmp_path: Path) -> None:
    one, many = np.ones((2, 3), np.int64), np.arange(12).reshape(2, 2, 3)
    np.savez(tmp_path / "b.npz", ids=one)
    np.savez(tmp_path / "a.npz", ids=many)
    np.save(tmp_path / "ids.npy", many)
    model = twins[0]
    cases: list[tuple[Any, int]] = [
        (tmp_path / "b.npz", 1),
        (str(tmp_path / "a.npz"), 2),
        (tmp_path, 3),
        (f"ids={tmp_path / 'ids.npy'}", 2),
        ([f"ids={tmp_path / 'ids.npy'}", tmp_path / "b.npz"], 3),
        ({"ids": one}, 1),
        ([{"ids": one}, {"ids": many}], 3),
    ]
    for data, count in cases:
        feeds = load_inputs(data, model)
        assert len(feeds) == count
        assert all(feed["ids"].shape == (2, 3) for feed in feeds)
    assert np.array_equal(load_inputs(tmp_path, model)[1]["ids"], many[1])


def test_samples_of_several_inputs_go_together(save_model: SaveModel) -> None:
    inputs = {"a": (F32, ["n"]), "b": (F32, ["n"])}
    path = save_model([node("Add", "a b", "y")], inputs, {"y": (F32, None)})
    stack = np.arange(6, dtype=np.float32).reshape(3, 2)
    feeds = load_inputs({"a": stack, "b": np.zeros(2, np.float32)}, path)
    assert [feed["a"].tolist() for feed in feeds] == stack.tolist()
    with pytest.raises(UsageError, match="different numbers of samples"):
        load_inputs({"a": stack, "b": stack[:2]}, path)


def test_types_are_converted_where_no_value_changes(twins: tuple[Path, Path]) -> None:
    (feed,) = load_inputs({"ids": np.ones((2, 3), np.int32)}, twins[0])
    assert feed["ids"].dtype == np.int64
    with pytest.raises(UsageError, match=r"'ids' is int64 \[batch, seq\], not float32"):
        load_inputs({"ids": np.ones((2, 3), np.float32)}, twins[0])
    with pytest.raises(UsageError, match="not uint64"):
        load_inputs({"ids": np.full((2, 3), 2**63, np.uint64)}, twins[0])


def test_wrong_files_are_explained(twins: tuple[Path, Path], tmp_path: Path) -> None:
    model, ids = twins[0], np.ones((2, 3), np.int64)
    np.savez(tmp_path / "extra.npz", ids=ids, idz=ids)
    np.savez(tmp_path / "none.npz")
    np.savez(tmp_path / "rank.npz", ids=np.ones((1, 2, 3, 4), np.int64))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "bad.npz").write_text("no archive")
    (tmp_path / "folder").mkdir()
    cases = [
        (tmp_path / "extra.npz", "no input 'idz'"),
        (tmp_path / "none.npz", "'ids' is missing"),
        (tmp_path / "rank.npz", r"not of shape \[1, 2, 3, 4\]"),
        (f"ids={tmp_path / 'objects.npy'}", "cannot read"),
        (f"ids={tmp_path / 'rank.npz'}", "holds several arrays"),
        (tmp_path / "objects.npy", "cannot read"),
        (tmp_path / "bad.npz", "cannot read"),
        (tmp_path / "absent.npz", "cannot read"),
        (tmp_path / "folder", r"no \.npz files"),
        ([], "no inputs"),
    ]
    for data, message in cases:
        with pytest.raises(UsageError, match=message):
            load_inputs(data, model)


SLOW = {"style_candy"}


def test_every_real_model_gets_inputs_it_accepts(data_folder: Path) -> None:
    paths = [*(data_folder / "models").glob("*.onnx"), *(data_folder / "lm").glob("*.onnx")]
    assert paths
    for path in sorted(paths):
        if path.stem in SLOW:
            continue
        feeds = synthesize_inputs(path, samples=2)
        for outputs in run_model(path, feeds[1:]):
            for name, array in outputs.items():
                finite = array.dtype.kind != "f" or np.isfinite(array).all()
                assert finite, f"{path.name}: {name}"


def test_sets_of_samples_have_shapes_of_their_own(twins: tuple[Path, Path], tmp_path: Path) -> None:
    model = twins[0]
    sets = {
        "onnxcomp.sets": np.asarray(2),
        "0/ids": np.arange(6).reshape(2, 1, 3),
        "1/ids": np.arange(8).reshape(1, 2, 4),
    }
    np.savez(tmp_path / "sets.npz", **sets)
    for data in (tmp_path / "sets.npz", sets):
        feeds = load_inputs(data, model)
        assert [feed["ids"].shape for feed in feeds] == [(1, 3), (1, 3), (2, 4)]
    for damage, said in (
        ({"onnxcomp.sets": np.asarray([2, 2])}, "is no number"),
        ({"1/other": np.zeros(1)}, "set 1: the model has no input 'other'"),
        ({"onnxcomp.sets": np.asarray(3)}, "set 2: input 'ids' is missing"),
        ({"1/ids": np.zeros((2, 4), np.int64)}, "set 1: input 'ids' is int64"),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            load_inputs(sets | damage, model)


def test_inputs_without_a_rank_take_any_shape(save_model: SaveModel) -> None:
    path = save_model(
        [node("Identity", "x", "y"), node("Identity", "s", "z")],
        {"x": (TensorProto.FLOAT, None), "s": (TensorProto.FLOAT, [])},
        {"y": (TensorProto.FLOAT, None), "z": (TensorProto.FLOAT, [])},
    )  # fmt: skip
    array = np.ones((2, 3, 4), np.float32)
    (feed,) = load_inputs({"x": array, "s": np.float32(1)}, path)
    assert (feed["x"].shape, feed["s"].shape) == ((2, 3, 4), ())
    sets = {"onnxcomp.sets": np.asarray(1), "0/x": array, "0/s": np.ones(2, np.float32)}
    feeds = load_inputs(sets, path)
    assert [(feed["x"].shape, feed["s"].shape) for feed in feeds] == [((3, 4), ())] * 2
