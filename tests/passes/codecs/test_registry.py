"""Codecs of other packages: one file and an entry point each."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import pytest

import onnxcomp
from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.registry import GROUP, CodecRegistry
from onnxcomp.passes.config.methods import method_names
from onnxcomp.passes.encoding.payload_cache import code_version

ROWS = '''
"""One signed byte for each weight and one scale for each row."""

from typing import ClassVar

import numpy as np

from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec, Payload, TensorLayout


class RowCodec(Codec):
    name: ClassVar[str] = "rows8"
    summary: ClassVar[str] = "a byte for each weight and a scale for each row"
    params_type: ClassVar[type[Params]] = Params

    def layout(self, site, params):
        return {
            "codes": TensorLayout((site.rows, site.length), np.dtype(np.int8)),
            "scales": TensorLayout((site.rows, 1), np.dtype(np.float32)),
        }

    def predict(self, site, params):
        return 0.008

    def encode(self, site, weight, params, *, threads=1):
        scales = np.abs(weight).max(axis=1, keepdims=True).astype(np.float32) / np.float32(127)
        scales[scales == 0] = 1
        return Payload({"codes": np.rint(weight / scales).astype(np.int8), "scales": scales})

    def decode(self, site, payload):
        return payload.tensors["codes"].astype(np.float32) * payload.tensors["scales"]

    def emit(self, builder, site, payload, kind, x):
        codes = builder.node("Cast", [builder.tensor("codes")], {"to": 1})
        return builder.node("Mul", [codes, builder.tensor("scales")])
'''


class Installer(Protocol):
    """Puts a package with one codec on the path."""

    def __call__(self, package: str, text: str, *, codec: str, target: str) -> None: ...


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Installer]:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    modules = set(sys.modules)

    def made(package: str, text: str, *, codec: str, target: str) -> None:
        module = package.replace("-", "_")
        (folder / f"{module}.py").write_text(text)
        about = folder / f"{module}-1.5.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
        (about / "entry_points.txt").write_text(f"[{GROUP}]\n{codec} = {module}:{target}\n")

    yield made
    for name in set(sys.modules) - modules:
        if name.startswith("other_"):
            del sys.modules[name]


@pytest.fixture
def registry() -> CodecRegistry:
    """The codecs of this package, and whatever is found on the path now."""
    return CodecRegistry(list(CODECS.values()))


@pytest.fixture
def known(registry: CodecRegistry, monkeypatch: pytest.MonkeyPatch) -> Iterator[CodecRegistry]:
    """The same in the place of the codecs that the compiler knows."""
    before = dict(vars(CODECS))
    vars(CODECS).update(vars(registry))
    yield registry
    vars(CODECS).update(before)


def test_a_codec_of_one_file_is_used_by_its_name(
    install: Installer, known: CodecRegistry, tmp_path: Path, tools: Any
) -> None:
    install("other-rows", ROWS, codec="rows8", target="RowCodec")
    weight = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    onnx.save(
        onnx.helper.make_model(
            onnx.helper.make_graph(
                [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
                "g",
                [onnx.helper.make_tensor_value_info("x", 1, ["n", 64])],
                [onnx.helper.make_tensor_value_info("y", 1, ["n", 48])],
                [onnx.numpy_helper.from_array(weight, "w")],
            ),
            opset_imports=[onnx.helper.make_opsetid("", 17)],
            ir_version=8,
        ),
        tmp_path / "model.onnx",
    )
    result = onnxcomp.optimize(
        tmp_path / "model.onnx", tmp_path / "small.onnx", method="rows8", min_size=0
    )
    (site,) = result.report.sites
    assert site.method == "rows8" and site.bytes_after == 64 * 48 + 4 * 48
    x = np.eye(64, dtype=np.float32)
    (y,) = tools.run(tmp_path / "small.onnx", {"x": x})
    assert np.linalg.norm(y - weight) < 0.01 * np.linalg.norm(weight)
    assert code_version(CODECS["rows8"]) != code_version(CODECS["int"])


def test_packages_are_imported_when_a_codec_is_asked_for(
    install: Installer, registry: CodecRegistry
) -> None:
    install("other-rows", ROWS, codec="rows8", target="RowCodec")
    assert "rows8" in registry and "hyper" in registry and "rows9" not in registry
    assert registry["hyper"].name == "hyper"
    assert "other_rows" not in sys.modules
    assert list(registry)[-1] == "rows8" and "other_rows" in sys.modules
    assert len(registry) == len(CODECS) + 1


def test_a_broken_package_is_named_when_it_is_asked_for_and_else_a_warning(
    install: Installer, registry: CodecRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    install("other-broken", "import a_module_that_is_not", codec="broken", target="Codec")
    with caplog.at_level(logging.WARNING):
        assert method_names("auto", registry) == method_names("auto", CODECS)
        assert "broken" not in list(registry)
    (record,) = caplog.records
    assert "other-broken 1.5" in record.getMessage()
    with pytest.raises(UsageError, match=r"'broken'.*other-broken 1\.5.*a_module_that_is_not"):
        registry["broken"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class C: name = 'c'", "has no .*decode"),
        (ROWS + "\nC = RowCodec", "is the codec 'rows8'"),
        (ROWS.replace("def decode", "def decode_all") + "\nC = RowCodec", "abstract"),
    ],
)
def test_what_is_no_codec_of_that_name_is_refused(
    install: Installer, registry: CodecRegistry, text: str, message: str
) -> None:
    install("other-wrong", text, codec="c", target="C")
    with pytest.raises(UsageError, match=message):
        registry["c"]


def test_two_codecs_of_one_name_are_an_error(install: Installer, registry: CodecRegistry) -> None:
    install("other-hyper", ROWS, codec="hyper", target="RowCodec")
    with pytest.raises(UsageError, match=r"other-hyper 1\.5 .*'hyper', which is taken"):
        list(registry)


def test_two_packages_with_one_codec_are_an_error(
    install: Installer, registry: CodecRegistry
) -> None:
    install("other-one", ROWS, codec="rows8", target="RowCodec")
    install("other-two", ROWS, codec="rows8", target="RowCodec")
    with pytest.raises(UsageError, match="both have a codec named 'rows8'"):
        registry["rows8"]
