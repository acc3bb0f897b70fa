"""The first stage of a run: from a model as it was read to one that is ready for planning."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

from onnxcomp.passes.analysis.prepared import Prepared
from onnxcomp.passes.analysis.site_facts import with_facts
from onnxcomp.passes.analysis.unmatched import warn_of_unmatched
from onnxcomp.passes.analysis.weight_sites import MIN_SIZE, find_sites, small_bytes
from onnxcomp.passes.config.policy import resolve_policy
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.ir.files import Loaded
from onnxcomp.passes.planning.plan import Budget
from onnxcomp.passes.transforms.pass_manager import Context, no_feeds, run_passes
from onnxcomp.passes.transforms.prune.graph_pass import Prune, PruneChange
from onnxcomp.passes.transforms.registry import graph_passes
from onnxcomp.passes.weight import Feed

__all__ = ["prepare", "with_small_weights"]

log = logging.getLogger(__name__)

Feeds = Callable[[], Sequence[Feed] | None]

# Bytes below which a tensor is left alone in any case: its nodes would take as many.
_LEAST_SIZE = 1024

# Share of a size that small weights may take as they are.
_SMALL_SHARE = 0.25


def with_small_weights(loaded: Loaded, settings: Settings) -> Settings:
    """Settings with a smaller least size of weights, where the size that is asked for needs it.

    Of most models what is below the least size is nothing beside the rest. In ResNet20 at a seventh
    of its size the filters of the first stage, 9 KiB each, would take a third of the file as they
    are, and leave one or two bits for all others.

    Args:
        loaded: The model as it was read.
        settings: What is asked for. Without a size, or with another least size than the usual one,
            nothing changes.
    """
    size = Budget.of(settings, loaded.source.bytes).bytes
    if size is None or settings.min_size != MIN_SIZE:
        return settings
    small = small_bytes(loaded.model, _LEAST_SIZE)
    if small <= _SMALL_SHARE * size:
        return settings
    log.info(
        "weights from %d bytes on are compressed: those below %d hold %d of %d bytes",
        _LEAST_SIZE, MIN_SIZE, small, size,
    )  # fmt: skip
    return dataclasses.replace(settings, min_size=_LEAST_SIZE)


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
