"""Layers as products of factors: they compute the same, before training and after."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from onnxcomp.models.composed import (  # noqa: E402
    ComposedConv2d,
    ComposedLinear,
    collapse,
    lorita,
    parameter_groups,
    truncate,
)


class Small(nn.Module):
    """Every kind of layer that is replaced, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, stride=2, padding=1, padding_mode="reflect")
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, padding=1)
        self.second = nn.Conv2d(12, 8, (1, 3), dilation=2, bias=False)
        self.wide = nn.Linear(8, 40)
        self.narrow = nn.Linear(40, 6, bias=False)
        self.again = self.narrow
        self.table = nn.Embedding(6, 6)
        self.head = nn.Linear(6, 6, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(torch.relu(self.depthwise(torch.relu(self.first(x)))))
        x = self.narrow(torch.relu(self.wide(x.mean((2, 3)))))
        result: torch.Tensor = self.head(x)
        return result


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().double()


def image() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("factors", [1, 2, 3, 4])
def test_factors_compute_what_the_layers_did_and_so_does_their_product(
    model: nn.Module, factors: int
) -> None:
    expected = model(image())
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    composed = lorita(model, factors)
    assert composed is model
    torch.testing.assert_close(model(image()), expected)
    assert collapse(model) is model
    torch.testing.assert_close(model(image()), expected)
    assert not any(isinstance(m, (ComposedLinear, ComposedConv2d)) for m in model.modules())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), weights[name])


@pytest.mark.parametrize("factors", [2, 3])
@pytest.mark.parametrize("count", [1, 300])
def test_a_product_of_the_factors_trains_as_the_chain_does(factors: int, count: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular", dtype=torch.float64)
    pairs = [(conv, (4, 11, 11)), (nn.Linear(7, 9, dtype=torch.float64), (3, 7))]
    for layer, shape in pairs:
        composed = lorita(layer, factors)
        x = torch.randn(count, *shape, dtype=torch.float64)
        found = {}
        for name, compute in (("chain", nn.Sequential(*composed)), ("product", composed)):
            composed.zero_grad()
            result = compute(x)
            result.square().sum().backward()
            found[name] = [result, *(p.grad.clone() for p in composed.parameters())]
        torch.testing.assert_close(found["product"], found["chain"])


def test_the_product_is_taken_where_it_is_less_work() -> None:
    composed = lorita(nn.Linear(16, 8), 2)
    calls: list[int] = []
    composed[0].register_forward_hook(lambda *_: calls.append(1))
    composed(torch.randn(200, 16))
    assert not calls
    composed(torch.randn(3, 16))
    with torch.no_grad():
        composed(torch.randn(200, 16))
    assert len(calls) == 2


def test_only_plain_layers_with_a_weight_of_their_own_are_replaced(model: nn.Module) -> None:
    lorita(model, 3)
    replaced = {name for name, m in model.named_modules() if type(m).__name__.startswith("Comp")}
    assert replaced == {"first", "second", "wide", "narrow"}
    assert model.again is model.narrow
    assert isinstance(model.again, ComposedLinear)
    assert model.head.weight is model.table.weight
    assert [tuple(f.weight.shape) for f in model.wide] == [(8, 8), (8, 8), (40, 8)]
    assert [f.bias is None for f in model.first] == [True, True, False]


def test_a_pattern_or_a_function_chooses_layers(model: nn.Module) -> None:
    chosen = lorita(copy.deepcopy(model), 2, include="^wide$")
    assert isinstance(chosen.wide, ComposedLinear)
    assert isinstance(chosen.first, nn.Conv2d)
    chosen = lorita(model, 2, include=lambda _, layer: isinstance(layer, nn.Conv2d))
    assert isinstance(chosen.first, ComposedConv2d)
    assert type(chosen.wide) is nn.Linear


def test_a_model_that_is_one_layer_is_replaced_itself() -> None:
    layer = nn.Linear(5, 7)
    composed = lorita(layer, 2)
    assert isinstance(composed, ComposedLinear)
    x = torch.randn(3, 5)
    torch.testing.assert_close(composed(x), layer(x))
    assert type(collapse(composed)) is nn.Linear


def test_factors_have_equal_norms_and_their_sum_is_that_of_the_singular_values() -> None:
    layer = nn.Linear(20, 12, bias=False, dtype=torch.float64)
    values = torch.linalg.svdvals(layer.weight.detach())
    for factors in (2, 3):
        norms = [f.weight.square().sum() for f in lorita(copy.deepcopy(layer), factors)]
        expected = values.pow(2.0 / factors).sum()
        torch.testing.assert_close(torch.stack(norms), expected.expand(factors))


def test_decay_falls_on_factors_and_makes_the_product_low_rank() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 16)
    y = x @ torch.randn(16, 2) @ torch.randn(2, 12) + 0.3 * torch.randn(512, 12)
    ranks = {}
    for factors in (1, 2):
        model = lorita(nn.Sequential(nn.Linear(16, 12)), factors)
        groups = parameter_groups(model, 0.3)
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        for _ in range(400):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        values = torch.linalg.svdvals(model[0].weight.detach())
        ranks[factors] = int((values > 0.01 * values[0]).sum())
    assert ranks[2] == 2 < ranks[1]


def test_frozen_half_precision_layers_stay_frozen_and_in_their_type() -> None:
    layer = nn.Linear(8, 8, dtype=torch.bfloat16).requires_grad_(False).eval()
    composed = lorita(layer, 2)
    parameters = list(composed.parameters())
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in parameters)
    assert not composed.training
    back = collapse(composed)
    assert back.weight.dtype == torch.bfloat16
    assert not back.weight.requires_grad


def test_fresh_layers_are_drawn_anew_as_the_layer_itself_is() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    with torch.no_grad():
        layer.weight.fill_(100.0)
    composed = lorita(layer, 3, fresh=True)
    assert composed.weight.abs().max() <= 0.126  # 1 / sqrt(64), the limit of the layer's own draw


def test_less_than_one_factor_is_refused() -> None:
    with pytest.raises(ValueError, match="factors=0"):
        lorita(nn.Linear(3, 3), 0)


def test_truncation_gives_the_nearest_matrix_of_a_rank(model: nn.Module) -> None:
    exact = model.wide.weight.detach().clone()
    values = torch.linalg.svdvals(exact)
    truncate(model, {"wide": 3, "first": 5})
    assert [tuple(f.weight.shape) for f in model.first] == [(5, 3, 3, 3), (12, 5, 1, 1)]
    error = (collapse(model).wide.weight - exact).norm()
    torch.testing.assert_close(error, values[3:].norm())


@pytest.mark.parametrize("ranks", [{"wide": 0}, {"wide": 9}, {"depthwise": 1}, {"nothing": 1}])
def test_ranks_a_layer_cannot_have_are_refused(model: nn.Module, ranks: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(ranks))):
        truncate(model, ranks)
