"""Tables are encoded for what the loss feels of the rows that are looked up."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxcomp
from onnxcomp.passes.encoding.look_ups import _evenly

Array = npt.NDArray[Any]
WIDTH, WORDS, TOKENS = 64, 256, 12
# Words that no calibration input has.
UNSEEN = range(192, WORDS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Rows of a table, normalised and multiplied: a few directions count much more than others."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((WIDTH, WIDTH)) * np.geomspace(3.0, 0.03, WIDTH)[:, None]
    arrays = {
        "table": rng.standard_normal((WORDS, WIDTH)),
        "gain": np.ones(WIDTH),
        "weight": weight,
    }
    fixed = [numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("LayerNormalization", ["x", "gain"], ["n"]),
        helper.make_node("MatMul", ["n", "weight"], ["y"]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "tokens"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [ids], [y], fixed)
    opset = helper.make_opsetid("", 17)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def samples(count: int, words: Sequence[int], seed: int = 1) -> list[dict[str, Array]]:
    rng = np.random.default_rng(seed)
    return [{"ids": rng.choice(words, (4, TOKENS))} for _ in range(count)]


def distance(path: Path, form: Path, words: Sequence[int]) -> float:
    """Relative squared error of the outputs."""
    noise = power = 0.0
    for feed in samples(8, words, seed=2):
        exact = onnxruntime.InferenceSession(path).run(None, feed)[0]
        found = onnxcomp.InferenceSession(form).run(None, feed)[0]
        noise += float(np.square(found - exact).sum(dtype=np.float64))
        power += float(np.square(exact).sum(dtype=np.float64))
    return noise / power


def compressed(path: Path, name: str, **options: Any) -> tuple[Path, Any]:
    form = path.with_name(name)
    result = onnxcomp.optimize(
        path, form, method="hyper", bits=3, min_size=0, tune=0, verify=False,
        exclude=["weight"], set_=[".*:group=64"], **options,
    )  # fmt: skip
    (site,) = (site for site in result.report.sites if site.name == "table")
    return form, site


def test_words_that_no_input_has_gain_as_well(path: Path) -> None:
    plain, _ = compressed(path, "plain.onnx")
    data = samples(30, range(UNSEEN.start))
    form, site = compressed(path, "form.onnx", data=data)
    assert form.stat().st_size == plain.stat().st_size
    assert site.note == ""
    assert site.output_error is None
    for words in (range(UNSEEN.start), UNSEEN):
        assert distance(path, form, words) < 0.6 * distance(path, plain, words)
    again, _ = compressed(path, "again.onnx", data=data)
    assert again.read_bytes() == form.read_bytes()


def test_few_inputs_leave_the_table_as_it_is(path: Path) -> None:
    plain, _ = compressed(path, "plain.onnx")
    few = [{"ids": feed["ids"][:1]} for feed in samples(9, range(WORDS))]
    form, site = compressed(path, "form.onnx", data=few)
    assert "only rows are looked up" in site.note
    assert onnx.load(form).graph == onnx.load(plain).graph


def test_few_inputs_of_many_samples_are_cut(path: Path) -> None:
    """The loss is looked at for as many indices as suffice, however they are laid out."""

    rng = np.random.default_rng(3)
    many = [{"ids": rng.integers(0, WORDS, (40, 256))} for _ in range(11)]
    model = ir.load(path)
    taken = _evenly(model, many)
    assert {feed["ids"].shape for feed in taken} == {(1, 256)}
    assert sum(feed["ids"].size for feed in taken) == pytest.approx(8192, rel=0.2)
    few = samples(8, range(WORDS))
    assert list(_evenly(model, few)) == few
