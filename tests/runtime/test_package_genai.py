"""Folders for onnxruntime-genai hold the original's files and a decoder that it loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxcomp
from onnxcomp import package
from onnxcomp.errors import UsageError
from onnxcomp.runtime.language.decoder import Decoder


@pytest.fixture
def original(twins: tuple[Path, Path], tmp_path: Path) -> Path:
    """A folder with a configuration, a decoder and its data, a tokenizer, and another model."""
    folder = tmp_path / "original"
    (folder / "vision").mkdir(parents=True)
    model = onnx.load(twins[0])
    onnx.save(model, folder / "decoder.onnx", save_as_external_data=True,
              location="decoder.onnx.data", size_threshold=0)  # fmt: skip
    shutil.copyfile(twins[0], folder / "vision" / "encoder.onnx")
    (folder / "tokenizer.json").write_text("{}")
    decoder = {"filename": "decoder.onnx", "head_size": 32, "session_options": {"log_id": "a"}}
    write_config(folder, {"model": {"type": "llama", "decoder": decoder}, "search": {"top_k": 1}})
    return folder


def write_config(folder: Path, config: Any) -> None:
    (folder / "genai_config.json").write_text(json.dumps(config), encoding="utf-8")


def read_config(folder: Path) -> Any:
    return json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))


@pytest.mark.usefixtures("library")
def test_the_decoder_is_replaced_and_the_rest_stays(
    twins: tuple[Path, Path], original: Path, tmp_path: Path
) -> None:
    made = package(twins[1], tmp_path / "out", "genai", like=original)
    assert sorted(made.manifest["files"]) == [
        "genai_config.json", "libonnxcomp_ops.so", "model.onnx", "tokenizer.json",
        "vision/encoder.onnx",
    ]  # fmt: skip
    config = read_config(made.path)
    options = {"log_id": "a", "custom_ops_library": "libonnxcomp_ops.so"}
    decoder = {"filename": "model.onnx", "head_size": 32, "session_options": options}
    assert config["model"]["decoder"] == decoder
    assert config["search"] == {"top_k": 1} and config["model"]["type"] == "llama"
    assert "custom_ops_library" not in json.dumps(read_config(original))
    # A folder that is compressed where it lies.
    shutil.copyfile(twins[1], original / "small.onnx")
    again = package(original / "small.onnx", tmp_path / "again", "genai", portable=True)
    assert sorted(again.manifest["files"]) == [
        "genai_config.json", "model.onnx", "tokenizer.json", "vision/encoder.onnx",
    ]  # fmt: skip
    assert "custom_ops_library" not in json.dumps(read_config(again.path))


def test_configurations_that_do_not_fit_are_refused(
    twins: tuple[Path, Path], original: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"

    def refused(words: str, like: Path = original) -> None:
        with pytest.raises(UsageError, match=words):
            package(twins[0], target, "genai", like=like)

    refused(r"cannot read .*genai_config\.json", like=tmp_path)
    good = read_config(original)
    for decoder, words in (
        ({"pipeline": [{}]}, "pipeline of several models"),
        ({"session_options": {"custom_ops_library": "other.so"}}, "library already: other.so"),
        ({"filename": "vision/encoder.onnx"}, "'hidden'"),
        (None, "does not describe a decoder"),
    ):
        if words == "'hidden'":
            model = onnx.load(twins[0])
            model.graph.output.add(name="hidden").type.tensor_type.elem_type = 1
            onnx.save(model, original / "vision" / "encoder.onnx")
        write_config(original, {**good, "model": {"decoder": decoder}})
        refused(words)
    (original / "genai_config.json").write_text("{")
    refused("cannot read")
    assert not target.exists()


@pytest.fixture
def compressed(data_folder: Path, tmp_path: Path) -> Path:
    """A language model without definitions of its operators: it runs with the library only."""
    source = data_folder / "lm" / "tinyllama_ref_kv.onnx"
    if not source.exists():
        pytest.skip(f"no language model at {source}")
    onnxcomp.optimize(source, tmp_path / "small.onnx", bits=4, portable=False, verify=False)
    decoder = {
        "filename": "small.onnx", "head_size": 32, "hidden_size": 256, "num_attention_heads": 8,
        "num_hidden_layers": 6, "num_key_value_heads": 4,
        "inputs": {
            "input_ids": "input_ids", "attention_mask": "attention_mask",
            "position_ids": "position_ids", "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits", "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }  # fmt: skip
    model = {"type": "llama", "vocab_size": 2048, "context_length": 256, "decoder": decoder}
    model |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    search = {"max_length": 40, "past_present_share_buffer": False, "do_sample": False}
    write_config(tmp_path, {"model": model, "search": search})
    return tmp_path / "small.onnx"


def generated(genai: Any, folder: Path) -> list[int]:
    """Tokens that onnxruntime-genai writes after some others."""
    loaded = genai.Model(str(folder))
    parameters = genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=24)
    generator = genai.Generator(loaded, parameters)
    generator.append_tokens([5, 77, 300, 12])
    while not generator.is_done():
        generator.generate_next_token()
    return list(generator.get_sequence(0))


def test_generation_by_the_compressed_decoder(compressed: Path, tmp_path: Path) -> None:
    """onnxruntime-genai loads the library from the folder, and writes what it writes alone."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    made = package(compressed, tmp_path / "out", "genai")
    assert not made.manifest["portable"]
    wanted = greedy(made.path / "model.onnx", [5, 77, 300, 12], 24)
    assert generated(genai, made.path) == wanted


@pytest.fixture
def hugging_face(decoder_folder: Path, tmp_path: Path) -> Path:
    """A folder as Hugging Face writes it, with the dense model and the compressed one."""
    folder = tmp_path / "exported"
    shutil.copytree(decoder_folder, folder)
    return folder


def test_a_folder_of_hugging_face_gets_a_configuration(hugging_face: Path, tmp_path: Path) -> None:
    made = package(hugging_face / "small.onnx", tmp_path / "out", "genai", portable=True)
    assert sorted(made.manifest["files"]) == [
        "chat_template.jinja", "config.json", "genai_config.json", "model.onnx", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert made.notes == ("genai_config.json was made from config.json",)
    model = read_config(made.path)["model"]
    decoder = model.pop("decoder")
    assert model == {
        "type": "llama", "vocab_size": 320, "context_length": 512, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    assert decoder["inputs"] == {
        "input_ids": "input_ids", "attention_mask": "attention_mask",
        "position_ids": "position_ids", "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }  # fmt: skip
    names = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers")
    assert [decoder[name] for name in (*names, "num_key_value_heads")] == [16, 64, 4, 2, 2]
    stored = json.loads((made.path / "tokenizer_config.json").read_text())
    assert stored["tokenizer_class"] == "GPT2Tokenizer" and stored["eos_token"] == "<|im_end|>"
    # Other forms of the weights, and packages that were written there, are not taken over.
    (hugging_face / "model.safetensors").write_bytes(bytes(10))
    (hugging_face / "onnx").mkdir()
    shutil.copyfile(hugging_face / "small.onnx", hugging_face / "onnx" / "model.onnx")
    for _ in range(2):
        inside = hugging_face / "chat"
        kept = package(hugging_face / "small.onnx", inside, "genai", portable=True, force=True)
        assert kept.manifest["files"].keys() == made.manifest["files"].keys()
    generation = {"eos_token_id": [2, 0], "pad_token_id": 0}
    (hugging_face / "generation_config.json").write_text(json.dumps(generation))
    again = package(hugging_face / "small.onnx", tmp_path / "again", "genai", portable=True)
    model = read_config(again.path)["model"]
    assert (model["eos_token_id"], model["pad_token_id"]) == ([2, 0], 0)


def test_a_folder_of_hugging_face_that_lacks_something_is_refused(
    hugging_face: Path, language_model_path: Path, tmp_path: Path
) -> None:
    config = json.loads((hugging_face / "config.json").read_text())
    for name in ("hidden_size", "vocab_size", "eos_token_id"):
        left = {key: value for key, value in config.items() if key != name}
        (hugging_face / "config.json").write_text(json.dumps(left))
        with pytest.raises(UsageError, match=f"does not say '{name}'"):
            package(hugging_face / "small.onnx", tmp_path / "out", "genai", portable=True)
    with pytest.raises(UsageError, match="has no KV cache"):
        package(language_model_path, tmp_path / "out", "genai", like=hugging_face)


@pytest.mark.usefixtures("library")
def test_chat_by_a_folder_of_hugging_face(hugging_face: Path, tmp_path: Path) -> None:
    """Template, tokenizer and streaming of onnxruntime-genai give what the decoder gives."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    made = package(hugging_face / "small.onnx", tmp_path / "out", "genai")
    loaded = genai.Model(str(made.path))
    tokenizer = genai.Tokenizer(loaded)
    messages = json.dumps([{"role": "user", "content": "Hello, world"}])
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHello, world<|im_end|>\n<|im_start|>assistant\n"
    tokens = list(tokenizer.encode(prompt))
    own = tokenizers.Tokenizer.from_file(str(hugging_face / "tokenizer.json"))
    assert tokens == own.encode(prompt).ids
    parameters = genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=len(tokens) + 10)
    generator = genai.Generator(loaded, parameters)
    generator.append_tokens(tokens)
    stream, text = tokenizer.create_stream(), ""
    while not generator.is_done():
        generator.generate_next_token()
        text += stream.decode(generator.get_next_tokens()[0])
    written = list(generator.get_sequence(0))[len(tokens) :]
    decoder = Decoder(onnxcomp.InferenceSession(made.path / "model.onnx"))
    scores = decoder.step(np.array([tokens]))
    for token in written:
        assert int(scores[0, -1].argmax()) == token
        scores = decoder.step(np.array([[token]]))
    assert text.rstrip("\N{REPLACEMENT CHARACTER}") in own.decode(written)


def test_generation_by_the_execution_provider(compressed: Path, library: Path) -> None:
    """The same, where the library is registered as a plugin and named among the providers."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    if not hasattr(genai, "register_execution_provider_library"):
        pytest.skip("this onnxruntime-genai registers no execution providers")
    config = read_config(compressed.parent)
    providers = [{"OnnxCompExecutionProvider": {}}]
    config["model"]["decoder"]["session_options"] = {"provider_options": providers}
    write_config(compressed.parent, config)
    genai.register_execution_provider_library("onnxcomp", str(library))
    try:
        found = generated(genai, compressed.parent)
    finally:
        genai.unregister_execution_provider_library("onnxcomp")
    assert found == greedy(compressed, [5, 77, 300, 12], 24)


def greedy(model: Path, tokens: list[int], length: int) -> list[int]:
    """The likeliest tokens, by whole passes without a cache."""
    session = onnxcomp.InferenceSession(model)
    caches = {
        value.name: np.zeros((1, 4, 0, 32), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    while len(tokens) < length:
        ids = np.array([tokens])
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        feed |= {"position_ids": np.arange(len(tokens))[None], **caches}
        tokens = [*tokens, int(session.run(["logits"], feed)[0][0, -1].argmax())]
    return tokens
