"""Mixtures of experts as torch modules write them: exported, their experts compute on codes."""

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxcomp
from onnxcomp.models import export
from onnxcomp.runtime.session import open_session

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[torch]'")
nn, functional = torch.nn, torch.nn.functional
pytestmark = [
    pytest.mark.filterwarnings("ignore::Warning:torch.*", "ignore::Warning:onnxscript.*"),
    pytest.mark.usefixtures("one_thread_and_seed"),
]

EXPERTS, WIDTH, INNER, CHOSEN = 4, 64, 96, 2


class Router(nn.Module):
    """Chooses experts, which its subclasses have."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)

    def routed(self, x: Any) -> Any:
        return torch.topk(torch.softmax(self.gate(x), -1), CHOSEN)


class Stacked(Router):
    """Weights of three dimensions, picked by indices of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 8)
        self.down = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH) / 8)

    def forward(self, x: Any) -> Any:
        shares, chosen = self.routed(x)
        hidden = functional.silu(torch.matmul(x[:, None, None, :], self.up[chosen]))
        return (torch.matmul(hidden, self.down[chosen]).squeeze(2) * shares[..., None]).sum(1)


class Summed(Stacked):
    """The same as sums over letters."""

    def forward(self, x: Any) -> Any:
        shares, chosen = self.routed(x)
        hidden = functional.silu(torch.einsum("th,tkhi->tki", x, self.up[chosen]))
        return torch.einsum("tki,tkih,tk->th", hidden, self.down[chosen], shares)


class Batched(Stacked):
    """All experts for all tokens."""

    def forward(self, x: Any) -> Any:
        shares, chosen = self.routed(x)
        mask = torch.zeros_like(self.gate(x)).scatter(1, chosen, shares)
        hidden = functional.silu(torch.bmm(x[None].expand(EXPERTS, -1, -1), self.up))
        return (torch.bmm(hidden, self.down) * mask.T[..., None]).sum(0)


class Looped(Router):
    """Mixtral and Qwen: layers of their own, each for the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (
            nn.ModuleList(nn.Linear(*sizes, bias=False) for _ in range(EXPERTS))
            for sizes in ((WIDTH, INNER), (INNER, WIDTH))
        )

    def forward(self, x: Any) -> Any:
        shares, chosen = self.routed(x)
        total = torch.zeros_like(x)
        for expert, mask in enumerate(functional.one_hot(chosen, EXPERTS).permute(2, 1, 0)):
            place, token = torch.where(mask)
            hidden = functional.silu(self.up[expert](x[token]))
            found = self.down[expert](hidden) * shares[token, place, None]
            total.index_add_(0, token, found)
        return total


CASES = [
    (Stacked, "dynamo", "HyperExperts", 2),
    (Stacked, "torchscript", "HyperExperts", 2),
    (Summed, "torchscript", "HyperExperts", 1),
    (Batched, "dynamo", "HyperExperts", 2),
    (Looped, "dynamo", "HyperMatMul", 2 * EXPERTS),
]


@pytest.mark.parametrize(("module", "exporter", "operator", "count"), CASES)
def test_experts_compute_on_codes(
    module: Any, exporter: str, operator: str, count: int, tmp_path: Path
) -> None:
    x = torch.randn(5, WIDTH)
    made = module().eval()
    with torch.no_grad():
        wanted = made(x).numpy()
    source, small = tmp_path / "source.onnx", tmp_path / "small.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export(made, (x,), source, exporter=exporter)
    result = onnxcomp.optimize(source, small, bits=6, method="hyper", min_size=4096)
    assert result.verify is not None and result.verify.passed
    kinds = Counter(node.op_type for node in onnx.load(small).graph.node)
    assert kinds[operator] == count
    session = open_session(small, library=True)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.linalg.norm(found - wanted) < 0.06 * np.linalg.norm(wanted)
