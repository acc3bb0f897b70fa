"""The winding codec is the published method: its formulas, its error law, its encoder's choices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

import onnxcomp
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.protocol import Payload
from onnxcomp.passes.codecs.winding import (
    format as winding_format,
)
from onnxcomp.passes.codecs.winding import (
    search as winding_search,
)
from onnxcomp.passes.codecs.winding.codec import WindingCodec, WindingParams
from onnxcomp.passes.codecs.winding.format import GRIDS, Trajectory, positions, trajectory
from onnxcomp.passes.weight import Array

CODEC = WindingCodec()


def normal(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def test_the_sheared_grid_is_that_of_the_published_program() -> None:
    for points in (225, 1600, 7):
        side = math.ceil(math.sqrt(points))
        steps = np.arange(points)
        wanted = np.stack([steps / side**2 % 1, steps / side % 1], axis=1)
        found = positions(trajectory("sheared", points))
        np.testing.assert_array_equal(found[0], 0.5)
        np.testing.assert_allclose(found[1:], wanted, atol=1e-6)


def test_irrational_directions_follow_the_paper() -> None:
    steps = np.arange(500)
    found = positions(trajectory("pi", 500))[1:]
    for axis in (0, 1):
        np.testing.assert_allclose(found[:, axis], steps / (math.pi + axis + 1) % 1, atol=1e-6)


def test_points_of_the_lattice_are_farther_apart_than_those_of_other_windings() -> None:
    gaps = {}
    for grid in GRIDS:
        places = positions(trajectory(grid, 1021))[1:].astype(np.float64)
        gaps[grid] = cKDTree(places, boxsize=1.0).query(places, k=2)[0][:, 1].min()
    assert gaps["lattice"] == max(gaps.values())
    # A hexagonal lattice of that density has sqrt(2 / sqrt(3)).
    assert gaps["lattice"] * math.sqrt(1021) > 0.95 * math.sqrt(2 / math.sqrt(3))


@settings(max_examples=30, deadline=None)
@given(points=st.integers(1, 600), grid=st.sampled_from(GRIDS), seed=st.integers(0, 99))
def test_cells_find_what_a_search_of_all_points_finds(points: int, grid: str, seed: int) -> None:
    path = trajectory(grid, points)
    targets = np.random.default_rng(seed).random((200, 2), np.float32)
    found = winding_search.nearest(path, targets)
    places = positions(path).astype(np.float64)
    distances = np.linalg.norm(places[found] - targets, axis=1)
    np.testing.assert_allclose(distances, cKDTree(places).query(targets)[0], atol=1e-6)


@pytest.mark.parametrize("grid", ["sheared", "lattice"])
def test_error_shrinks_with_the_side_and_with_the_root_of_the_points(grid: str) -> None:
    """The paper's law: the error of pairs in a box of side l is at most c l / sqrt(U)."""
    targets = np.random.default_rng(5).random((40_000, 2), np.float32) - np.float32(0.5)
    for side in (0.1, 0.8):
        for points in (63, 225, 1023, 1600):
            path = trajectory(grid, points)
            offsets = targets * np.float32(side)
            found = winding_search.encode(path, offsets, side, 0)
            decoded = (positions(path)[found.codes] - np.float32(0.5)) * np.float32(side)
            error = np.linalg.norm(decoded - offsets, axis=1)
            bound = side / math.sqrt(points)
            # A square cell of that area: half of its diagonal; on the box's edge a whole side.
            assert error.max() < 1.5 * bound
            assert 0.25 * bound < np.sqrt(np.square(error).mean()) < 0.55 * bound


def test_pairs_outside_the_box_take_the_first_radius_that_reaches_them() -> None:
    path, side = trajectory("sheared", 225), 1.0
    offsets = np.array([[0.1, 0.2], [0.9, 0.0], [0.0, -2.2], [3.0, 4.0], [0.5, 0.5]], np.float32)
    found = winding_search.encode(path, offsets, side, 3)
    used = int(found.codes.max()) // 226
    radii = 0.5 + np.arange(used + 1) * 4.5 / used
    np.testing.assert_allclose(found.spans[: used + 1], 2 * radii, rtol=1e-6)
    wanted = [0, *(int(np.argmax(radii >= np.hypot(*pair))) for pair in offsets[1:4]), 0]
    assert (found.codes // 226).tolist() == wanted


def test_classes_stop_at_the_error_the_authors_are_content_with() -> None:
    path, weight = trajectory("sheared", 1600), normal(64 * 64).reshape(-1, 2)
    found = {
        deviation: winding_search.encode(path, weight * np.float32(deviation), 3 * deviation, 3)
        for deviation in (0.004, 0.5)
    }
    assert found[0.004].error <= winding_search.GOOD_ERROR < found[0.5].error
    assert found[0.004].codes.max() // 1601 == 1


def test_published_settings_give_published_sizes(make_site: Any) -> None:
    site = make_site(256, 512)
    for points, bits in ((225, 10), (1600, 13)):
        params = WindingParams(points=points, side=0.1)
        CODEC.check(params)
        assert CODEC.layout(site, params)["codes"].shape == (1, 256 * 512 // 16, bits)


def test_a_tensor_with_a_large_error_stays_as_it_is_as_published(make_site: Any) -> None:
    params = WindingParams(points=225, side=0.1)
    with pytest.raises(ModelError, match=r"0\.006"):
        CODEC.encode(make_site(64, 64), normal(64 * 64).reshape(64, 64), params)


@settings(max_examples=30, deadline=None)
@given(pair_bits=st.integers(1, 16), groups=st.integers(1, 3), blocks=st.integers(1, 4))
def test_codes_are_unpacked_as_they_were_packed(pair_bits: int, groups: int, blocks: int) -> None:
    rng = np.random.default_rng(pair_bits)
    codes = rng.integers(0, 2**pair_bits, (groups, blocks * 8))
    octets = winding_format.pack(codes, pair_bits)
    assert octets.shape == (groups, blocks, pair_bits)
    np.testing.assert_array_equal(winding_format.unpack(octets).reshape(groups, -1), codes)


def test_groups_of_zeros_and_equal_weights_are_exact(make_site: Any) -> None:
    weight = normal(32 * 64).reshape(32, 64)
    weight[3] = 0.0
    site = make_site(32, 64)
    params = WindingParams(grid="lattice", classes=0, group=64)
    assert not CODEC.decode(site, CODEC.encode(site, weight, params))[3].any()
    flat = np.full((32, 64), 0.25, np.float32)
    decoded = CODEC.decode(site, CODEC.encode(site, flat, WindingParams()))
    np.testing.assert_array_equal(decoded, flat)


def test_group_scales_and_better_lattices_help(make_site: Any) -> None:
    rng = np.random.default_rng(7)
    weight = (rng.standard_normal((64, 256)) * rng.lognormal(0, 1, (64, 1))).astype(np.float32)
    site, errors = make_site(64, 256), []
    for params in (
        WindingParams(classes=0),
        WindingParams(),
        WindingParams(classes=0, group=128),
        WindingParams(classes=0, group=128, grid="lattice"),
    ):
        decoded = CODEC.decode(site, CODEC.encode(site, weight, params))
        errors.append(float(np.linalg.norm(decoded - weight)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 1},
        {"bits": 7},
        {"grid": "golden"},
        {"classes": 16},
        {"side": -1.0},
        {"points": 9000},
        {"group": 24},
        {"bits": 2, "classes": 15},
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        CODEC.check(WindingParams(**wrong))


def test_codes_of_classes_that_do_not_exist_are_refused(make_site: Any) -> None:
    site = make_site(16, 64)
    payload = CODEC.encode(site, normal(16 * 64).reshape(16, 64), WindingParams())
    tensors = {**payload.tensors, "spans": payload.tensors["spans"][:1]}
    tensors["codes"] = np.full_like(payload.tensors["codes"], 255)
    with pytest.raises(ValueError, match="class"):
        CODEC.decode(site, Payload(tensors, payload.shared))


def test_nobody_gets_it_who_does_not_ask_for_it(tmp_path: Any) -> None:
    weight = onnx.numpy_helper.from_array(normal(256 * 256).reshape(256, 256), "w")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        *("g", [value("x", 1, ["n", 256])], [value("y", 1, ["n", 256])], [weight]),
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    assert "winding" in CODECS
    assert {choice.codec for choice in onnxcomp.plan(model, ratio=5)} <= {"hyper"}
    asked = onnxcomp.plan(model, method="winding", bits=5)
    assert {choice.codec for choice in asked} == {"winding"}
    result = onnxcomp.optimize(model, tmp_path / "o.onnx", method="winding", bits=5, mode="decode")
    assert result.verify is not None and result.verify.passed


GOLDEN = sorted((Path(__file__).parents[2] / "golden").glob("winding_*.npz"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden_files_decode_to_the_bit(path: Path) -> None:
    with np.load(path) as archive:
        golden = {name: archive[name] for name in archive.files}
    _, points, order = (int(size) for size in golden["sizes"])
    first, second = (int(step) for step in golden["generator"])
    extent = golden["weight"].shape
    assert golden["extent"].tolist() == list(extent)
    found = winding_format.decode(golden, Trajectory(points - 1, (first, second), order), extent)
    assert found.tobytes() == golden["decoded"].tobytes()


def test_there_is_a_golden_file_for_every_grid() -> None:
    assert {path.stem.split("_")[2] for path in GOLDEN} == set(GRIDS)
