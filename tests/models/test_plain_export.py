"""Modules made by `share` keep their memory when torch exports them, without our own `export`."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import onnxcomp

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from onnxcomp.models import share  # noqa: E402
from onnxcomp.models.shared_layers import SharedLayer  # noqa: E402
from onnxcomp.passes.codecs.hash.format import Sharing  # noqa: E402
from onnxcomp.passes.transforms.shared_lookups import places_name  # noqa: E402

EXPORTERS = ("dynamo", "torchscript")


class Small(nn.Module):
    """Every kind of layer that can share, odd sizes, and a table tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 64)
        self.wide = nn.Linear(64, 200)
        self.narrow = nn.Linear(200, 64, bias=False)
        self.window = nn.Conv2d(8, 64, 3, stride=2, padding=1)
        self.head = nn.Linear(64, 300)
        self.head.weight = self.table.weight

    def forward(self, ids: Any, image: Any) -> Any:
        x = self.narrow(torch.relu(self.wide(self.table(ids))))
        return self.head(x + self.window(image).mean((2, 3))[:, None])


def small(compression: float = 16.0, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return share(Small(), compression, **options).eval()


def arguments() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 300, (2, 5), generator=generator)
    return ids, torch.randn(2, 8, 9, 9, generator=generator)


def exported(module: Any, args: Any, path: Path, exporter: str) -> onnx.ModelProto:
    """What a user's plain call writes; messages of the exporters are not ours to test."""
    options = {"verbose": False, "external_data": False} if exporter == "dynamo" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, args, str(path), dynamo=exporter == "dynamo", **options)
    return onnx.load(path)


def outputs(path: Path, args: Any) -> Any:
    """Outputs in plain ONNX Runtime, without our library."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return session.run(None, dict(zip(names, (a.numpy() for a in args), strict=True)))[0]


def stored(model: onnx.ModelProto) -> int:
    """Bytes of all tensors."""
    values = [node.attribute[0].t for node in model.graph.node if node.op_type == "Constant"]
    return sum(
        numpy_helper.to_array(tensor).nbytes for tensor in [*model.graph.initializer, *values]
    )


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node if node.domain)


def memories(model: onnx.ModelProto) -> list[Any]:
    named = [t for t in model.graph.initializer if "hash.memory" in t.name]
    return [numpy_helper.to_array(tensor) for tensor in named]


def shared(module: nn.Module) -> list[SharedLayer]:
    return [layer for layer in module.modules() if isinstance(layer, SharedLayer)]


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("compression", [1, 4, 16, 64])
def test_what_was_trained_is_stored_bit_for_bit(
    tmp_path: Path, exporter: str, compression: int
) -> None:
    module = small(compression)
    with torch.no_grad():
        expected = module(*arguments()).numpy()
    plain, out = tmp_path / "plain.onnx", tmp_path / "out.onnx"
    model = exported(module, arguments(), plain, exporter)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    np.testing.assert_allclose(outputs(plain, arguments()), expected, rtol=1e-4, atol=1e-5)
    values, tiles = module.table.memory.values.detach().numpy(), module.table.memory.tiles
    # 5 bytes for each tile of 256 weights beside the memory, twice for the table that is tied.
    assert stored(model) < values.nbytes + 10 * tiles + 4_000

    result = onnxcomp.optimize(plain, out, method="hash")
    assert result.verify is not None and result.verify.passed
    written = onnx.load(out)
    assert operators(written) == {"HashGather": 1, "HashMatMul": 3, "HashWeight": 1}
    [memory] = memories(written)
    assert np.array_equal(memory.view(np.uint32), values.view(np.uint32))
    assert not any("places_" in tensor.name for tensor in written.graph.initializer)
    np.testing.assert_allclose(outputs(out, arguments()), expected, rtol=1e-4, atol=1e-5)
    assert any("trained to share, exact" in site.reason for site in result.report.sites)

    onnxcomp.expand(out, plain)
    found = [numpy_helper.to_array(tensor) for tensor in onnx.load(plain).graph.initializer]
    for weight in (layer.weight.detach().numpy() for layer in shared(module)):
        assert any(np.array_equal(array, shape) for array in found for shape in (weight, weight.T))


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_sixteen_times_fewer_numbers_are_a_file_sixteen_times_smaller(
    tmp_path: Path, exporter: str
) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(1024, 1024, bias=False) for _ in range(4)]
    dense, module = nn.Sequential(*layers), nn.Sequential(*layers)
    size = sum(p.numel() for p in dense.parameters()) * 4
    plain, out = tmp_path / "plain.onnx", tmp_path / "out.onnx"
    exported(share(module, 16).eval(), (torch.zeros(1, 1024),), plain, exporter)
    assert size / plain.stat().st_size > 14.0
    onnxcomp.optimize(plain, out, verify=False)
    assert size / out.stat().st_size > 15.0


@pytest.mark.parametrize(
    ("exporter", "options"),
    [
        ("dynamo", {"map": "roast", "seed": 2**40 + 123456789}),
        ("torchscript", {"map": "roast"}),
        ("torchscript", {"memory": "module"}),
    ],
)
def test_maps_memories_and_seeds_of_all_kinds_are_found(
    tmp_path: Path, exporter: str, options: dict[str, Any]
) -> None:
    module = small(8.0, **options)
    exported(module, arguments(), tmp_path / "plain.onnx", exporter)
    onnxcomp.optimize(tmp_path / "plain.onnx", tmp_path / "out.onnx", method="hash", verify=False)
    found = {memory.tobytes() for memory in memories(onnx.load(tmp_path / "out.onnx"))}
    assert found == {layer.memory.values.detach().numpy().tobytes() for layer in shared(module)}


def test_programs_of_torch_export_and_traces_keep_their_memory(tmp_path: Path) -> None:
    module = small()
    program = torch.export.export(module, arguments())
    exported(program, (), tmp_path / "program.onnx", "dynamo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(module, arguments())
    exported(traced, arguments(), tmp_path / "traced.onnx", "torchscript")
    for name in ("program", "traced"):
        onnxcomp.optimize(tmp_path / f"{name}.onnx", tmp_path / "out.onnx", verify=False)
        written = onnx.load(tmp_path / "out.onnx")
        assert operators(written) == {"HashGather": 1, "HashMatMul": 3, "HashWeight": 1}


def test_what_is_exported_is_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    module = small(4.0)
    plain = [layer.weight.detach() for layer in shared(module)]
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    for layer, weight in zip(shared(module), plain, strict=True):
        assert torch.equal(layer.weight, weight)


def test_the_state_is_that_of_the_memory_and_the_rest() -> None:
    names = set(small().state_dict())
    memory = {"table.shared_memory.values", "table.shared_memory._extra_state"}
    assert names == memory | {"wide.bias", "window.bias", "head.bias"}


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    torch.manual_seed(0)
    module = share(nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)), 4).eval()
    path = tmp_path_factory.mktemp("two") / "plain.onnx"
    return exported(module, (torch.zeros(3, 128),), path, "dynamo")


@pytest.mark.parametrize("change", ["name", "table", "memory of integers", "excluded"])
def test_look_ups_that_are_not_understood_stay_as_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, two_layers: onnx.ModelProto, change: str
) -> None:
    model, args = onnx.ModelProto(), (torch.ones(3, 128),)
    model.CopyFrom(two_layers)
    [first, _] = [t for t in model.graph.initializer if t.name.endswith(".slots")]
    if change == "name":
        old, first.name = first.name, "table"
        for node in model.graph.node:
            node.input[:] = ["table" if name == old else name for name in node.input]
    elif change == "table":
        slots = numpy_helper.to_array(first).copy()
        slots[0, 0] += 1
        first.CopyFrom(numpy_helper.from_array(slots, first.name))
    elif change == "memory of integers":
        keep_as_int8(model)
    onnx.save(model, tmp_path / "changed.onnx")
    expected = outputs(tmp_path / "changed.onnx", args)
    excluded = ["^0.weight"] if change == "excluded" else []
    with caplog.at_level(logging.WARNING):
        onnxcomp.optimize(
            tmp_path / "changed.onnx", tmp_path / "out.onnx", bits=8, exclude=excluded
        )
    np.testing.assert_allclose(outputs(tmp_path / "out.onnx", args), expected, atol=0.03)
    if change == "excluded":
        assert "stored twice" in caplog.text and "matches no weight" not in caplog.text


def test_a_weight_that_is_left_out_keeps_its_values(
    tmp_path: Path, two_layers: onnx.ModelProto
) -> None:
    onnx.save(two_layers, tmp_path / "plain.onnx")
    args = (torch.ones(3, 128),)
    expected = outputs(tmp_path / "plain.onnx", args)
    for method in ("auto", "hash"):  # both would store its memory with a loss
        onnxcomp.optimize(
            tmp_path / "plain.onnx", tmp_path / "out.onnx", bits=2, method=method,
            exclude=["^0.weight"], min_size=64,
        )  # fmt: skip
        np.testing.assert_allclose(outputs(tmp_path / "out.onnx", args), expected, atol=1e-5)


@pytest.mark.parametrize("freeze", [False, True])
def test_memories_that_are_listed_as_inputs_are_known_once_nobody_feeds_them(
    tmp_path: Path, two_layers: onnx.ModelProto, freeze: bool
) -> None:
    model, args = onnx.ModelProto(), (torch.ones(3, 128),)
    model.CopyFrom(two_layers)
    for tensor in two_layers.graph.initializer:
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(info)
    onnx.save(model, tmp_path / "listed.onnx")
    result = onnxcomp.optimize(
        tmp_path / "listed.onnx", tmp_path / "out.onnx", method="hash", freeze_inputs=freeze
    )
    names = [site.name for site in result.report.sites]
    assert any("hash.memory" in name for name in names) == freeze
    assert any(name.endswith(".values") for name in names) != freeze
    expected = outputs(tmp_path / "listed.onnx", args)
    np.testing.assert_allclose(outputs(tmp_path / "out.onnx", args), expected, atol=1e-5)


def keep_as_int8(model: onnx.ModelProto) -> None:
    """Keep the memory as int8, dequantised in the graph."""
    [tensor] = [t for t in model.graph.initializer if t.name.endswith(".values")]
    values = numpy_helper.to_array(tensor)
    scale = np.float32(np.abs(values).max() / 127)
    name = tensor.name
    codes = np.rint(values / scale).astype(np.int8)
    tensor.CopyFrom(numpy_helper.from_array(codes, "codes"))
    model.graph.initializer.append(numpy_helper.from_array(scale, "step"))
    node = onnx.helper.make_node("DequantizeLinear", ["codes", "step"], [name])
    model.graph.node.insert(0, node)


def test_names_that_are_no_maps_are_ignored() -> None:
    from onnxcomp.passes.transforms.shared_lookups import _named

    sharing = Sharing(74, 5, 6, 128)
    name = places_name(sharing)
    assert _named(f"a.b.{name}.slots") == ("a.b", sharing)
    assert _named(f"/a/b/{name}/Gather_2") == ("a.b", sharing)
    assert _named(name) == ("", sharing)
    for wrong in ("places_1_2_3", "replaces_1_2_3_4", "places_1_0_3_4", f"places_{2**31}_1_3_4"):
        assert _named(wrong) is None


@pytest.mark.skipif(
    importlib.util.find_spec("optimum") is None, reason="optimum is not installed here"
)
# Levels of optimization multiply weights out; O2 makes those of each attention one tensor.
@pytest.mark.parametrize("optimize", [None, "O1", "O2"])
def test_models_that_optimum_exports_keep_their_memory(tmp_path: Path, optimize: Any) -> None:
    transformers = pytest.importorskip("transformers")
    convert = pytest.importorskip("optimum.exporters.onnx", reason="no exporter of optimum")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=256, max_position_embeddings=64,
    )  # fmt: skip
    module = share(transformers.BertModel(config), 16).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert.onnx_export_from_model(
            module, tmp_path, task="feature-extraction", optimize=optimize, do_validation=False
        )
    onnxcomp.optimize(tmp_path / "model.onnx", tmp_path / "out.onnx", method="hash", verify=False)
    written = onnx.load(tmp_path / "out.onnx")
    [memory] = memories(written)
    [expected] = {id(layer.memory): layer.memory for layer in shared(module)}.values()
    values = expected.values.detach().numpy()
    if optimize is None:
        assert np.array_equal(memory, values)
    else:  # rounded products with a scale have more than one origin
        np.testing.assert_allclose(memory[memory != 0], values[memory != 0], rtol=3e-7)
    hashed = sum(n for name, n in operators(written).items() if name.startswith("Hash"))
    # Nobody reads the pooler.
    assert hashed == len(shared(module)) - (5 if optimize == "O2" else 1)
