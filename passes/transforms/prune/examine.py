"""What pruning knows of a model before anything is decided."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import onnx_ir as ir

from onnxcomp.passes.transforms.prune.axes import Analysis, analyse
from onnxcomp.passes.transforms.prune.feeds import probe_feeds
from onnxcomp.passes.transforms.prune.groups import Group, Groups, find_groups
from onnxcomp.passes.transforms.prune.prepare import prepare
from onnxcomp.passes.weight import Feed

__all__ = ["Examined", "examine"]


@dataclasses.dataclass(frozen=True, slots=True)
class Examined:
    """A model whose channels are known.

    Attributes:
        analysis: Which channels stand or fall together.
        groups: What may go.
        feed: Inputs that sizes were learnt from.
    """

    analysis: Analysis
    groups: Groups
    feed: Feed


def examine(
    model: ir.Model,
    given: Feed | None = None,
    *,
    biases: bool = False,
    freeze_inputs: bool = False,
    caches: bool = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Examined:
    """Make a model ready, in place, and find out what may go.

    Args:
        model: A canonical model.
        given: Inputs that are known to fit; made up where there are none.
        biases: See `prepare`.
        freeze_inputs: Whether initializers that are also inputs may shrink.
        caches: Whether inputs and outputs that hold a cache may shrink.
        include: Regular expressions; when given, only groups with a matching weight may go.
        exclude: Regular expressions of weights that keep their shape.

    Raises:
        ModelError: ONNX Runtime cannot run the model.
        UsageError: The model refuses all inputs made up for it.
    """
    prepare(model, biases=biases)
    feeds = probe_feeds(model, given)
    analysis = analyse(model, feeds, freeze_inputs=freeze_inputs, caches=caches)
    return Examined(analysis, _allowed(find_groups(analysis), include, exclude), feeds[0])


def _allowed(groups: Groups, include: Sequence[str], exclude: Sequence[str]) -> Groups:
    """Groups whose weights the patterns let change."""

    def wanted(group: Group) -> bool:
        def matches(patterns: Sequence[str]) -> bool:
            return any(re.search(p, name) for p in patterns for name in group.weights)

        return (not include or matches(include)) and not matches(exclude)

    return dataclasses.replace(groups, groups=tuple(g for g in groups.groups if wanted(g)))
