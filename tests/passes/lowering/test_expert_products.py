"""Products with matrices of a stack, in the forms that exporters write, compressed and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import onnxcomp
from onnxcomp.passes.analysis.weight_sites import find_sites
from onnxcomp.passes.ir.manifest import read_manifest
from onnxcomp.passes.ir.model import load
from onnxcomp.passes.transforms.canonicalize import canonicalize
from onnxcomp.passes.weight import Array
from onnxcomp.runtime.session import open_session

EXPERTS, K, N = 5, 80, 48
RNG = np.random.default_rng(0)

# Graphs over W (experts, k, n) or V (experts, n, k), and what is fed beside x.
FORMS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...] | None]] = {
    "all": ("(float[t, 80] x) => (float[e, t, n] y) { y = MatMul (x, W) }", (3, K), None),
    "each its own": (
        "(float[5, t, 80] x) => (float[5, t, n] y) { y = MatMul (x, W) }", (EXPERTS, 3, K), None,
    ),
    "chosen": (
        "(float[t, 1, 1, 80] x, int64[t, k] i) => (float[t, k, 1, n] y)"
        "{ g = Gather <axis = 0> (W, i) y = MatMul (x, g) }",
        (3, 1, 1, K), (3, 2),
    ),
    "chosen by tuples": (
        "(float[t, 1, 1, 80] x, int64[t, k] i) => (float[t, k, 1, n] y)"
        "{ a = Constant <value_ints = [-1]> () j = Unsqueeze (i, a) g = GatherND (W, j)"
        " y = MatMul (x, g) }",
        (3, 1, 1, K), (3, 2),
    ),
    "transposed before": (
        "(float[t, 1, 1, 80] x, int64[t, k] i) => (float[t, k, 1, n] y)"
        "{ v = Transpose <perm = [0, 2, 1]> (V) g = Gather (v, i) y = MatMul (x, g) }",
        (3, 1, 1, K), (3, 2),
    ),
    "transposed behind": (
        "(float[t, 1, 1, 80] x, int64[t, k] i) => (float[t, k, 1, n] y)"
        "{ g = Gather (V, i) v = Transpose <perm = [0, 1, 3, 2]> (g) y = MatMul (x, v) }",
        (3, 1, 1, K), (3, 2),
    ),
    "on the left": (
        "(float[t, 1, 80, 1] x, int64[t, k] i) => (float[t, k, n, 1] y)"
        "{ g = Gather (V, i) y = MatMul (g, x) }",
        (3, 1, K, 1), (3, 2),
    ),
    "one by a scalar": (
        "(float[t, 80] x, int64 i) => (float[t, n] y) { g = Gather (W, i) y = MatMul (x, g) }",
        (3, K), (),
    ),
    "squeezed": (
        "(float[t, 80] x, int64[1] i) => (float[t, n] y)"
        "{ g = Gather (W, i) a = Constant <value_ints = [-3]> () s = Squeeze (g, a)"
        " y = MatMul (x, s) }",
        (3, K), (1,),
    ),
    "unsqueezed": (
        "(float[t, 2, 1, 80] x, int64[2] i) => (float[t, 2, 1, n] y)"
        "{ g = Gather (W, i) a = Constant <value_ints = [0]> () s = Unsqueeze (g, a)"
        " y = MatMul (x, s) }",
        (3, 2, 1, K), (2,),
    ),
    "reshaped": (
        "(float[m, 1, 80] x, int64[t, k] i) => (float[m, 1, n] y)"
        "{ g = Gather (W, i) a = Constant <value_ints = [-1, 80, 48]> () s = Reshape (g, a)"
        " y = MatMul (x, s) }",
        (6, 1, K), (3, 2),
    ),
    "reshaped to a computed shape": (
        "(float[1, 1, 80] x, int64[t, k] i) => (float[m, 1, n] y) <float[m, 80, 48] s> {"
        " c = Size (i) o = Constant <value_ints = [1]> () m = Reshape (c, o)"
        " kn = Constant <value_ints = [80, 48]> () a = Concat <axis = 0> (m, kn)"
        " g = Gather (W, i) s = Reshape (g, a) y = MatMul (x, s) }",
        (1, 1, K), (3, 2),
    ),
    "Einsum": (
        "(float[t, 80] x, int64[t, k] i) => (float[t, k, n] y)"
        '{ g = Gather (W, i) y = Einsum <equation = "th, tkhn -> tkn"> (x, g) }',
        (3, K), (3, 2),
    ),
    "Einsum with the weight first": (
        "(float[t, 80] x, int64[t, k] i) => (float[t, k, n] y)"
        '{ g = Gather (V, i) y = Einsum <equation = "beck,bk->bec"> (g, x) }',
        (3, K), (3, 2),
    ),
    "Einsum of rows, turned": (
        "(float[t, m, 80] x, int64[t, k] i) => (float[n, m, t, k] y)"
        '{ g = Gather (W, i) y = Einsum <equation = "tmh,tkhn->nmtk"> (x, g) }',
        (3, 4, K), (3, 2),
    ),
    "Einsum with all": (
        "(float[t, 80] x) => (float[t, 5, n] y)"
        '{ y = Einsum <equation = "th,ehn->ten"> (x, W) }',
        (3, K), None,
    ),
    "unrolled": (
        "(float[t, 80] x) => (float[t, n] y)"
        "{ a = Constant <value_int = 1> () b = Constant <value_int = 3> ()"
        " g = Gather (W, a) h = Gather (W, b) u = MatMul (x, g) v = MatMul (x, h) y = Add (u, v) }",
        (3, K), None,
    ),
}  # fmt: skip


def model_of(text: str) -> onnx.ModelProto:
    graph = onnx.parser.parse_graph(f"g {text}")
    weight = RNG.standard_normal((EXPERTS, K, N)).astype(np.float32) / 9
    arrays = {"W": weight, "V": np.ascontiguousarray(weight.swapaxes(1, 2))}
    read = {name for node in graph.node for name in node.input}
    graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items() if n in read)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def feed_of(x: tuple[int, ...], chosen: tuple[int, ...] | None) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    feed = {"x": rng.standard_normal(x).astype(np.float32)}
    if chosen is not None:
        feed["i"] = np.asarray(rng.integers(-EXPERTS, EXPERTS, chosen))
    return feed


def relative(found: Array, wanted: Array) -> float:
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


CASES = [(form, "local") for form in FORMS]
CASES += [(form, way) for form in ("all", "on the left") for way in ("inline", "inline-unfoldable")]


@pytest.mark.parametrize(("form", "functions"), CASES)
def test_forms_are_compressed_run_and_come_back(tmp_path: Path, form: str, functions: Any) -> None:
    text, *shapes = FORMS[form]
    source, out, back = (tmp_path / f"{name}.onnx" for name in ("source", "out", "back"))
    onnx.save(model_of(text), source)
    onnxcomp.optimize(
        source, out, bits=4, method="hyper", min_size=0, functions=functions, precision="exact"
    )
    onnxcomp.expand(out, back)
    if functions == "local":
        assert "HyperExperts" in operators(out) and "HyperWeight" not in operators(out)
    kinds = {"MatMul", "Gather", "Transpose", "Squeeze", "Unsqueeze", "Reshape", "Slice"}
    # Einsum comes back as MatMul.
    assert set(operators(back)) <= kinds | {"Size", "Concat", "Add", "Constant"}
    feed = feed_of(*shapes)
    (dense,) = onnxruntime.InferenceSession(source).run(None, feed)
    (library,) = open_session(out, library=True).run(None, feed)
    (portable,) = open_session(out, library=False).run(None, feed)
    (expanded,) = onnxruntime.InferenceSession(back).run(None, feed)
    assert 0.02 < relative(library, dense) < 0.12
    assert relative(portable, library) < 1e-5 and relative(expanded, library) < 1e-5


def test_int8_is_told_from_exact(tmp_path: Path) -> None:
    text, *shapes = FORMS["chosen"]
    feed, found = feed_of(*shapes), []
    onnx.save(model_of(text), tmp_path / "source.onnx")
    for precision in ("exact", "int8"):
        out = tmp_path / f"{precision}.onnx"
        onnxcomp.optimize(
            tmp_path / "source.onnx", out, bits=6, method="hyper", min_size=0, precision=precision
        )
        found.append(open_session(out, library=True).run(None, feed)[0])
    assert 1e-4 < relative(found[1], found[0]) < 0.02


REFUSED = {
    "read by something else, too": "{ g = Gather (W, i) y = MatMul (x, g) z = ReduceSum (g) }",
    "picked along another axis": "{ g = Gather <axis = 1> (W, i) y = MatMul (x, g) z = Abs (y) }",
    "reshaped as a whole": (
        "{ a = Constant <value_ints = [-1, 20, 192]> () g = Gather (W, i) s = Reshape (g, a)"
        " z = Abs (s) y = MatMul (x, g) }"
    ),
    "an Einsum that sums over both axes": (
        '{ g = Gather (W, i) y = Einsum <equation = "tabh,tkhn->tk"> (x, g) z = Abs (x) }'
    ),
    "an Einsum of an ellipsis": (
        '{ g = Gather (W, i) y = Einsum <equation = "...h,...hn->...n"> (x, g) z = Abs (x) }'
    ),
    "turned with what stands in front": (
        "{ g = Gather (W, i) y = Transpose <perm = [1, 0, 2, 3]> (g) z = Abs (x) }"
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_uses_read_the_dense_weight(case: str) -> None:
    text = "(float[t, 1, 1, 80] x, int64[t, k] i) => (float[a, b, c, d] y, float[*] z) "
    graph = f"g {text}{REFUSED[case]}".replace("float[*] z", "float z")
    proto = onnx.parser.parse_graph(graph)
    proto.initializer.append(numpy_helper.from_array(np.ones((EXPERTS, K, N), np.float32), "W"))
    model = load(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 17)]))
    canonicalize(model)
    (site,) = find_sites(model, min_size=0).sites
    assert {use.need for use in site.uses} == {"dense"} and site.experts == 1


def test_a_stack_is_one_weight_with_rows_of_all_its_matrices() -> None:
    model = load(model_of(FORMS["chosen"][0]))
    canonicalize(model)
    (site,) = find_sites(model, min_size=0).sites
    assert (site.rows, site.length, site.experts, site.transposed) == (
        EXPERTS * N,
        K,
        EXPERTS,
        True,
    )
    stored = np.arange(site.size, dtype=np.float32).reshape(site.shape)
    matrix = site.matrix(stored)
    np.testing.assert_array_equal(matrix[2 * N : 3 * N], stored[2].T)
    np.testing.assert_array_equal(site.stored_form(matrix), stored)


@pytest.mark.parametrize("method", ["int", "fp16", "hash", "hyper+lowrank", "hyper"])
def test_codecs_without_products_of_stacks_fold_them(tmp_path: Path, method: str) -> None:
    """Verification compares with the dense model; `expand` has the stored shape."""
    for form in ("chosen", "transposed behind"):
        text, *shapes = FORMS[form]
        source, out, back = (tmp_path / f"{name}.onnx" for name in ("source", "out", "back"))
        onnx.save(model_of(text), source)
        mode = "folded" if method == "hyper" else "auto"
        onnxcomp.optimize(source, out, method=method, min_size=0, mode=mode)
        onnxcomp.expand(out, back)
        feed = feed_of(*shapes)
        (compressed,) = open_session(out, library=True).run(None, feed)
        (expanded,) = onnxruntime.InferenceSession(back).run(None, feed)
        assert "HyperExperts" not in operators(out)
        assert relative(expanded, compressed) < 1e-5


def test_the_record_of_a_stack_says_how_many_and_is_of_its_own_version(tmp_path: Path) -> None:
    import json

    onnx.save(model_of(FORMS["chosen"][0]), tmp_path / "source.onnx")
    onnxcomp.optimize(tmp_path / "source.onnx", tmp_path / "out.onnx", bits=4, min_size=0)
    model = load(tmp_path / "out.onnx")
    document = json.loads(model.metadata_props["onnxcomp"])
    assert document["version"] == 2 and document["sites"]["W"][6:] == [EXPERTS]
    assert read_manifest(model)["W"].site.experts == EXPERTS


def test_calibration_takes_the_inputs_of_all_matrices(tmp_path: Path) -> None:
    """Inputs with few directions: what is encoded for them has a smaller error of products."""
    text, *_ = FORMS["chosen"]
    source = tmp_path / "source.onnx"
    onnx.save(model_of(text), source)
    rng = np.random.default_rng(5)
    directions = rng.standard_normal((6, K)).astype(np.float32)

    def feed() -> dict[str, Array]:
        x = rng.standard_normal((64, 1, 1, 6)).astype(np.float32) @ directions
        return {"x": x, "i": rng.integers(0, EXPERTS, (64, 2))}

    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(12):
        np.savez(folder / f"{number}.npz", **feed())
    test = feed()
    (dense,) = onnxruntime.InferenceSession(source).run(None, test)
    errors = []
    for data in (None, folder):
        out = tmp_path / "out.onnx"
        onnxcomp.optimize(source, out, bits=3, method="hyper", min_size=0, data=data)
        errors.append(relative(open_session(out, library=True).run(None, test)[0], dense))
    assert errors[1] < 0.8 * errors[0]
