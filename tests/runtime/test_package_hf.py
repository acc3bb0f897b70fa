"""Folders for the libraries around the Hugging Face hub; benchmarks/bench_hub.py runs these."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from onnxcomp import package
from onnxcomp.errors import UsageError

KEPT = {
    "tokenizer.json": "{}",
    "modules.json": "[]",
    "1_Pooling/config.json": "{}",
    "README.md": "the original's page",
}
DROPPED = ("model.safetensors", "pytorch_model.bin", "onnx/model.onnx_data", "openvino/model.xml")


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder as the hub has them."""
    folder = tmp_path / "hub"
    config = {"architectures": ["BertForTokenClassification"], "hidden_size": 40}
    files = KEPT | {"config.json": json.dumps(config)} | dict.fromkeys(DROPPED, "")
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def encoder(twins: tuple[Path, Path], tmp_path: Path) -> Path:
    """The compressed twin with the output that encoders have."""
    proto = onnx.load(twins[1])
    for node in proto.graph.node:
        for i, name in enumerate(node.output):
            if name == "logits":
                node.output[i] = "last_hidden_state"
    proto.graph.output[0].name = "last_hidden_state"
    path = tmp_path / "encoder.onnx"
    onnx.save(proto, path)
    return path


@pytest.mark.usefixtures("library")
def test_the_folder_has_the_original_without_its_weights(hub: Path, encoder: Path) -> None:
    package(encoder, hub / "earlier", "hf", like=hub)
    made = package(encoder, hub.parent / "out", "hf", like=hub, variant="q4")
    files = set(made.manifest["files"])
    assert files == {
        "config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json",
        "README.original.md", "README.md", "onnx/model_q4.onnx",
    }  # fmt: skip
    assert made.manifest["model"] == "onnx/model_q4.onnx" and made.manifest["library"] is None
    text = (made.path / "README.md").read_text(encoding="utf-8")
    for word in (
        'backend="onnx"', "ORTModelForFeatureExtraction", "dim=40", 'dtype: "q4"',
        "use_external_data_format: false", 'file_name="model_q4.onnx"', "patch_onnxruntime",
    ):  # fmt: skip
        assert word in text
    assert "@" not in text.replace("@huggingface", "")
    for block in text.split("```python\n")[1:]:
        compile(block.split("```")[0], "README.md", "exec")


@pytest.mark.usefixtures("library")
def test_data_get_the_name_that_the_libraries_expect(hub: Path, encoder: Path) -> None:
    onnx.save(onnx.load(encoder), encoder, save_as_external_data=True, location="w.bin",
              size_threshold=256)  # fmt: skip
    made = package(encoder, hub.parent / "out", "hf", like=hub)
    assert {"onnx/model.onnx", "onnx/model.onnx_data"} <= set(made.manifest["files"])
    assert "use_external_data_format: true" in (made.path / "README.md").read_text()
    session = onnxruntime.InferenceSession(str(made.path / "onnx" / "model.onnx"))
    assert session.run(None, {"ids": np.ones((1, 3), np.int64)})[0].shape == (1, 3, 40)


@pytest.mark.usefixtures("library")
def test_other_heads_get_the_class_of_their_architecture(
    hub: Path, twins: tuple[Path, Path]
) -> None:
    made = package(twins[1], hub.parent / "out", "hf", like=hub)
    text = (made.path / "README.md").read_text(encoding="utf-8")
    assert "ORTModelForTokenClassification" in text and "fastembed" not in text


def test_what_is_no_folder_of_the_hub_is_refused(hub: Path, twins: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*config\.json") as caught:
        package(twins[0], hub.parent / "out", "hf")
    assert "--like" in caught.value.hint
    with pytest.raises(UsageError, match="small letters and digits"):
        package(twins[0], hub.parent / "out", "hf", like=hub, variant="../q4")
