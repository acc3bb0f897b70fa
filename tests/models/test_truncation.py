"""Ranks of all layers at once: as many as a share of the weights allows, by one rule for all."""

from __future__ import annotations

import copy
from typing import get_args

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from onnxcomp.models import choose_ranks, collapse, lorita, truncate  # noqa: E402
from onnxcomp.models.truncation import Truncation  # noqa: E402

MODES = get_args(Truncation)
NAMES = ["first", "second", "third", "window"]


class Net(nn.Module):
    """Layers whose singular values differ in size and in how fast they fall."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(40, 48)
        self.second = nn.Linear(48, 48)
        self.third = nn.Linear(48, 40, bias=False)
        self.window = nn.Conv2d(6, 40, 3)
        self.depthwise = nn.Conv2d(40, 40, 3, groups=40)
        for scale, layer in enumerate((self.first, self.second, self.third, self.window)):
            matrix = layer.weight.detach().flatten(1)
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            values = torch.logspace(0.0, -0.5 - scale, len(values)) * (1 + scale)
            layer.weight.data = (left * values @ right).reshape(layer.weight.shape)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def share(net: nn.Module, ranks: dict[str, int]) -> float:
    """Weights that are left, by a count of its own."""
    sizes = {n: net.get_submodule(n).weight.flatten(1).shape for n in NAMES}
    full = sum(a * b for a, b in sizes.values())
    left = sum(ranks[n] * (a + b) if n in ranks else a * b for n, (a, b) in sizes.items())
    return left / full


def values_of(net: nn.Module, name: str) -> torch.Tensor:
    return torch.linalg.svdvals(net.get_submodule(name).weight.detach().flatten(1).double())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kept", [0.6, 0.3, 0.1])
def test_a_share_of_the_weights_is_used_and_not_exceeded(
    net: nn.Module, mode: Truncation, kept: float
) -> None:
    ranks = choose_ranks(net, kept, mode=mode)
    assert "depthwise" not in ranks
    assert kept - 0.06 < share(net, ranks) <= kept
    thin = truncate(copy.deepcopy(net), ranks)
    for name, rank in ranks.items():
        assert thin.get_submodule(name)[0].weight.shape[0] == rank


def test_modes_are_one_share_or_one_threshold_for_all_layers(net: nn.Module) -> None:
    found = {mode: choose_ranks(net, 0.3, mode=mode) for mode in MODES}
    assert found["local"] == {name: (8 if name == "second" else 6) for name in NAMES}
    assert abs(6 / 40 - 8 / 48) < 1 / 48  # the same share, in whole ranks
    for mode in ("global", "raw"):
        cut, left = 0.0, float("inf")
        for name, rank in found[mode].items():
            values = values_of(net, name)
            values = values / values[0] if mode == "global" else values
            cut, left = max(cut, float(values[rank])), min(left, float(values[rank - 1]))
        assert cut < left
        assert found[mode] != found["local"]


def test_layers_that_are_not_meant_keep_their_weights(net: nn.Module) -> None:
    ranks = choose_ranks(net, 0.6, include="first|second")
    assert set(ranks) == {"first", "second"}
    assert share(net, ranks) <= 0.6
    assert choose_ranks(net, 1.0) == {}


def test_chains_are_truncated_again_by_their_product(net: nn.Module) -> None:
    whole = choose_ranks(net, 0.3)
    composed = lorita(copy.deepcopy(net), 2)
    assert choose_ranks(composed, 0.3) == whole
    step = truncate(composed, choose_ranks(composed, 0.5))
    again = truncate(step, choose_ranks(step, 0.3))
    straight = truncate(net, whole)
    for name in whole:
        torch.testing.assert_close(
            collapse(again).get_submodule(name).weight,
            collapse(straight).get_submodule(name).weight,
        )


def test_ranks_beyond_that_of_a_chain_are_not_taken() -> None:
    torch.manual_seed(0)
    net = truncate(nn.Sequential(nn.Linear(64, 64)), {"0": 5})
    assert choose_ranks(net, 0.9) == {"0": 5}


@pytest.mark.parametrize(("kept", "mode"), [(0.0, "global"), (1.5, "local"), (0.5, "even")])
def test_what_makes_no_sense_is_refused(net: nn.Module, kept: float, mode: str) -> None:
    with pytest.raises(ValueError, match=r"kept=|mode="):
        choose_ranks(net, kept, mode=mode)
