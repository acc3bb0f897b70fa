"""Operators of ONNX in torch, as far as gradients go through them.

Functions take the node's attributes and its inputs as tensors, None for those left out, and return
the first output. Floating point is float32 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

__all__ = ["OPERATORS", "Operator"]

Operator = Callable[..., Any]
Attributes = Mapping[str, Any]


def _numbers(tensor: Any) -> list[int]:
    return [int(value) for value in tensor.reshape(-1).tolist()]


def _unary(function: Callable[[Any], Any]) -> Operator:
    return lambda a, x: function(x)


def _binary(function: Callable[[Any, Any], Any]) -> Operator:
    return lambda a, x, y: function(x, y)


def _gemm(a: Attributes, x: Any, w: Any, c: Any = None) -> Any:
    x = x.T if a.get("transA", 0) else x
    w = w.T if a.get("transB", 0) else w
    y = a.get("alpha", 1.0) * (x @ w)
    return y if c is None else y + a.get("beta", 1.0) * c


def _padded(a: Attributes, x: Any, value: float = 0.0) -> Any:
    """Padding of a window, which ONNX gives as all beginnings and then all ends."""
    if a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise NotImplementedError("automatic padding")
    rank = x.ndim - 2
    pads = list(a.get("pads", ())) or [0] * (2 * rank)
    around = [n for i in reversed(range(rank)) for n in (pads[i], pads[rank + i])]
    return functional.pad(x, around, value=value) if any(around) else x


def _conv(a: Attributes, x: Any, w: Any, bias: Any = None) -> Any:
    rank = x.ndim - 2
    convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[rank]
    ones = [1] * rank
    return convolve(
        _padded(a, x),
        w,
        bias,
        list(a.get("strides", ones)),
        0,
        list(a.get("dilations", ones)),
        a.get("group", 1),
    )


def _pool(a: Attributes, x: Any, *, largest: bool) -> Any:
    if a.get("ceil_mode", 0) or a.get("dilations") not in (None, [1] * (x.ndim - 2)):
        raise NotImplementedError("pooling with a ceiling or dilations")
    sizes, strides = list(a["kernel_shape"]), list(a.get("strides", [1] * (x.ndim - 2)))
    if x.ndim != 4 or (not largest and any(a.get("pads", ()))):
        raise NotImplementedError("pooling in other than two dimensions, or means with padding")
    if largest:
        return functional.max_pool2d(_padded(a, x, -math.inf), sizes, strides)
    return functional.avg_pool2d(x, sizes, strides)


def _batch_norm(a: Attributes, x: Any, scale: Any, bias: Any, mean: Any, var: Any) -> Any:
    return functional.batch_norm(x, mean, var, scale, bias, False, 0.0, a.get("epsilon", 1e-5))


def _layer_norm(a: Attributes, x: Any, scale: Any, bias: Any = None) -> Any:
    axis = a.get("axis", -1) % x.ndim
    shape = x.shape[axis:]
    flat = functional.layer_norm(x, shape, eps=a.get("epsilon", 1e-5)) * scale
    return flat if bias is None else flat + bias


def _reshape(a: Attributes, x: Any, shape: Any) -> Any:
    if a.get("allowzero", 0):
        return x.reshape(_numbers(shape))
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(_numbers(shape))])


def _flatten(a: Attributes, x: Any) -> Any:
    axis = a.get("axis", 1) % (x.ndim + 1)
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _axes(a: Attributes, axes: Any, rank: int) -> list[int]:
    given = list(a.get("axes", ())) if axes is None else _numbers(axes)
    return sorted(axis % rank for axis in given)


def _unsqueeze(a: Attributes, x: Any, axes: Any = None) -> Any:
    count = len(a.get("axes", ())) if axes is None else axes.numel()
    for axis in _axes(a, axes, x.ndim + count):
        x = x.unsqueeze(axis)
    return x


def _squeeze(a: Attributes, x: Any, axes: Any = None) -> Any:
    found = _axes(a, axes, x.ndim) or [i for i, n in enumerate(x.shape) if n == 1]
    for axis in reversed(found):
        x = x.squeeze(axis)
    return x


def _slice(a: Attributes, x: Any, *given: Any) -> Any:
    if given:
        starts, ends = _numbers(given[0]), _numbers(given[1])
        axes = None if len(given) < 3 or given[2] is None else _numbers(given[2])
        steps = [1] * len(starts) if len(given) < 4 or given[3] is None else _numbers(given[3])
    else:
        starts, ends, axes = list(a["starts"]), list(a["ends"]), a.get("axes")
        steps = [1] * len(starts)
    if any(step < 1 for step in steps):
        raise NotImplementedError("a slice from back to front")
    cuts = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes or range(len(starts)), starts, ends, steps, strict=True):
        cuts[axis] = slice(start, end, step)
    return x[tuple(cuts)]


def _gather(a: Attributes, x: Any, index: Any) -> Any:
    axis = a.get("axis", 0) % x.ndim
    index = index.long()
    flat = torch.where(index < 0, index + x.shape[axis], index).reshape(-1)
    shape = (*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
    return x.index_select(axis, flat).reshape(shape)


def _reduced(function: Callable[..., Any]) -> Operator:
    def reduce(a: Attributes, x: Any, axes: Any = None) -> Any:
        found = _axes(a, axes, x.ndim)
        if not found and a.get("noop_with_empty_axes", 0):
            return x
        return function(x, found or list(range(x.ndim)), bool(a.get("keepdims", 1)))

    return reduce


def _pad(a: Attributes, x: Any, pads: Any = None, value: Any = None, axes: Any = None) -> Any:
    if a.get("mode", "constant") != "constant":
        raise NotImplementedError("padding with other than one value")
    given = list(a.get("pads", ())) if pads is None else _numbers(pads)
    places = list(range(x.ndim)) if axes is None else _axes(a, axes, x.ndim)
    sizes = {axis: (given[i], given[len(places) + i]) for i, axis in enumerate(places)}
    around = [n for axis in reversed(range(x.ndim)) for n in sizes.get(axis, (0, 0))]
    filler = a.get("value", 0.0) if value is None else float(value)
    return functional.pad(x, around, value=filler)


def _clip(a: Attributes, x: Any, low: Any = None, high: Any = None) -> Any:
    low = a.get("min") if low is None else float(low)
    high = a.get("max") if high is None else float(high)
    return x if low is None and high is None else torch.clamp(x, low, high)


def _softmax(a: Attributes, x: Any) -> Any:
    return torch.softmax(x, a.get("axis", -1))


OPERATORS: Mapping[str, Operator] = {
    "Abs": _unary(torch.abs),
    "Add": _binary(torch.add),
    "AveragePool": lambda a, x: _pool(a, x, largest=False),
    "BatchNormalization": _batch_norm,
    "Cast": _unary(lambda x: x),
    "Clip": _clip,
    "Concat": lambda a, *parts: torch.cat(parts, a["axis"]),
    "Conv": _conv,
    "Div": _binary(torch.div),
    "Dropout": lambda a, x, *_: x,
    "Erf": _unary(torch.erf),
    "Exp": _unary(torch.exp),
    "Expand": lambda a, x, shape: x * torch.ones(_numbers(shape)),
    "Flatten": _flatten,
    "Gather": _gather,
    "Gelu": lambda a, x: functional.gelu(x, approximate=a.get("approximate", "none")),
    "Gemm": _gemm,
    "GlobalAveragePool": _unary(lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True)),
    "GlobalMaxPool": _unary(lambda x: x.amax(tuple(range(2, x.ndim)), keepdim=True)),
    "HardSwish": _unary(functional.hardswish),
    "Identity": _unary(lambda x: x),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda a, x: functional.leaky_relu(x, a.get("alpha", 0.01)),
    "Log": _unary(torch.log),
    "MatMul": _binary(torch.matmul),
    "Max": lambda a, x, *rest: x if not rest else torch.maximum(x, *rest),
    "MaxPool": lambda a, x: _pool(a, x, largest=True),
    "Min": lambda a, x, *rest: x if not rest else torch.minimum(x, *rest),
    "Mul": _binary(torch.mul),
    "Neg": _unary(torch.neg),
    "Pad": _pad,
    "Pow": _binary(torch.pow),
    "Reciprocal": _unary(torch.reciprocal),
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceSum": _reduced(torch.sum),
    "Relu": _unary(torch.relu),
    "Reshape": _reshape,
    "Sigmoid": _unary(torch.sigmoid),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _unary(functional.softplus),
    "Sqrt": _unary(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _binary(torch.sub),
    "Tanh": _unary(torch.tanh),
    "Transpose": lambda a, x: x.permute(tuple(a.get("perm", reversed(range(x.ndim))))),
    "Unsqueeze": _unsqueeze,
    "Where": lambda a, condition, x, y: torch.where(condition.bool(), x, y),
}
