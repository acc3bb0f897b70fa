"""How convolutions cut their inputs into vectors, so that they become products."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from onnxcomp.passes.weight import Array

__all__ = ["Patches", "patches", "windows"]

# Output positions of one input that vectors are taken from, at most.
_POSITIONS = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Patches:
    """How a convolution cuts its input ``(n, channels, ...)`` into columns of ``im2col``.

    Attributes:
        kernel: Sizes of the window.
        strides: Steps of the window.
        dilations: Steps inside the window.
        pads: Zeros before and after each axis.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]

    @classmethod
    def points(cls, axes: int) -> Patches:
        """Every position on its own, for values with some axes of positions."""
        ones = (1,) * axes
        return cls(ones, ones, ones, ((0, 0),) * axes)


def windows(node: ir.Node, kernel: tuple[int, ...]) -> Patches | None:
    """The windows of a Conv, for each of its groups; None with pads that depend on the input."""
    attributes, axes = node.attributes, len(kernel)
    automatic = attributes.get_string("auto_pad", "NOTSET")
    if automatic not in ("NOTSET", "VALID"):
        return None
    flat = tuple(attributes.get_ints("pads", (0,) * (2 * axes)))
    if automatic == "VALID":
        flat = (0,) * (2 * axes)
    return Patches(
        kernel,
        tuple(attributes.get_ints("strides", (1,) * axes)),
        tuple(attributes.get_ints("dilations", (1,) * axes)),
        tuple(zip(flat[:axes], flat[axes:], strict=True)),
    )


def patches(x: Array, cut: Patches) -> Array:
    """Input vectors of a convolution: ``(n, channels, ...)`` -> ``(vectors, channels * window)``.

    The order within a vector is that of a weight ``(out, channels, *kernel)``. Of many output
    positions an even sample is taken.
    """
    axes = range(2, 2 + len(cut.kernel))
    x = np.pad(x, ((0, 0), (0, 0), *cut.pads))
    reach = [(k - 1) * d + 1 for k, d in zip(cut.kernel, cut.dilations, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(x, reach, axis=tuple(axes))
    steps = tuple(slice(None, None, step) for step in cut.strides)
    inner = tuple(slice(None, None, step) for step in cut.dilations)
    view = view[(slice(None), slice(None), *steps, *inner)]
    # (n, channels, positions..., window...) -> (n, positions..., channels, window...)
    view = np.moveaxis(view, 1, 1 + len(cut.kernel))
    outer = view.shape[: 1 + len(cut.kernel)]
    count = int(np.prod(outer))
    chosen = np.unravel_index(np.arange(0, count, max(1, -(-count // _POSITIONS))), outer)
    return np.ascontiguousarray(view[chosen]).reshape(len(chosen[0]), -1)
