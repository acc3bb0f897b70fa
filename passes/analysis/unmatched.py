"""Patterns of the user that name nothing in a model: mostly a slip of the pen."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from onnxcomp.passes.analysis.weight_sites import Sites
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir import metadata
from onnxcomp.passes.ir.traversal import initializers, scopes

__all__ = ["unmatched", "warn_of_unmatched"]

log = logging.getLogger(__name__)

# Names that are told where a pattern matches none.
_NEAR = 3


def warn_of_unmatched(model: ir.Model, found: Sites, settings: Settings) -> None:
    """Log a warning for each pattern that matches no weight and no node.

    Args:
        model: The canonical model.
        found: Its weights.
        settings: With the patterns.
    """
    for text in unmatched(model, found, settings):
        log.warning("warning: %s", text)


def unmatched(model: ir.Model, found: Sites, settings: Settings) -> list[str]:
    """What to say of patterns that match nothing, each with the names nearest to it."""
    weights = [site.name for site in found.sites] + [one.name for one in found.skipped]
    kept = [value.meta.get(metadata.TRAINED, ()) for value in initializers(model).values()]
    weights += [name for names in kept for name in names]
    nodes = [node.name or "" for scope in scopes(model) for node in scope.graph]
    uses = {use.op_type for site in found.sites for use in site.uses}
    said = []
    for option, pattern in _patterns(settings):
        if not any(re.search(pattern, name) for name in (*weights, *nodes)):
            said.append(
                f"{option} {pattern!r} matches no weight and no node{_near(pattern, weights)}"
            )
    said += [
        f"--set {rule}: no weight is used by {rule.op}{_near(rule.op, uses)}"
        for rule in settings.rules
        if rule.op and rule.op not in uses
    ]
    return said


def _patterns(settings: Settings) -> Iterator[tuple[str, str]]:
    yield from (("--include", pattern) for pattern in settings.include)
    yield from (("--exclude", pattern) for pattern in settings.exclude)
    yield from (("--set", rule.pattern) for rule in settings.rules)


def _near(pattern: str, names: Iterable[str]) -> str:
    """The names that the pattern may have meant, or some of those there are."""
    known: Sequence[str] = sorted(set(names))
    plain = re.sub(r"[\\^$.*+?()\[\]{}|]", "", pattern)
    close = difflib.get_close_matches(plain, known, n=_NEAR, cutoff=0.5)
    if close:
        return f"; near it: {', '.join(close)}"
    return f"; there are, for example, {', '.join(known[:_NEAR])}" if known else ""
