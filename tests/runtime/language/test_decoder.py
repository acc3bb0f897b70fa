"""Decoders are run by the meaning of their inputs, with a cache and without one."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnxcomp
from onnxcomp.errors import ModelError, UsageError
from onnxcomp.runtime.language.decoder import Cache, Decoder, interface_of

Array = np.ndarray[Any, Any]

TOKENS = np.array([[5, 77, 30, 12, 200, 9, 41]])


def open_decoder(path: Path) -> Decoder:
    return Decoder(onnxcomp.InferenceSession(path))


def test_inputs_and_outputs_are_known_by_their_names(decoder_folder: Path) -> None:
    form = interface_of(onnxcomp.InferenceSession(decoder_folder / "model.onnx"))
    assert (form.ids, form.mask, form.positions) == ("input_ids", "attention_mask", "position_ids")
    assert (form.branch, form.logits) == ("", "logits")
    assert [(c.past, c.present) for c in form.caches] == [
        (f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}")
        for layer in range(2)
        for kind in ("key", "value")
    ]
    assert form.caches[0].sized(3, 5) == (3, 2, 5, 16)


def test_free_sizes_of_a_cache_are_the_batch_and_the_positions() -> None:
    joined = Cache("past_0", "present_0", np.dtype(np.float32), (2, None, 4, None, 8))
    assert joined.sized(3, 7) == (2, 3, 4, 7, 8)
    single = Cache("past", "present", np.dtype(np.float32), (1, 4, None, 8))
    assert single.sized(1, 7) == (1, 4, 7, 8)


@pytest.mark.parametrize("file", ["model.onnx", "small.onnx"])
def test_tokens_one_by_one_give_what_a_whole_pass_gives(decoder_folder: Path, file: str) -> None:
    decoder = open_decoder(decoder_folder / file)
    whole = decoder.logits(TOKENS)
    assert whole.shape == (1, 7, 320) and decoder.position == 0
    parts = [decoder.step(TOKENS[:, :3])]
    parts += [decoder.step(TOKENS[:, place : place + 1]) for place in range(3, 7)]
    assert decoder.position == 7
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=2e-4 * np.abs(whole).max())


@pytest.mark.parametrize("name", ["tiny_random_gpt2", "tiny_random_lfm2"])
def test_decoders_of_other_tools_are_run_alike(data_folder: Path, name: str) -> None:
    """Keys and values joined in one tensor, layers without a cache, fused attention."""
    decoder = open_decoder(data_folder / "models" / f"{name}.onnx")
    whole = decoder.logits(TOKENS)
    parts = np.concatenate([decoder.step(TOKENS[:, :4]), decoder.step(TOKENS[:, 4:])], 1)
    np.testing.assert_allclose(parts, whole, atol=1e-4 * np.abs(whole).max())


def test_sequences_of_a_batch_do_not_mix(decoder_folder: Path) -> None:
    decoder = open_decoder(decoder_folder / "model.onnx")
    both = decoder.logits(np.concatenate([TOKENS, TOKENS[:, ::-1]]))
    np.testing.assert_allclose(both[1:], decoder.logits(TOKENS[:, ::-1]), atol=1e-4)


def test_a_model_without_a_cache_makes_whole_passes_only(
    language_model_path: Path,
) -> None:
    decoder = open_decoder(language_model_path)
    assert decoder.interface.caches == ()
    assert decoder.logits(TOKENS).shape[:2] == TOKENS.shape
    with pytest.raises(UsageError, match="no KV cache"):
        decoder.step(TOKENS)


def test_a_filled_cache_is_one_of_so_many_positions(decoder_folder: Path) -> None:
    decoder = open_decoder(decoder_folder / "model.onnx")
    decoder.fill(40)
    assert decoder.position == 40
    assert decoder.step(TOKENS[:, :1]).shape == (1, 1, 320)
    assert decoder.position == 41


def write_model(path: Path, inputs: list[str], outputs: list[str]) -> Path:
    """A model that adds its inputs, which are all ``(batch, 1, 2)``."""
    shape = ["batch", 1, 2]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in inputs]
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in outputs]
    nodes = [helper.make_node("Sum", inputs, [name]) for name in outputs]
    graph = helper.make_graph(nodes, "g", values, results)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def test_other_models_are_refused_with_what_is_missing(tmp_path: Path) -> None:
    for inputs, outputs, words in (
        (["image"], ["logits"], "no input like 'image'"),
        (["attention_mask"], ["logits"], "takes tokens"),
        (["input_ids"], ["a", "b"], "is called logits"),
        (["input_ids", "past_0", "past_1"], ["logits", "other"], "takes 2 caches and returns 1"),
    ):
        path = write_model(tmp_path / "model.onnx", inputs, outputs)
        with pytest.raises(ModelError, match=words) as caught:
            open_decoder(path)
        assert "input_ids" in caught.value.hint


def test_tokens_that_the_table_lacks_are_an_error(decoder_folder: Path) -> None:
    with pytest.raises(ModelError, match="cannot run the model"):
        open_decoder(decoder_folder / "model.onnx").logits(np.array([[320]]))
