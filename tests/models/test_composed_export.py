"""Models trained with factors: exported by both exporters, folded, truncated."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
from torch import nn  # noqa: E402

import onnxcomp  # noqa: E402
from onnxcomp.models import export, lorita  # noqa: E402


class Picture(nn.Module):
    """Convolutions, layers with and without batch axes of their own, and a norm in between."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.far = nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.mix = nn.Linear(24, 40)
        self.plain = nn.Linear(40, 32, bias=False)
        self.score = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.near(x)))
        x = torch.relu(self.far(x)).flatten(2).transpose(1, 2)
        x = torch.relu(self.plain(torch.relu(self.mix(x)))).mean(1)
        result: torch.Tensor = self.score(x)
        return result


def low_rank(module: nn.Module, rank: int) -> nn.Module:
    """The module with weights of this rank at most."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            matrix = layer.weight.detach().flatten(1)
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            values[rank:] = 0.0
            layer.weight.data = (left * values @ right).reshape(layer.weight.shape)
    return module


def weights(path: Path) -> int:
    return sum(int(np.prod(t.dims)) for t in onnx.load(path).graph.initializer if len(t.dims) > 1)


def operators(path: Path) -> Counter[str]:
    kinds = ("MatMul", "Gemm", "Conv")
    return Counter(n.op_type for n in onnx.load(path).graph.node if n.op_type in kinds)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("factors", [2, 3])
def test_factors_are_exported_folded_and_truncated(
    tmp_path: Path, exporter: str, factors: int
) -> None:
    torch.manual_seed(0)
    module = low_rank(Picture().eval(), 8)
    x = torch.randn(2, 3, 16, 16)
    composed = lorita(copy.deepcopy(module), factors)
    export(module, (x,), tmp_path / "whole.onnx", exporter=exporter)
    export(composed, (x,), tmp_path / "factors.onnx", exporter=exporter)
    assert weights(tmp_path / "factors.onnx") > 1.2 * weights(tmp_path / "whole.onnx")
    result = onnxcomp.optimize(
        tmp_path / "factors.onnx", tmp_path / "small.onnx", method="lowrank", min_size=0,
        set_=["^score|^near:method=dense", ".*:method=lowrank,rank=8"],
    )  # fmt: skip
    assert len(result.plan) == len(onnxcomp.plan(tmp_path / "whole.onnx", min_size=0))
    taken = {site.shape for site in result.report.sites if site.method == "lowrank"}
    assert len(taken) == 3
    found = operators(tmp_path / "small.onnx")
    assert found["Conv"] == 3
    assert found["MatMul"] + found["Gemm"] == 5
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    [name] = [value.name for value in session.get_inputs()]
    with torch.no_grad():
        expected = module(x).numpy()
    np.testing.assert_allclose(session.run(None, {name: x.numpy()})[0], expected, atol=2e-5)
