"""Choices of the hyper codec: groups, flat views, refusals, ranges, and what it emits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.dense import DenseParams
from onnxcomp.passes.codecs.hyper.codec import HyperParams
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.weight import Array, Attribute, WeightSite

SiteMaker = Callable[..., WeightSite]

HYPER = CODECS["hyper"]


def group_of(site: WeightSite, **params: int) -> Attribute:
    return HYPER.attributes(site, HyperParams(**params))["group"]


def round_trip(site: WeightSite, weight: Array, params: Params) -> Array:
    return HYPER.decode(site, HYPER.encode(site, weight, params))


@pytest.mark.parametrize(
    ("length", "group", "expected"),
    [(384, 128, 128), (144, 128, 32), (100, 128, 128), (90, 128, 32), (64, 256, 64), (256, 32, 32)],
)
def test_the_group_is_the_cheapest_up_to_the_one_asked_for(
    make_site: SiteMaker, length: int, group: int, expected: int
) -> None:
    assert group_of(make_site(16, length), bits=4, group=group) == expected


def test_size_is_the_formula_of_the_specification(make_site: SiteMaker) -> None:
    # 3 panels, 5 groups of 32 weights: P G 16 (g k / 8 + 2)
    assert HYPER.size(make_site(40, 144), HyperParams(bits=3)) == 3 * 5 * 16 * (32 * 3 // 8 + 2)


def test_dense_uses_are_coded_flat_where_that_is_smaller(make_site: SiteMaker) -> None:
    params = HyperParams(bits=4)
    flat, natural = make_site(96, 9, need="dense"), make_site(96, 9, need="matmul")
    assert HYPER.attributes(flat, params)["extent"] == (27, 32)
    assert HYPER.attributes(natural, params)["extent"] == (96, 9)
    assert HYPER.size(flat, params) == 2 * 16 * 18 < HYPER.size(natural, params)
    weight = np.random.default_rng(0).standard_normal((96, 9), np.float32)
    decoded = round_trip(flat, weight, params)
    assert np.linalg.norm(decoded - weight) < 0.09 * np.linalg.norm(weight)


def test_a_weight_that_would_not_shrink_is_refused_with_numbers(make_site: SiteMaker) -> None:
    reason = HYPER.refuse(make_site(2, 7))
    assert reason == "2 x 7 needs 96 bytes padded to whole groups, 56 dense"
    assert HYPER.refuse(make_site(0, 128)) == "the weight is empty"


@pytest.mark.parametrize(
    ("params", "said"),
    [
        (HyperParams(bits=0), "bits=0"),
        (HyperParams(bits=7), "bits=7"),
        (HyperParams(state_bits=9), "state_bits=9"),
        (HyperParams(bits=6, state_bits=7), "state_bits=7 are too few for bits=6"),
        (HyperParams(group=96), "group=96"),
        (DenseParams(), "DenseParams"),
    ],
)
def test_settings_out_of_range_are_named(params: Params, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        HYPER.check(params)


@pytest.mark.parametrize("value", [1e6, 3e38, np.inf, np.nan])
def test_values_beyond_the_scales_are_an_error(
    make_site: SiteMaker, encoder_form: str, value: float
) -> None:
    weight = np.full((16, 128), value, np.float32)
    with pytest.raises(ModelError, match="too large for float16 scales") as caught:
        HYPER.encode(make_site(16, 128), weight, HyperParams())
    assert "dense" in caught.value.hint


@pytest.mark.parametrize("size", [1e-8, 1e-6, 1.0, 1e3])
def test_error_does_not_depend_on_magnitude(
    make_site: SiteMaker, encoder_form: str, size: float
) -> None:
    weight = np.random.default_rng(1).standard_normal((16, 128), np.float32) * np.float32(size)
    decoded = round_trip(make_site(16, 128), weight, HyperParams())
    # Scales of tiny weights are subnormal float16 numbers and coarse.
    assert np.linalg.norm(decoded - weight) < (0.3 if size < 1e-7 else 0.08) * np.linalg.norm(
        weight
    )


def test_vanishing_weights_become_zero(make_site: SiteMaker, encoder_form: str) -> None:
    weight = np.full((16, 128), 1e-13, np.float32)
    assert not round_trip(make_site(16, 128), weight, HyperParams()).any()


class Recorder:
    """A builder that records nodes and hands out names."""

    opset = 18

    def __init__(self) -> None:
        self.nodes: list[tuple[str, tuple[str, ...], Mapping[str, Attribute]]] = []
        self.constants: dict[str, Array] = {}

    def tensor(self, key: str) -> str:
        return key

    def constant(self, key: str, array: Array) -> str:
        self.constants[key] = array
        return key

    def node(
        self,
        op_type: str,
        inputs: Sequence[str],
        attributes: Mapping[str, Attribute] | None = None,
        *,
        domain: str = "",
    ) -> str:
        self.nodes.append((op_type, tuple(inputs), attributes or {}))
        return f"{op_type}_{len(self.nodes)}"


def emitted(site: WeightSite, kind: Any, x: str | None = None) -> Recorder:
    weight = np.random.default_rng(0).standard_normal((site.rows, site.length), np.float32)
    payload = HYPER.encode(site, weight, HyperParams())
    recorder = Recorder()
    HYPER.emit(recorder, site, payload, kind, x)
    return recorder


def test_emit_names_the_inputs_of_the_specification_in_order(make_site: SiteMaker) -> None:
    recorder = emitted(make_site(32, 128), "matmul", "x")
    ((op_type, inputs, attributes),) = recorder.nodes
    assert op_type == "HyperMatMul"
    shared = ("table", "extent", "blocks", "taps", "window", "left", "right")
    assert inputs[:3] == ("x", "codes", "scales")
    assert [key.split(".")[1] for key in inputs[3:]] == list(shared)
    assert attributes["group"] == 128
    assert tuple(attributes["extent"]) == (32, 128)  # type: ignore[arg-type]


def test_a_flat_weight_is_reshaped_back(make_site: SiteMaker) -> None:
    recorder = emitted(make_site(96, 9, need="dense"), "weight")
    assert [node[0] for node in recorder.nodes] == ["HyperWeight", "Reshape"]
    assert tuple(recorder.nodes[0][2]["extent"]) == (27, 32)  # type: ignore[arg-type]
    (shape,) = recorder.constants.values()
    assert shape.tolist() == [96, 9]
