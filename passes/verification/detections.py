"""Of a detector: how many of the detections are found again.

Boxes and scores are told by shape and content: an output ``(..., n, 4)`` beside one of scores
``(..., n)`` or ``(..., n, classes)``, or one output that holds both, ``(..., n, 4 + classes)`` or
``(..., 4 + classes, n)``, with one more column where objects are scored as well. Models whose
outputs are none of these are no detectors as far as is known here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["DetectionAgreement", "Detections", "score_columns"]

Array = npt.NDArray[Any]

# What counts as a detection, and as the same one: the usual limits of the field.
SCORE, IOU = 0.25, 0.5

# Rows from which on a pair of outputs may be a detector's, and the most classes it may have.
_LEAST_ROWS, _MOST_COLUMNS = 16, 512

# Detections that are compared in one sample; models without suppression have thousands.
_MOST = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class Detections:
    """How many detections are found again.

    Attributes:
        reference: Detections of the reference.
        found: Those with a box of the same class and an IoU of at least 0.5 in the other.
        added: Detections of the other without such a box in the reference.
    """

    reference: int
    found: int
    added: int

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            **dataclasses.asdict(self),
            "share": self.found / self.reference if self.reference else None,
            "score": SCORE,
            "iou": IOU,
        }


class DetectionAgreement:
    """Adds up the detections of pairs of runs."""

    def __init__(self) -> None:
        self._reference = self._found = self._added = 0
        self._seen = False

    def add(self, reference: Mapping[str, Array], value: Mapping[str, Array]) -> None:
        """Take in the outputs of one sample."""
        for a, b in zip(_images(reference), _images(value), strict=False):
            self._seen = True
            matches = _matches(a, b)
            self._reference += len(a[0])
            self._found += int(matches.any(axis=1).sum())
            self._added += len(b[0]) - int(matches.any(axis=0).sum())

    def result(self) -> Detections | None:
        """The counts; None where no detections were told in any sample."""
        if not self._seen or not self._reference + self._added:
            return None
        return Detections(self._reference, self._found, self._added)


def score_columns(array: Array) -> tuple[int, slice] | None:
    """Axis and place of the scores in one output that holds boxes beside them; None for others.

    Scores so small that their type rounds them coarsely are none.
    """
    if array.dtype.kind != "f" or (told := _single(array)) is None:
        return None
    if told[1].max() < np.finfo(array.dtype).tiny:
        return None
    return (2 if array.shape[1] >= array.shape[2] else 1), slice(4, None)


def _images(outputs: Mapping[str, Array]) -> Iterator[tuple[Array, Array]]:
    """Boxes ``(n, 4)`` as corners and classes ``(n,)`` of each image; nothing for other models."""
    arrays = [np.asarray(a) for a in outputs.values() if np.asarray(a).dtype.kind == "f"]
    pair = _pair(arrays) or next((p for p in map(_single, arrays) if p is not None), None)
    if pair is None:
        return
    for boxes, scores in zip(*pair, strict=True):
        if scores.shape[1] > 1 and np.allclose(scores.sum(axis=1), 1.0, atol=1e-2):
            scores = scores[:, 1:]  # shares of one: the first class is the background
        best = scores.max(axis=1)
        chosen = np.flatnonzero(best > SCORE)
        chosen = chosen[np.argsort(-best[chosen], kind="stable")][:_MOST]
        yield _corners(boxes[chosen].astype(np.float64)), scores[chosen].argmax(axis=1)


def _pair(arrays: list[Array]) -> tuple[Array, Array] | None:
    """Boxes ``(images, n, 4)`` and scores ``(images, n, classes)`` of two outputs."""
    for boxes in arrays:
        if boxes.ndim not in (2, 3) or boxes.shape[-1] != 4 or boxes.shape[-2] < _LEAST_ROWS:
            continue
        count = boxes.shape[-2]
        for other in arrays:
            if other is boxes or not other.size or not _are_scores(other):
                continue
            if other.shape == boxes.shape[:-1]:
                return boxes.reshape(-1, count, 4), other.reshape(-1, count, 1)
            if other.ndim == boxes.ndim and other.shape[:-1] == boxes.shape[:-1]:
                return boxes.reshape(-1, count, 4), other.reshape(-1, count, other.shape[-1])
    return None


def _single(array: Array) -> tuple[Array, Array] | None:
    """The same of one output that holds boxes, beyond 1, and scores."""
    if array.ndim != 3 or min(array.shape[1:]) < 5 or max(array.shape[1:]) < _LEAST_ROWS:
        return None
    rows = array if array.shape[1] >= array.shape[2] else array.transpose(0, 2, 1)
    boxes, scores = rows[..., :4], rows[..., 4:]
    if rows.shape[2] > _MOST_COLUMNS or not _are_scores(scores) or np.abs(boxes).max() <= 2.0:
        return None
    if scores.shape[2] > 1 and array.shape[1] >= array.shape[2]:
        scores = scores[..., :1] * scores[..., 1:]  # of an object, and of its class
    return boxes, scores


def _are_scores(array: Array) -> bool:
    return bool((array >= 0.0).all() and (array <= 1.0).all())


def _corners(boxes: Array) -> Array:
    """Boxes as two corners: as they are, or from centres and sizes."""
    if not len(boxes) or (boxes[:, 2:] >= boxes[:, :2]).all():
        return boxes
    half = np.abs(boxes[:, 2:]) / 2
    return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], axis=1)


def _matches(a: tuple[Array, Array], b: tuple[Array, Array]) -> Array:
    """Which boxes of two images are the same, ``(n, m)``."""
    (first, kinds), (second, others) = a, b
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.prod(np.maximum(high - low, 0.0), axis=2)
    sizes = [np.prod(np.maximum(x[:, 2:] - x[:, :2], 0.0), axis=1) for x in (first, second)]
    union = sizes[0][:, None] + sizes[1][None, :] - common
    overlap = common / np.where(union > 0.0, union, 1.0)
    same: Array = (overlap >= IOU) & (kinds[:, None] == others[None, :])
    return same
