"""Decoders are calibrated to the same bytes on any number of threads, and lose less for it."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

import onnxcomp

Array = npt.NDArray[Any]


def windows(model: Path, count: int, size: int, vocabulary: int) -> dict[str, Array]:
    """Inputs of a decoder that reads whole windows, with an empty cache."""
    tokens = np.random.default_rng(0).zipf(1.3, (count, size)) % vocabulary
    feeds: dict[str, Array] = {
        "input_ids": tokens.astype(np.int64),
        "attention_mask": np.ones((count, size), np.int64),
        "position_ids": np.tile(np.arange(size), (count, 1)),
    }
    for value in onnx.load(model, load_external_data=False).graph.input:
        if value.name.startswith("past_key_values."):
            _, heads, _, width = (axis.dim_value for axis in value.type.tensor_type.shape.dim)
            feeds[value.name] = np.zeros((count, heads, 0, width), np.float32)
    return feeds


def logits(model: Path, feeds: dict[str, Array]) -> Array:
    return np.asarray(onnxcomp.InferenceSession(model).run(["logits"], feeds)[0])


@pytest.mark.parametrize("target", ["avx512", "avx2"])
def test_bytes_do_not_depend_on_the_number_of_jobs(
    decoder_folder: Path, tmp_path: Path, target: str
) -> None:
    model = decoder_folder / "model.onnx"
    np.savez(tmp_path / "data.npz", **windows(model, 20, 24, 320))
    found = []
    for jobs in (1, 2, 4):
        out = tmp_path / f"{jobs}.onnx"
        onnxcomp.optimize(
            model,
            out,
            bits=3,
            data=tmp_path / "data.npz",
            tune=0,
            min_size=1 << 10,
            jobs=jobs,
            target=target,
            verify=False,
        )
        found.append(out.read_bytes())
    assert found[0] == found[1] == found[2]


def test_two_layers_of_a_real_decoder_lose_less_with_calibration(
    decoder_script: dict[str, Any], smollm2_path: Path, tmp_path: Path
) -> None:
    decoder_script["write_cut"](tmp_path / "cut", smollm2_path)
    model = tmp_path / "cut" / "model.onnx"
    feeds = windows(model, 24, 48, 2048)
    np.savez(tmp_path / "data.npz", **{name: array[:20] for name, array in feeds.items()})
    held = {name: array[20:] for name, array in feeds.items()}
    wanted, losses = logits(model, held), []
    for data in (None, tmp_path / "data.npz"):
        out = tmp_path / "out.onnx"
        options = {"data": data, "tune": 0} if data else {}
        result = onnxcomp.optimize(model, out, bits=3, verify=False, **options, force=True)
        losses.append(float(np.linalg.norm(logits(out, held) - wanted)))
    assert losses[1] < 0.8 * losses[0]
    assert not [site for site in result.report.sites if "not calibrated" in site.note]
