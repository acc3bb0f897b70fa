"""Training for low rank: linear maps as products of several, which weight decay makes low-rank.

``W = W_N ... W_1`` with no non-linearity in between computes what one linear map computes, but
weight decay on the factors is another prior: among all factors of a product the least sum of
squared norms is ``N`` times the sum of its singular values to the power ``2 / N``. Two factors are
decayed like the nuclear norm, three like its 2/3 power: small singular values go to zero, and what
is cut off after training was hardly there. LoRITa: Alkhouri et al., arXiv 2405.03089.

While gradients are wanted, the factors are multiplied out before they meet large inputs, which
costs less than one map after the other: several factors then train about as fast as one. An
exported model has the maps one after the other.

`lorita` replaces layers, `parameter_groups` puts weight decay on the factors alone, `collapse`
multiplies them out again, `truncate` makes factors of lower rank to train on with. A model that was
exported with its factors is folded by the compiler.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from onnxcomp.models.torch_calls import import_torch

import_torch()

import torch  # noqa: E402 - after the message for those who do not have it
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

__all__ = [
    "ComposedConv2d",
    "ComposedLinear",
    "Include",
    "collapse",
    "included",
    "lorita",
    "parameter_groups",
    "truncate",
]

Include = str | Callable[[str, nn.Module], bool] | None


class ComposedLinear(nn.Sequential):
    """A chain of linear layers without anything in between; the last one has the bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The chain, or its product, whichever is less work."""
        if _in_training() and _better_as_product(self, x.numel() // max(1, x.shape[-1])):
            return functional.linear(x, self.weight, self.bias)
        result: torch.Tensor = super().forward(x)
        return result

    @property
    def weight(self) -> torch.Tensor:
        """The product of the factors, ``(out_features, in_features)``."""
        return _product([layer.weight for layer in self])

    @property
    def bias(self) -> torch.Tensor | None:
        """Of the last factor."""
        bias: torch.Tensor | None = self[-1].bias
        return bias

    def collapse(self) -> nn.Linear:
        """One layer that computes the same."""
        first, last = self[0], self[-1]
        bias = last.bias is not None
        layer = nn.utils.skip_init(nn.Linear, first.in_features, last.out_features, bias=bias)
        return _filled(layer, self)


class ComposedConv2d(nn.Sequential):
    """A convolution and 1 x 1 convolutions behind it; the last one has the bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The chain, or its product, whichever is less work."""
        first = self[0]
        points = x.numel() // max(1, first.in_channels * math.prod(first.stride))
        if _in_training() and _better_as_product(self, points):
            result: torch.Tensor = first._conv_forward(x, self.weight, self.bias)
        else:
            result = super().forward(x)
        return result

    @property
    def weight(self) -> torch.Tensor:
        """The product of the factors, ``(out_channels, in_channels, height, width)``."""
        product = _product([layer.weight.flatten(1) for layer in self])
        return product.reshape(len(product), *self[0].weight.shape[1:])

    @property
    def bias(self) -> torch.Tensor | None:
        """Of the last factor."""
        bias: torch.Tensor | None = self[-1].bias
        return bias

    def collapse(self) -> nn.Conv2d:
        """One layer that computes the same."""
        first, last = self[0], self[-1]
        layer = _conv(first, last.out_channels, first.in_channels, last.bias is not None)
        return _filled(layer, self)


def _in_training() -> bool:
    """Whether gradients are wanted; an exporter is to see the layers as they are."""
    traced = torch.jit.is_tracing() or torch.compiler.is_exporting()
    return torch.is_grad_enabled() and not traced


def _better_as_product(composed: ComposedLinear | ComposedConv2d, vectors: int) -> bool:
    """Whether a product of the factors takes fewer multiplications than they do on their own.

    Args:
        composed: The factors.
        vectors: How many input vectors, or places of a window, there are.
    """
    if len(composed) == 1:
        return False
    sizes = [factor.weight.numel() for factor in composed]
    length, rows = sizes[0] // len(composed[0].weight), len(composed[-1].weight)
    product = length * sum(sizes[1:]) + vectors * rows * length
    return bool(product < vectors * sum(sizes))


def _product(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """``W_N ... W_1`` of matrices in the order in which they are applied."""
    product = weights[0]
    for weight in weights[1:]:
        product = weight @ product
    return product


def _filled(layer: Any, composed: ComposedLinear | ComposedConv2d) -> Any:
    """The layer with the weight, bias, device, type and mode of its factors."""
    with torch.no_grad():
        exact = [factor.weight.double().flatten(1) for factor in composed]
        weight = _product(exact).reshape(composed.weight.shape)
        layer.to(composed[0].weight)
        layer.weight.copy_(weight)
        if composed.bias is not None:
            layer.bias.copy_(composed.bias)
    layer.weight.requires_grad_(composed[0].weight.requires_grad)
    return layer.train(composed.training)


def _conv(like: nn.Conv2d, out_channels: int, in_channels: int, bias: bool) -> nn.Conv2d:
    """A convolution with the window of another, not initialised."""
    return nn.utils.skip_init(
        nn.Conv2d,
        in_channels,
        out_channels,
        like.kernel_size,
        stride=like.stride,
        padding=like.padding,
        dilation=like.dilation,
        padding_mode=like.padding_mode,
        bias=bias,
    )


def _split(weight: torch.Tensor, factors: int, rank: int | None = None) -> list[torch.Tensor]:
    """Factors ``W_1 ... W_N`` of a matrix ``(m, n)``, all of equal norm: the ones decay prefers.

    With a rank they are those of the nearest matrix of this rank.
    """
    if factors == 1:
        return [weight.detach()]
    exact = weight.detach().double().cpu()
    left, values, right = torch.linalg.svd(exact, full_matrices=False)
    left, right = left[:, :rank], right[:rank]
    root = values[:rank].pow(1.0 / factors)
    middle = [torch.diag(root)] * (factors - 2)
    parts = [root[:, None] * right, *middle, left * root]
    return [part.to(weight) for part in parts]


def _chain(layer: Any, shapes: Sequence[tuple[int, int]]) -> ComposedLinear | ComposedConv2d:
    """Layers, not initialised, of these ``(outputs, inputs)`` in the place of one."""
    biases = [False] * (len(shapes) - 1) + [layer.bias is not None]
    if isinstance(layer, nn.Linear):
        return ComposedLinear(
            *(
                nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
                for (outputs, inputs), bias in zip(shapes, biases, strict=True)
            )
        )
    first = _conv(layer, shapes[0][0], layer.in_channels, biases[0])
    return ComposedConv2d(
        first,
        *(
            nn.utils.skip_init(nn.Conv2d, inputs, outputs, 1, bias=bias)
            for (outputs, inputs), bias in zip(shapes[1:], biases[1:], strict=True)
        ),
    )


def _factored(layer: Any, factors: int, rank: int | None = None) -> ComposedLinear | ComposedConv2d:
    """The chain that computes what a Linear or Conv2d computes, or the nearest one of a rank."""
    weight = layer.weight
    parts = _split(weight.flatten(1), factors, rank)
    composed = _chain(layer, [tuple(part.shape) for part in parts])
    composed.to(weight)
    with torch.no_grad():
        for factor, part in zip(composed, parts, strict=True):
            factor.weight.copy_(part.reshape(factor.weight.shape))
            factor.weight.requires_grad_(weight.requires_grad)
        if layer.bias is not None:
            composed[-1].bias.copy_(layer.bias)
            composed[-1].bias.requires_grad_(layer.bias.requires_grad)
    composed.train(layer.training)
    return composed


def included(include: Include) -> Callable[[str, nn.Module], bool]:
    """Whether a layer is meant, by its name and itself."""
    if include is None:
        return lambda name, layer: True
    if callable(include):
        return include
    pattern = re.compile(include)
    return lambda name, layer: pattern.search(name) is not None


def _eligible(layer: nn.Module, owners: Counter[int]) -> bool:
    """Whether a layer is a plain one whose weight is its own alone.

    Subclasses, such as the output layer of MultiheadAttention, are read by others in their own way.
    """
    if type(layer) is nn.Conv2d:
        return layer.groups == 1 and owners[id(layer.weight)] == 1
    return type(layer) is nn.Linear and owners[id(layer.weight)] == 1


def _swap(module: nn.Module, replace: Callable[[str, nn.Module], nn.Module | None]) -> nn.Module:
    """Replace layers wherever they are; one that is there twice gets one replacement."""
    made: dict[int, nn.Module] = {}
    for name, layer in list(module.named_modules()):
        new = replace(name, layer)
        if new is not None:
            made[id(layer)] = new
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # named_children leaves copies out
            if id(child) in made:
                setattr(parent, name, made[id(child)])
    return made.get(id(module), module)


def lorita(
    module: nn.Module, factors: int = 2, *, include: Include = None, fresh: bool = False
) -> nn.Module:
    """Replace Linear and Conv2d layers by chains of `factors` linear maps, in place.

    The model computes what it did before. The inner width is the smaller side of the weight, so
    that every weight can still be learnt. Layers with groups, layers that share their weight
    with another layer, and subclasses are left alone.

    Args:
        module: Any model.
        factors: Number of maps; with 1 a chain is the layer alone, to compare with.
        include: Regular expression found in the names of layers to replace, or a function of name
            and layer; None for all.
        fresh: Draw the weights of replaced layers anew, for training from the start.

    Returns:
        The module; a new one only where it is itself a layer that is replaced.

    Raises:
        ValueError: Fewer than one factor.
    """
    if factors < 1:
        raise ValueError(f"factors={factors}: a linear map has at least one factor")
    wanted = included(include)
    owners = Counter(id(p) for m in module.modules() for p in m.parameters(recurse=False))

    def replace(name: str, layer: nn.Module) -> nn.Module | None:
        if not _eligible(layer, owners) or not wanted(name, layer):
            return None
        if fresh:
            layer.reset_parameters()
        return _factored(layer, factors)

    return _swap(module, replace)


def collapse(module: nn.Module) -> nn.Module:
    """Multiply the factors of `lorita` out again, in place: each chain becomes one layer.

    Returns:
        The module; a new one only where it is itself a chain.
    """
    chains = (ComposedLinear, ComposedConv2d)
    return _swap(module, lambda _, layer: layer.collapse() if isinstance(layer, chains) else None)


def truncate(module: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """Replace layers by two factors of lower rank, in place: the nearest to their weights.

    For training on after truncation. Chains of `lorita`, or of an earlier truncation, are replaced
    by two factors of their product.

    Args:
        module: Any model.
        ranks: Ranks by the names of Linear and Conv2d layers or chains; see `choose_ranks`.

    Returns:
        The module; a new one only where it is itself a layer that is replaced.

    Raises:
        ValueError: A name is not such a layer, or a rank is not between 1 and the layer's own.
    """
    layers = dict(module.named_modules())
    for name, rank in ranks.items():
        layer: Any = layers.get(name)
        kinds = (nn.Linear, nn.Conv2d, ComposedLinear, ComposedConv2d)
        if type(layer) not in kinds or getattr(layer, "groups", 1) != 1:
            raise ValueError(f"{name!r} is neither a Linear nor a Conv2d without groups")
        full = min(layer.weight.flatten(1).shape)
        if not 1 <= rank <= full:
            raise ValueError(f"rank {rank} for {name!r}, whose weight has rank {full}")

    def replace(name: str, layer: Any) -> nn.Module | None:
        if name not in ranks:
            return None
        plain = layer.collapse() if isinstance(layer, nn.Sequential) else layer
        return _factored(plain, 2, ranks[name])

    return _swap(module, replace)


def _factor_weights(module: nn.Module) -> Iterator[nn.Parameter]:
    for layer in module.modules():
        if isinstance(layer, (ComposedLinear, ComposedConv2d)):
            yield from (factor.weight for factor in layer)


def parameter_groups(
    module: nn.Module, weight_decay: float, *, others: float = 0.0
) -> list[dict[str, Any]]:
    """Parameters for an optimizer with weight decay on the factors.

    Args:
        module: A model with layers replaced by `lorita`.
        weight_decay: Decay of the factors.
        others: Decay of everything else: biases, norms, embeddings, layers left alone.

    Returns:
        Two groups, for example for ``torch.optim.AdamW``.
    """
    factors = {id(p): p for p in _factor_weights(module)}
    rest = [p for p in module.parameters() if id(p) not in factors]
    return [
        {"params": list(factors.values()), "weight_decay": weight_decay},
        {"params": rest, "weight_decay": others},
    ]
