"""A table that is looked up in and, transposed, is the head: one weight with two uses."""

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxcomp as oc
from onnxcomp.passes.planning.sensitivity_prior import sensitivity
from onnxcomp.runtime.language.decoder import Decoder

TABLE = "model.embed_tokens.weight"


def test_a_plan_sees_both_uses_and_counts_the_table_as_a_product(decoder_folder: Path) -> None:
    from onnxcomp.passes.analysis.weight_sites import find_sites
    from onnxcomp.passes.ir.model import load

    plan = oc.plan(decoder_folder / "model.onnx", bits=4)
    assert plan[TABLE].uses == ("Gather", "MatMul")
    sites = {site.name: site for site in find_sites(load(decoder_folder / "model.onnx")).sites}
    assert sensitivity(sites[TABLE]) == sites[TABLE].size == 320 * 64


@pytest.mark.parametrize("settings", [{"bits": 3}, {"ratio": 5.0}], ids=["bits", "ratio"])
def test_the_table_has_its_own_bits_and_is_stored_once(
    decoder_folder: Path, tmp_path: Path, settings: dict[str, float]
) -> None:
    path = tmp_path / "small.onnx"
    rule = f"{TABLE.split('.')[1]}:bits=6"
    result = oc.optimize(decoder_folder / "model.onnx", path, set_=rule, verify=False, **settings)
    bits = {site.name: site.params.get("bits") for site in result.report.sites}
    assert bits.pop(TABLE) == 6
    assert all(b is None or b < 6 for b in bits.values())
    graph = onnx.load(path).graph
    (look_up,) = (n for n in graph.node if n.op_type == "HyperGather")
    (head,) = (n for n in graph.node if "logits" in n.output)
    assert head.op_type == "HyperMatMul"
    assert look_up.input[1:] == head.input[1:]
    stored = [t for t in graph.initializer if t.name.startswith(TABLE)]
    assert len({t.name.rpartition("::")[2] for t in stored}) == len(stored) == 2  # codes, scales
    assert sum(len(t.raw_data) for t in stored) < 320 * 64 * 6 / 8 * 1.15


def test_both_uses_read_the_same_values(decoder_folder: Path, tmp_path: Path) -> None:
    path, dense = tmp_path / "small.onnx", tmp_path / "dense.onnx"
    oc.optimize(decoder_folder / "model.onnx", path, include=TABLE, precision="exact", bits=2)
    oc.expand(path, dense)
    tokens = np.arange(20)[None]
    small, expanded = (Decoder(oc.InferenceSession(p)).logits(tokens) for p in (path, dense))
    np.testing.assert_allclose(small, expanded, atol=1e-4 * np.abs(expanded).max())
