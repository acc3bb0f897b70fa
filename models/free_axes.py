"""Free axes of a call's tensors, as `torch.onnx.export` takes them and as both exporters want them.

They are given by parameter of `forward` or by position, ``{"x": {0: "batch"}}``. Parameters that
are not named have fixed sizes; a cache that is not named is free in its batch and its positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.models.caches import SOURCE_AXIS
from onnxcomp.models.torch_calls import Call
from onnxcomp.passes.suggest import suggest

__all__ = ["free_axes", "named_axes"]

# Steps of a path that lead to a tensor of a cache, and the names of positions there.
_POSITIONS = {"encoder": "source"}
_PAST = "past"


def free_axes(call: Call, shapes: Any) -> list[Any]:
    """The axes of each tensor that are free, as they were given; None where none are.

    Raises:
        UsageError: A parameter is named that the call does not have.
    """
    if shapes is None:
        return [None] * len(call.paths)
    if not isinstance(shapes, Mapping):
        parameters = list(dict.fromkeys(path[0] for path in call.paths))
        shapes = dict(zip(parameters, shapes, strict=False))
    # With **kwargs torch wants the names one level deeper.
    shapes = {**shapes, **(shapes["kwargs"] if isinstance(shapes.get("kwargs"), Mapping) else {})}
    known = {*(path[0] for path in call.paths), *call.kwargs, "kwargs"}
    for name, dims in shapes.items():
        if name not in known and dims is not None:
            raise UsageError(
                f"dynamic_shapes names {name!r}, which the module is not given",
                hint=suggest(str(name), sorted(map(str, known - {"kwargs"}))),
            )
    batch = _batch(call, shapes)
    return [_of(shapes, path, batch) for path in call.paths]


def _of(shapes: Mapping[str, Any], path: Sequence[Any], batch: Any) -> Any:
    """The free axes of one tensor."""
    below = path[1:]
    given: Any = shapes.get(path[0])
    if below and below[-1] in ("key", "value") and isinstance(below[0], int):
        if given is None:
            return {0: batch, SOURCE_AXIS: _POSITIONS.get(str(below[1]), _PAST)}
        if isinstance(given, Mapping) and all(isinstance(axis, int) for axis in given):
            return given
    for key in below:
        try:
            given = given[key]
        except (KeyError, IndexError, TypeError):
            return None
    return given


def _batch(call: Call, shapes: Mapping[str, Any]) -> Any:
    """What the first axis of the tensors that are named is called."""
    for path in call.paths:
        dims: Any = shapes.get(path[0])
        found = dict(_axes("", dims)).get(0) if len(path) == 1 else None
        if found is not None:
            return dims[0]
    return "batch"


def named_axes(name: str, dims: Any) -> dict[int, str]:
    """Free axes of one tensor with the names of their sizes."""
    return dict(_axes(name, dims))


def _axes(name: str, dims: Any) -> Iterator[tuple[int, str]]:
    pairs = dims.items() if isinstance(dims, Mapping) else enumerate(dims or ())
    for axis, dim in pairs:
        if isinstance(dim, str):
            yield axis, dim
        elif dim is not None and not isinstance(dim, int) and "STATIC" not in str(dim):
            # Dim("batch") has a name; Dim.DYNAMIC and Dim.AUTO have none.
            yield axis, getattr(dim, "__name__", f"{name}_dim_{axis}")
