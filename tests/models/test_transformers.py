"""Models of transformers, with their caches, become small ONNX models that generate the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxcomp
from onnxcomp.errors import ModelError, RuntimeMissingError, UsageError
from onnxcomp.models import decoder_example, export
from onnxcomp.ops import library_path
from onnxcomp.runtime.language.decoder import Decoder

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[torch]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WIDTH, HEADS, LAYERS, TOKENS = 64, 4, 1, 128
COMMON = {"vocab_size": TOKENS, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2}


pytestmark = pytest.mark.usefixtures("one_thread_and_seed")


@pytest.fixture
def library() -> Path:
    """The operator library; tests that need it skip where it is not built."""
    try:
        return library_path()
    except RuntimeMissingError as error:
        pytest.skip(f"the operator library is not built: {error}")


def qwen3() -> Any:
    config = transformers.Qwen3Config(
        **COMMON, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=LAYERS, head_dim=16,
        num_attention_heads=HEADS, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config).eval()


def gpt2() -> Any:
    config = transformers.GPT2Config(
        **COMMON, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64
    )
    return transformers.GPT2LMHeadModel(config).eval()


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=TOKENS, d_model=WIDTH, encoder_layers=1, decoder_layers=LAYERS, num_mel_bins=8,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=96,
        decoder_ffn_dim=96, max_source_positions=20, max_target_positions=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config).eval()


def generated(session: Any, prompt: Sequence[int], steps: int) -> list[int]:
    """Greedy tokens behind a prompt, with a cache that starts empty."""
    decoder, step = Decoder(session), list(prompt)
    caches = {cache.past: cache.present for cache in decoder.interface.caches}
    assert len(caches) == 2 * LAYERS
    assert caches == {past: past.replace("past_key_values", "present") for past in caches}
    tokens: list[int] = []
    for _ in range(steps):
        step = [int(decoder.step(np.array([step]))[0, -1].argmax())]
        tokens += step
    return tokens


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("make", "exporter"), [(qwen3, "dynamo"), (gpt2, "torchscript")], ids=["qwen3", "gpt2"]
)
def test_decoders_with_a_cache_generate_the_same_tokens(
    make: Any, exporter: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, small, dense = make(), tmp_path / "small.onnx", tmp_path / "dense.onnx"
    result = export(
        model, (), small, **decoder_example(model), exporter=exporter, dense=dense, bits=4,
        min_size="4KiB", precision="exact",
    )  # fmt: skip
    assert capfd.readouterr() == ("", "")
    assert result.report.coverage == 1 and result.verify is not None and result.verify.passed
    check = result.torch
    assert check is not None and check.samples == 3  # of other sizes, one without a cache yet
    assert all(found.rel_l2 <= check.tolerance < 1e-3 for found in check.exported.values())
    sites = {site.name: site for site in result.report.sites}
    matrices = {name for name, weight in model.named_parameters() if weight.dim() == 2}
    assert matrices <= set(sites), "weights keep the names of their parameters"
    table = next(name for name in matrices if "embed_tokens" in name or "wte" in name)
    assert set(sites[table].uses) == {"Gather", "MatMul"}, "the tied table is one weight"
    tables = [t.name for t in onnx.load(dense).graph.initializer if TOKENS in t.dims]
    assert tables == [table], "stored once"
    prompt = [3, 14, 15, 92]
    wanted = model.generate(
        torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()  # fmt: skip
    import onnxruntime

    assert generated(onnxruntime.InferenceSession(dense), prompt, 8) == wanted
    portable = generated(onnxruntime.InferenceSession(small), prompt, 8)
    assert generated(onnxcomp.InferenceSession(small), prompt, 8) == portable


def speech_step(model: Any, batch: int, length: int, past: int) -> dict[str, Any]:
    """Arguments of a step of a decoder that listens to an encoder."""
    sound = torch.randn(batch, 8, 40)
    ids = torch.randint(3, TOKENS, (batch, past + length))
    with torch.no_grad():
        found = model(sound, decoder_input_ids=ids[:, :past], use_cache=True)
    name = "cache" if "cache" in found else "past_key_values"
    return {
        "encoder_outputs": (found.encoder_last_hidden_state,),
        "decoder_input_ids": ids[:, past:],
        "decoder_attention_mask": torch.ones(batch, past + length, dtype=torch.int64),
        name: found[name],
        "use_cache": True,
    }


def test_decoders_that_listen_to_an_encoder_keep_both_caches(tmp_path: Path) -> None:
    model, path = whisper(), tmp_path / "decoder.onnx"
    free = {
        "decoder_input_ids": {0: "batch", 1: "length"},
        "decoder_attention_mask": {0: "batch", 1: "total"},
        "encoder_outputs": [{0: "batch", 1: "source"}],
    }
    result = export(
        model, (), path, kwargs=speech_step(model, 2, 2, 3), dynamic_shapes=free,
        checks=[speech_step(model, 1, 1, 5)], exporter="torchscript", bits=5, min_size="4KiB",
    )  # fmt: skip
    assert result.torch is not None and result.report.coverage == 1
    graph = onnx.load(path).graph
    given = {value.name for value in graph.input}
    made = {value.name for value in graph.output}
    assert {"past_key_values.0.decoder.key", "past_key_values.0.encoder.value"} <= given
    assert {"logits", "present.0.decoder.key", "present.0.decoder.value"} <= made
    assert not [name for name in made if ".encoder." in name], "they come out as they went in"


def test_what_cannot_be_exported_says_what_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, path = gpt2(), tmp_path / "m.onnx"
    ids = torch.tensor([[3, 4]])
    with pytest.raises(UsageError, match="DynamicCache is empty") as empty:
        export(model, (ids,), path, kwargs={"past_key_values": transformers.DynamicCache()})
    assert "decoder_example(model)" in (empty.value.hint or "")

    class Stubborn(torch.nn.Module):  # type: ignore[name-defined, misc]
        def forward(self, ids: Any, use_cache: bool = True) -> Any:
            return torch.linalg.eig(torch.ones(3, 3) * ids.sum())[0].real

    with pytest.raises(ModelError, match="cannot export Stubborn with torchscript") as caught:
        export(Stubborn(), ids, path, kwargs={"use_cache": True}, exporter="torchscript")
    assert "exporter='dynamo'" in (caught.value.hint or "")
    assert "'use_cache': False" in (caught.value.hint or "")
    assert len(caught.value.message.splitlines()) == 1 and len(caught.value.message) < 400
    assert capfd.readouterr() == ("", ""), "torch prints the whole graph"
