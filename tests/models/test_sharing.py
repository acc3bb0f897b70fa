"""Shared weights: trained as a memory, exported, and compiled bit for bit as they were trained."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import onnxcomp

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from onnxcomp.errors import ModelError, UsageError  # noqa: E402
from onnxcomp.models import export, share  # noqa: E402
from onnxcomp.models.shared_layers import (  # noqa: E402
    SharedConv2d,
    SharedEmbedding,
    SharedLayer,
    SharedLinear,
    SharedMemory,
)
from onnxcomp.models.sharing import multiplied_out  # noqa: E402
from onnxcomp.passes.codecs.hash import format as hash_format  # noqa: E402
from onnxcomp.passes.codecs.hash.format import ChunkLayout, Sharing, seeds  # noqa: E402


class Small(nn.Module):
    """Every kind of layer that can share, with a table tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 64)
        self.wide = nn.Linear(64, 200)
        self.narrow = nn.Linear(200, 64, bias=False)
        self.window = nn.Conv2d(8, 64, 3, stride=2, padding=1)
        self.head = nn.Linear(64, 300)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        x = self.narrow(torch.relu(self.wide(self.table(ids))))
        result: torch.Tensor = self.head(x + self.window(image).mean((2, 3))[:, None])
        return result


def arguments(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 300, (batch, 5), generator=generator)
    return ids, torch.randn(batch, 8, 9, 9, generator=generator)


def small(compression: float = 8.0, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return share(Small(), compression, **options)  # type: ignore[arg-type]


def layers(module: nn.Module) -> list[SharedLayer]:
    return [layer for layer in module.modules() if isinstance(layer, SharedLayer)]


@pytest.mark.parametrize("kind", ["fold", "roast"])
def test_weights_are_what_the_specification_says(kind: str) -> None:
    module = small(map=kind)
    for layer in layers(module):
        memory = layer.memory
        rotate, sign = seeds(memory.seed)
        run = memory.slots if kind == "fold" else 1
        sharing = Sharing(run, rotate, sign, layer.base)
        geometry = ChunkLayout(layer.rows, layer.length)
        scale = np.array([layer.scale], np.float32)
        expected = hash_format.expand(memory.values.detach().numpy(), scale, geometry, sharing)
        assert np.array_equal(layer.matrix().detach().numpy(), expected)


def test_every_kind_of_layer_is_replaced_and_common_weights_stay_common() -> None:
    module = small()
    kinds = [type(layer) for layer in layers(module)]
    assert kinds == [SharedEmbedding, SharedLinear, SharedLinear, SharedConv2d, SharedLinear]
    assert torch.equal(module.head.weight, module.table.weight)
    assert module.head.bias is not None
    assert module.narrow.bias is None


def test_the_state_has_the_size_of_the_memory(tmp_path: Path) -> None:
    module = small(8.0)
    memory = module.table.memory
    dense = sum(p.numel() for name, p in Small().named_parameters() if name.endswith("weight"))
    assert memory.values.numel() == pytest.approx(dense / 8, rel=0.1)
    torch.save(module.state_dict(), tmp_path / "state.pt")
    biases = 4 * (200 + 64 + 300)
    assert (tmp_path / "state.pt").stat().st_size < 4 * memory.values.numel() + biases + 8000
    other = small(8.0)
    with torch.no_grad():
        other.table.memory.values.zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(other(*arguments()), module(*arguments()))


def test_a_state_of_another_seed_is_refused() -> None:
    state = small(seed=1).state_dict()
    with pytest.raises(UsageError, match="seed 1"):
        small(seed=2).load_state_dict(state)


def test_weights_start_with_the_spread_of_dense_layers() -> None:
    torch.manual_seed(0)
    module = share(nn.Sequential(nn.Linear(512, 512), nn.Conv2d(64, 64, 3)), 2.0)
    assert module[0].weight.std().item() == pytest.approx(1 / math.sqrt(3 * 512), rel=0.02)
    assert module[1].weight.std().item() == pytest.approx(1 / math.sqrt(3 * 576), rel=0.02)


def test_as_many_entries_as_weights_are_the_dense_layer_bit_for_bit() -> None:
    layer = SharedLinear(48, 32, compression=1, std=SharedMemory(1).std)
    assert layer.scale == 1.0
    dense = torch.randn(32, 48)
    geometry = ChunkLayout(32, 48)
    with torch.no_grad():
        chunks = hash_format.to_chunks(dense.numpy(), geometry)
        layer.memory.values.copy_(torch.from_numpy(chunks.reshape(-1, 256)))
    assert torch.equal(layer.weight, dense)


def step(std: float, scaling: str) -> float:
    """Relative change of the weight by one step of SGD."""
    torch.manual_seed(0)
    memory = SharedMemory(8, std=std, scaling=scaling)  # type: ignore[arg-type]
    torch.manual_seed(1)
    with torch.no_grad():
        memory.values.copy_(torch.randn(8, 256) * std)
    layer = SharedLinear(128, 128, memory=memory)
    before = layer.weight.detach().clone()
    x, y = torch.randn(64, 128), torch.randn(64, 128)
    nn.functional.mse_loss(layer(x), y).backward()
    torch.optim.SGD(memory.parameters(), 0.1).step()
    return float((layer.weight.detach() - before).norm() / before.norm())


def test_with_scaling_a_step_does_not_depend_on_the_scale_of_the_memory() -> None:
    changes = [step(std, "count") for std in (1e-3, 1e-2, 1e-1, 1.0)]
    assert max(changes) == pytest.approx(min(changes), rel=1e-3)
    plain = [step(std, "none") for std in (1e-3, 1e-2, 1e-1, 1.0)]
    assert plain[0] > 1e3 * plain[3]


def loss_after_training(scaling: str) -> float:
    torch.manual_seed(0)
    memory = SharedMemory(16, std=1e-3, scaling=scaling)  # type: ignore[arg-type]
    model = nn.Sequential(
        SharedLinear(64, 128, memory=memory), nn.ReLU(), SharedLinear(128, 64, memory=memory)
    )
    optimizer = torch.optim.SGD([*memory.parameters(), *model.parameters()], 0.1, momentum=0.9)
    x = torch.randn(256, 64)
    y = torch.sin(x)
    loss = torch.tensor(0.0)
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def test_a_run_that_diverges_without_scaling_converges_with_it() -> None:
    assert not loss_after_training("none") < 1.0
    assert loss_after_training("count") < 0.45


def test_gradients_are_those_of_plain_indexing() -> None:
    memory = SharedMemory(5, scaling="none")
    layer = SharedLinear(70, 40, memory=memory, bias=False)
    x = torch.randn(3, 70)
    layer(x).square().sum().backward()
    assert memory.values.grad is not None
    found = memory.values.grad.clone()
    memory.values.grad = None
    tiles = memory.values[layer.slots] * layer.signs
    panels = tiles.reshape(3, 80, 16).transpose(1, 2).reshape(48, 80)
    weight = panels[:40, :70] * layer.scale
    (x @ weight.T).square().sum().backward()
    torch.testing.assert_close(found, memory.values.grad)


def test_copies_are_independent_and_keep_their_scaling() -> None:
    module = small()
    twin = copy.deepcopy(module)
    assert torch.equal(module(*arguments()), twin(*arguments()))
    for one in (module, twin):
        one(*arguments()).sum().backward()
    gradients = [one.table.memory.values.grad for one in (module, twin)]
    assert torch.equal(*gradients)
    with torch.no_grad():
        twin.table.memory.values.zero_()
    assert twin.head.memory is twin.table.memory
    assert not torch.equal(module(*arguments()), twin(*arguments()))


def test_modules_can_be_pickled_whole() -> None:
    module = small()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(*arguments()), module(*arguments()))
    twin(*arguments()).sum().backward()
    module(*arguments()).sum().backward()
    assert torch.equal(twin.table.memory.values.grad, module.table.memory.values.grad)


def test_modules_that_an_older_version_pickled_whole_are_read() -> None:
    module = small()
    twin = copy.deepcopy(module)
    for layer in layers(twin):
        [name] = layer._modules.keys() - {"shared_memory"}
        slots, signs = layer.slots.to(torch.int64), layer.signs
        del layer._modules[name], layer.__dict__["_places"]
        layer._buffers |= {"slots": slots, "signs": signs}
        layer._non_persistent_buffers_set |= {"slots", "signs"}
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=False)
    assert torch.equal(read(*arguments()), module(*arguments()))
    assert [*read.state_dict()] == [*module.state_dict()]
    assert dict(read.named_buffers()).keys() == dict(module.named_buffers()).keys()


def test_multiplied_out_layers_compute_the_same() -> None:
    module = small()
    expected = module(*arguments())
    with multiplied_out(module):
        assert torch.equal(module(*arguments()), expected)
        assert not module.head.weight.requires_grad
    assert module.head.weight.requires_grad


@pytest.mark.parametrize(
    ("exporter", "kind"), [("dynamo", "fold"), ("torchscript", "fold"), ("torchscript", "roast")]
)
def test_compiled_models_hold_the_memory_as_it_was_trained(
    tmp_path: Path, exporter: str, kind: str
) -> None:
    module = small(8.0, map=kind)
    with torch.no_grad():
        module.table.memory.values.add_(torch.randn_like(module.table.memory.values) * 0.1)
    path = tmp_path / "shared.onnx"
    result = export(module, arguments(), path, exporter=exporter, method="auto")
    assert result.torch is not None
    assert result.torch.written["output"].rel_l2 < 1e-5
    assert result.verify is not None and result.verify.passed
    assert result.report.coverage == 1.0
    model = onnx.load(path)
    operators = {node.op_type for node in model.graph.node}
    assert {"HashGather", "HashMatMul", "HashWeight"} <= operators
    memories = [t for t in model.graph.initializer if "hash.memory" in t.name]
    assert len(memories) == 1
    values = module.table.memory.values.detach().numpy()
    stored = numpy_helper.to_array(memories[0])
    unseen = stored == 0  # entries of padding, and those that no tile took, are not in the graph
    assert unseen.mean() < 0.05
    # Rounded products with a scale have more than one origin; weights are compared below.
    np.testing.assert_allclose(stored[~unseen], values[~unseen], rtol=3e-7, atol=0)
    assert path.stat().st_size < 4 * values.size + 30_000  # nodes, their origins, and bodies


def test_dense_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    module = small(4.0)
    export(module, arguments(), tmp_path / "shared.onnx", method="auto")
    onnxcomp.expand(tmp_path / "shared.onnx", tmp_path / "dense.onnx")
    model = onnx.load(tmp_path / "dense.onnx")
    found = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    for layer in layers(module):
        matrix = layer.matrix().detach().numpy()
        shapes = (matrix, matrix.T, matrix.reshape(getattr(layer, "shape", matrix.shape)))
        assert any(np.array_equal(array, shape) for array in found for shape in shapes)


def test_a_weight_that_was_changed_after_the_export_stays_dense(tmp_path: Path) -> None:
    module = small(8.0)
    export(module, arguments(), tmp_path / "plain.onnx")
    model = onnx.load(tmp_path / "plain.onnx")
    assert "onnxcomp.sharing" in {entry.key for entry in model.metadata_props}
    tensor = max(model.graph.initializer, key=lambda t: math.prod(t.dims))
    array = numpy_helper.to_array(tensor).copy()
    array.flat[7] += 0.1
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "changed.onnx")
    result = onnxcomp.optimize(tmp_path / "changed.onnx", tmp_path / "out.onnx", bits=6)
    operators = {node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node}
    assert not {"HashMatMul", "HashGather"} & operators
    assert result.verify is not None and result.verify.passed


def test_a_damaged_note_is_an_error(tmp_path: Path) -> None:
    export(small(8.0), arguments(), tmp_path / "plain.onnx")
    layer = '{"rows": 64, "length": 64, "base": %d, "scale": 1.0}'
    apart, over = f"{layer % 0}, {layer % 16}", f"{layer % 0}, {layer % 15}"
    memory = '{"memories": [{"slots": %d, "seed": 0, "layers": [%s]%s}]}'
    wrong = (memory % (0, "", ""), memory % (4, over, ""), memory % (4, apart, ', "map": "x"'))
    for text in ("{", '{"memories": 3}', *wrong):
        model = onnx.load(tmp_path / "plain.onnx")
        for entry in model.metadata_props:
            if entry.key == "onnxcomp.sharing":
                entry.value = text
        onnx.save(model, tmp_path / "bad.onnx")
        with pytest.raises(ModelError, match=r"onnxcomp\.sharing"):
            onnxcomp.optimize(tmp_path / "bad.onnx", tmp_path / "out.onnx")


def test_a_memory_for_each_layer() -> None:
    module = small(8.0, memory="module")
    memories = {id(layer.memory) for layer in layers(module)}
    assert len(memories) == 4  # the head has the table's
    assert torch.equal(module.head.weight, module.table.weight)


# torch says this of its own tracing of autograd functions.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_torch_compile_computes_the_same() -> None:
    module = small()
    expected = module(*arguments())
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments()), expected)
    compiled(*arguments()).sum().backward()
    found = module.table.memory.values.grad.clone()
    module.zero_grad()
    module(*arguments()).sum().backward()
    torch.testing.assert_close(found, module.table.memory.values.grad)


def test_unusable_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match="no layer"):
        share(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(UsageError, match="compression"):
        share(Small(), 0.5)
    with pytest.raises(UsageError, match="slots"):
        SharedMemory(0)
    with pytest.raises(UsageError, match="map"):
        SharedMemory(1, map="other")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="scaling"):
        SharedMemory(1, scaling="other")  # type: ignore[arg-type]
