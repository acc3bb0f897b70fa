"""A pruned graph computes what the original computes with the channels masked."""

from __future__ import annotations

import functools
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcomp.passes.transforms.prune.shrink import kept_shape
from onnxcomp.runtime.inputs import synthesize_inputs

from .conftest import Case, random_choice
from .graphs import GRAPHS

# Models of the data folder with channels that can go, and how closely their outputs agree.
REAL = {
    "basic_pitch_nmp": 1e-4, "fastestdet": 1e-4, "gtcrn_simple": 1e-4, "magika_standard_v3_3": 1e-4,
    "mnist_cntk": 1e-4, "mobilenetv2_224_tf2ptq_fp32": 1e-4, "openseeface_lm0": 1e-4,
    "openseeface_mnv3_det": 1e-4, "ppocrv3_det": 1e-4, "resnet20_cifar10": 1e-4,
    "silero_vad_16k_op15": 1e-4, "squeezenet_fp16": 1e-2, "super_resolution": 1e-4,
    "tiny_random_gpt2": 1e-4, "ultraface_rfb320": 1e-4, "winml_cifar_classifier": 1e-4,
    "yolox_nano": 1e-4,
}  # fmt: skip

# Models whose channels all stay: outputs, recurrent layers, weights in branches, decision trees.
WITHOUT = {
    "dtln_1", "nnsplit_en_lstm", "silero_vad", "sklearn_randomforest", "tiny_random_lfm2",
    "tract_byte_bidi_lstm",
}  # fmt: skip

# A run takes seconds: one input is enough.
LARGE = "style_candy"


@functools.cache
def small(name: str) -> Case:
    """A small graph, analysed."""
    return Case(GRAPHS[name]())


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(GRAPHS)), st.integers(0, 2**32 - 1))
def test_any_choice_of_channels_of_a_small_graph_can_go(name: str, seed: int) -> None:
    case = small(name)
    assert case.groups.groups, case.groups.kept
    with tempfile.TemporaryDirectory() as folder:
        case.check(random_choice(case.groups, np.random.default_rng(seed)), Path(folder))


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_a_small_graph_without_channels_equals_it_with_zeros(name: str, tmp_path: Path) -> None:
    small(name).check(random_choice(small(name).groups, np.random.default_rng(1)), tmp_path)


@pytest.mark.parametrize("name", sorted(REAL))
def test_a_real_model_without_channels_equals_it_with_zeros(
    name: str, data_folder: Path, tmp_path: Path
) -> None:
    case = Case(data_folder / "models" / f"{name}.onnx")
    assert case.groups.groups, case.groups.kept
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    case.check(random_choice(case.groups, rng), tmp_path, REAL[name])


def test_a_large_model_without_channels_equals_it_with_zeros(
    data_folder: Path, tmp_path: Path
) -> None:
    path = data_folder / "models" / f"{LARGE}.onnx"
    case = Case(path, [dict(synthesize_inputs(path)[0])])
    assert len(case.groups.groups) == 8
    case.check(random_choice(case.groups, np.random.default_rng(2)), tmp_path, 1e-3)


def test_models_are_prunable_or_known_not_to_be(data_folder: Path) -> None:
    found = {path.stem for path in (data_folder / "models").glob("*.onnx")}
    assert found <= REAL.keys() | WITHOUT | {LARGE, "minilm_l6_v2_embed"}
    for name in sorted(WITHOUT & found):
        assert not Case(data_folder / "models" / f"{name}.onnx").groups.groups


@pytest.mark.parametrize("name", ["tinyllama_ref", "tinyllama_ref_kv"])
def test_the_language_model_without_channels_equals_it_with_zeros(
    name: str, data_folder: Path, tmp_path: Path
) -> None:
    case = Case(data_folder / "lm" / f"{name}.onnx")
    kinds = [group.kind for group in case.groups.groups]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "channels": 6,
        "heads": 6,
        "inner": 12,  # positions of values, and of queries with keys in rotary pairs
    }
    case.check(random_choice(case.groups, np.random.default_rng(5)), tmp_path)


def test_minilm_without_channels_equals_it_with_zeros(minilm_path: Path, tmp_path: Path) -> None:
    case = Case(minilm_path)
    assert {group.kind for group in case.groups.groups} == {"channels", "heads", "inner"}
    case.check(random_choice(case.groups, np.random.default_rng(1)), tmp_path)


def test_removing_nothing_changes_nothing(case: Callable[..., Case], tmp_path: Path) -> None:
    one = case(GRAPHS["convolutions"]())
    one.check(set(), tmp_path)


def test_shapes_that_would_not_be_rectangular_are_refused() -> None:
    assert kept_shape(np.array([[True, False], [False, True], [False, False]])) == (2, 1)
    with pytest.raises(Exception, match="must be equal"):
        kept_shape(np.array([[True, True], [False, True]]))
