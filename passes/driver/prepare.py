"""The first stage of a run: from a model as it was read to one that is ready for planning."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.analysis.site_facts import with_facts
from onnxcomp.passes.analysis.unmatched import warn_of_unmatched
from onnxcomp.passes.analysis.weight_sites import find_sites
from onnxcomp.passes.config.policy import resolve_policy
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.files import Loaded
from onnxcomp.passes.transforms.pass_manager import Context, no_feeds, run_passes
from onnxcomp.passes.transforms.prune.graph_pass import Prune, PruneChange
from onnxcomp.passes.transforms.registry import graph_passes
from onnxcomp.passes.weight import Feed

__all__ = ["prepare"]

Feeds = Callable[[], Sequence[Feed] | None]


def prepare(
    loaded: Loaded, settings: Settings, feeds: Feeds = no_feeds, *, threads: int = 1
) -> Prepared:
    """Run the graph passes on a model, in place, and find its weights.

    Args:
        loaded: The model.
        settings: What is asked for.
        feeds: Gives the calibration inputs to passes that need them.
        threads: How many weights are read at once.
    """
    model = loaded.model
    changes = run_passes(model, Context(settings, feeds), graph_passes())
    found = find_sites(
        model,
        min_size=settings.min_size,
        include=settings.include,
        exclude=settings.exclude,
        freeze_inputs=settings.freeze_inputs,
        threads=threads,
    )
    warn_of_unmatched(model, found, settings)
    sites = with_facts(model, found.sites, threads=threads)
    pruning = changes.get(Prune.name)
    return Prepared(
        model=model,
        path=loaded.path,
        source=loaded.source,
        sites=sites,
        policies={site.name: resolve_policy(site, settings) for site in sites},
        skipped=found.skipped,
        pruned=pruning.report if isinstance(pruning, PruneChange) else None,
    )
