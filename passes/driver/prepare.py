"""From a model as it was read to one that is ready for planning."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnxcomp.passes.analysis.constants import mark_constants
from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.analysis.weight_sites import find_sites
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.files import Loaded
from onnxcomp.passes.transforms.pass_manager import Context, no_feeds, run_passes
from onnxcomp.passes.weight import Feed

__all__ = ["prepare"]

Feeds = Callable[[], Sequence[Feed] | None]


def prepare(loaded: Loaded, settings: Settings, feeds: Feeds = no_feeds) -> Prepared:
    """Run the graph passes on a model, in place, and find its weights.

    Args:
        loaded: The model.
        settings: What is asked for.
        feeds: Gives the calibration inputs to passes that need them.
    """
    model = loaded.model
    context = Context(settings, feeds)
    changes = run_passes(model, context)
    found = find_sites(
        model,
        min_size=settings.min_size,
        include=settings.include,
        exclude=settings.exclude,
        freeze_inputs=settings.freeze_inputs,
    )
    sites = mark_constants(model, found.sites)
    notes = tuple(note for change in changes.values() for note in change.notes)
    return Prepared(
        model, loaded.path, loaded.source, sites, found.skipped, notes, dict(context.facts)
    )
