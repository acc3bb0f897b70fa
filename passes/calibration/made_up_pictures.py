"""Pictures made up for a model, to learn means of what its convolutions read without any data.

Neighbouring pixels of a picture are much alike: the power of its frequencies falls with their
square. What a trained network makes of such noise is not what it makes of photographs, but the
means of its channels come from biases and activations more than from what is seen.
"""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir

from onnxcomp.errors import CompressionError
from onnxcomp.passes.calibration.perturbation import made_up_inputs
from onnxcomp.passes.weight import Array, Feed

__all__ = ["made_up_pictures"]

log = logging.getLogger(__name__)

# Standard deviation of floating-point pixels, and middle and standard deviation of bytes. Networks
# read values of about -1 to 1 or 0 to 1, or divide them by their own deviation. For one that reads
# -127 to 127 they are a nearly even picture: that brings little, and does no harm.
_SPREAD, _BYTE_MIDDLE, _BYTE_SPREAD = 0.5, 128.0, 60.0

# How much of a pixel is brightness, and how much is colour, in shares of the power.
_BRIGHTNESS = 0.64

# How many are made, and how many numbers they may hold together.
_COUNT, _LARGEST = 8, 1 << 23


def made_up_pictures(model: ir.Model, *, seed: int = 0) -> list[Feed] | None:
    """Inputs for a model that reads one picture; None for others.

    A picture has four axes, the second or the last of one or three colours.

    Args:
        model: The model.
        seed: Same seed, same pictures.
    """
    inputs = [value for value in model.graph.inputs if not value.is_initializer()]
    if len(inputs) != 1 or _colours(inputs[0]) is None:
        return None
    try:
        feeds = made_up_inputs(model, seed=seed, samples=_COUNT)
    except CompressionError as error:
        log.info("no pictures are made up: %s", error.message)
        return None
    axis, name = _colours(inputs[0]), inputs[0].name or ""
    rng = np.random.default_rng(seed)
    size = max(1, feeds[0][name].size)
    count = max(1, min(_COUNT, _LARGEST // size))
    return [{name: _picture(feed[name], axis or 1, rng)} for feed in feeds[:count]]


def _colours(value: ir.Value) -> int | None:
    """The axis of colours, where the value is a picture."""
    if value.shape is None or len(value.shape) != 4 or value.dtype is None:
        return None
    if not (value.dtype.is_floating_point() or value.dtype == ir.DataType.UINT8):
        return None
    return next((axis for axis in (1, 3) if value.shape[axis] in (1, 3)), None)


def _picture(like: Array, axis: int, rng: np.random.Generator) -> Array:
    """Pictures in the shape and type of an array."""
    count, colours, height, width = np.moveaxis(like, axis, 1).shape
    falling = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    falling[0, 0] = 1.0 / max(height, width)
    white = rng.standard_normal((count, 1 + colours, height, width))
    smooth = np.fft.irfft2(np.fft.rfft2(white) / falling, s=(height, width))
    smooth = np.sqrt(_BRIGHTNESS) * smooth[:, :1] + np.sqrt(1.0 - _BRIGHTNESS) * smooth[:, 1:]
    smooth /= np.maximum(smooth.std(axis=(1, 2, 3), keepdims=True), 1e-12)
    if like.dtype == np.uint8:
        smooth = np.clip(np.rint(_BYTE_MIDDLE + _BYTE_SPREAD * smooth), 0, 255)
    else:
        smooth = _SPREAD * smooth
    return np.ascontiguousarray(np.moveaxis(smooth, 1, axis)).astype(like.dtype)
