"""Encode weights for the inputs that they see, and judge by inputs that were set aside.

Weights are encoded in the order of their use, each for what the model behind the compressed
earlier ones feeds it. Where plain encoding does as well on held-out inputs, it is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from onnxcomp.passes.analysis.offsets import offset_of
from onnxcomp.passes.analysis.weight_sites import read_weight
from onnxcomp.passes.encoding.encoded import EncodedWeight
from onnxcomp.passes.encoding.fitting import fitted
from onnxcomp.passes.encoding.journal import Journal, Walk
from onnxcomp.passes.encoding.look_ups import LookUps
from onnxcomp.passes.encoding.order import Order
from onnxcomp.passes.encoding.payload_cache import PayloadCache
from onnxcomp.passes.encoding.samples import Codecs, Samples, curvature_for
from onnxcomp.passes.encoding.workers import Plain, Workers
from onnxcomp.passes.planning.plan import Plan
from onnxcomp.passes.weight import Stats, WeightSite

__all__ = ["Plain", "Samples", "Workers", "encode_calibrated"]


def encode_calibrated(
    model: ir.Model,
    work: Sequence[WeightSite],
    plan: Plan,
    samples: Samples,
    plain: Plain,
    *,
    cache: PayloadCache | None = None,
    codecs: Codecs | None = None,
    jobs: int = 1,
    folder: Path | None = None,
    workers: Workers | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> Iterator[EncodedWeight]:
    """Encode weights, each once, in the order of their use; those not observed come first.

    Args:
        model: The canonical model; only read.
        work: Weights to encode.
        plan: Decisions for them.
        samples: Calibration inputs.
        plain: Encodes a weight without calibration.
        cache: Keeps what is finished, for a run that continues this one; None to keep nothing.
        codecs: Codecs of weights that share something, with that, by name.
        jobs: Threads of the encoders.
        folder: Where temporary files lie.
        workers: Encode weights; None to do so here. What the loss feels of products is known here
            only: weights that are encoded for that do not go to them.
        progress: Told how many bytes of weights workers have done that were not given yet.

    Raises:
        ModelError: The model does not run, or inputs of a weight hold NaN or infinite values.
    """
    offsets = {site.name: offset_of(model, site) for site in work}
    curvature = curvature_for(model, {site: plan[site.name] for site in work}, samples, folder)
    if curvature:
        workers = None
    with contextlib.ExitStack() as stack:
        there = None
        if workers is not None:
            there = stack.enter_context(
                workers.calibrating(model, plan, offsets, cache=cache, progress=progress)
            )
        elsewhere = None if there is None else there.elsewhere
        order = Order.of(model, work, plan, samples, offsets, jobs, folder, elsewhere)
        journal = Journal(cache, model, samples.feeds, order.choices(plan), order.facts)
        alone = plain
        if workers is not None:
            unknown = [site for site in order.others if journal.known(site) is None]
            alone = stack.enter_context(
                workers.encoding(model, unknown, plan, cache=cache, compare=False)
            )
        tables = LookUps(model, order.others, plan, samples, folder)

        def uncalibrated(site: WeightSite) -> EncodedWeight:
            read = functools.partial(read_weight, model, site)
            return tables.encoded(read, alone(site), order.reasons.get(site.name, ""), threads=jobs)

        def here(sites: Sequence[WeightSite], stats: Stats) -> Generator[EncodedWeight, None, None]:
            """Encode the weights of a group here; the last one may change its moments."""
            for site in sites:
                read = functools.partial(read_weight, model, site)
                codec = None if codecs is None else codecs.get(site.name)
                own = dataclasses.replace(
                    stats, outputs=curvature.pop(site.name, None), last=site == sites[-1]
                )
                yield fitted(read, plain(site), own, offsets[site.name], codec=codec, threads=jobs)

        fit = here if there is None else there.fit
        walk = Walk(order.products, journal, sequential=samples.sequential)
        yield from walk.plainly(order.others, uncalibrated)
        # Look-ups of a table come before its products, and all weights between see what is stored:
        # so it is encoded first, for what the dense model feeds its products.
        yield from Walk(order.tables, journal, sequential=False).fitted(fit, walk)
        yield from walk.fitted(fit)
        journal.close()
