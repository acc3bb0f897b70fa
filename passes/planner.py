"""From a model and settings to a plan: find the weights, ask the codecs, meet the budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from onnxcomp.errors import UsageError
from onnxcomp.passes.calibrate import Feed
from onnxcomp.passes.choices import Candidate, Choice, Errors
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.codec import Codec, Params, Use, WeightSite
from onnxcomp.passes.estimates import Estimates
from onnxcomp.passes.fitting import fit
from onnxcomp.passes.menus import Menu, keep, menu, uniform, uniform_bits
from onnxcomp.passes.plan import Budget, Plan, SkippedWeight, Source
from onnxcomp.passes.settings import Rule, Settings, match_rule, method_names
from onnxcomp.passes.sites import find_sites
from onnxcomp.passes.sizing import planned_size, portable_load_bytes
from onnxcomp.passes.source import Loaded
from onnxcomp.passes.stages import Context, no_feeds, run_passes

__all__ = ["DEFAULT_BITS", "Prepared", "make_plan", "prepare", "settle"]

Feeds = Callable[[], Sequence[Feed] | None]

# Bits per weight where neither bits nor a target is asked for.
DEFAULT_BITS = 4

# The codec of what stays dense.
_HALF = "fp16"


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """A canonical model and its weights.

    Attributes:
        model: The model, canonicalised in place.
        path: Its file; None for a model that was given in memory.
        source: Name, bytes and hash of the input.
        sites: Weights a codec may be asked about.
        skipped: Other tensors, with reasons.
        notes: What the graph passes changed.
        facts: What they have to report, by the name of the pass.
    """

    model: ir.Model
    path: Path | None
    source: Source
    sites: tuple[WeightSite, ...]
    skipped: tuple[SkippedWeight, ...]
    notes: tuple[str, ...]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)


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
    skipped = tuple(
        SkippedWeight(t.name, t.shape, t.dtype, t.nbytes, t.uses, t.reason) for t in found.skipped
    )
    notes = tuple(note for change in changes.values() for note in change.notes)
    return Prepared(
        model, loaded.path, loaded.source, found.sites, skipped, notes, dict(context.facts)
    )


def _rule(site: WeightSite, settings: Settings) -> Rule:
    names = [site.name, *(use.node for use in site.uses)]
    return match_rule(settings.rules, names, [use.op_type for use in site.uses])


def _menu(site: WeightSite, methods: Sequence[str], settings: Settings, errors: Errors) -> Menu:
    """What there is to choose from; half precision last where the rest is to have it."""
    rule = _rule(site, settings)
    method_names(rule.methods or methods, CODECS, stock=settings.stock)
    if settings.rest == "keep" or rule.methods:
        return menu(site, methods, rule, errors=errors)
    others = [name for name in methods if name not in ("dense", _HALF)]

    def strict(codec: Codec, site: WeightSite, params: Sequence[Params]) -> Sequence[float]:
        found = errors(codec, site, params)
        if settings.rest == "fp16" or codec.name != _HALF:
            return found
        return [0.0 if error == 0.0 else math.inf for error in found]

    return menu(site, [*others, _HALF], rule, errors=strict)


def _measure(prepared: Prepared, settings: Settings, name: str, choices: Sequence[Choice]) -> int:
    return planned_size(prepared.model, prepared.sites, choices, settings, name=name)


def _choice(candidate: Candidate, settings: Settings) -> Choice:
    return Choice.of(candidate, _rule(candidate.site, settings).mode or settings.mode)


def _equal(menus: Sequence[Menu], bits: int, settings: Settings) -> list[Candidate]:
    """One candidate for each menu: with equal bits (`uniform_bits`), or those of its rule."""
    return [uniform(menu, _bits_of_rule(menu, settings, bits)) for menu in menus]


def _bits_of_rule(menu: Menu, settings: Settings, bits: int) -> int:
    fixed = _rule(menu.site, settings).params
    names = {CODECS[candidate.codec].width for candidate in menu.options}
    given = (int(fixed[name]) for name in names if name is not None and name in fixed)
    return next(given, uniform_bits(menu, bits))


def _check_bits(bits: int, methods: Sequence[str]) -> None:
    """Refuse bits per weight that no method offers, not even for a large weight."""
    use = Use("", "MatMul", 1, "matmul")
    sample = WeightSite("", (1024, 1024), "float32", (use,), "", 1024, 1024, False)
    offered: set[int] = set()
    for codec in (CODECS[name] for name in methods):
        if codec.width is None:
            return
        offered |= {int(getattr(params, codec.width)) for params in codec.candidates(sample)}
    if bits not in offered:
        raise UsageError(
            f"no method offers {bits} bits per weight",
            hint=f"choose from {', '.join(str(b) for b in sorted(offered))}",
        )


def make_plan(prepared: Prepared, settings: Settings, *, name: str = "out.onnx") -> Plan:
    """Decide for every site.

    Args:
        prepared: The model and its weights.
        settings: What is asked for.
        name: File name of the output; external data refers to it.

    Returns:
        A plan with the exact bytes of the output. When no plan meets the target, it is the
        smallest there is, and `Plan.met` is false.

    Raises:
        UsageError: A method, a rule or the number of bits does not exist.
    """
    budget = Budget.of(settings, prepared.source.bytes, DEFAULT_BITS)
    methods = method_names(settings.method, CODECS, stock=settings.stock)
    errors = Estimates(prepared.model).errors
    menus = [_menu(site, methods, settings, errors) for site in prepared.sites]

    def size_of(candidates: Sequence[Candidate]) -> int:
        choices = [_choice(candidate, settings) for candidate in candidates]
        return _measure(prepared, settings, name, choices)

    if budget.bytes is not None:
        picks, total = fit(menus, budget.bytes, size_of)
    else:
        bits = budget.bits or DEFAULT_BITS
        _check_bits(bits, methods)
        picks = _equal(menus, bits, settings)
        total = size_of(picks)
        picks, total = _worth_it(picks, total, size_of)
    choices = {pick.site.name: _choice(pick, settings) for pick in picks}
    memory = portable_load_bytes(prepared.sites, list(choices.values()))
    return Plan(prepared.source, settings, budget, choices, prepared.skipped, total, memory)


def _worth_it(
    picks: list[Candidate], total: int, size_of: Callable[[Sequence[Candidate]], int]
) -> tuple[list[Candidate], int]:
    """The picks, or nothing at all when what comes with them outweighs what they save."""
    if all(pick.reason or pick.codec == "dense" for pick in picks):
        return picks, total
    reason = "what compressed weights bring with them would outweigh what they save"
    untouched = [keep(pick.site, pick.reason or reason) for pick in picks]
    least = size_of(untouched)
    return (picks, total) if total < least else (untouched, least)


def settle(plan: Plan, prepared: Prepared, *, name: str = "out.onnx") -> Plan:
    """The plan with bytes and errors as they are for this model.

    Raises:
        UsageError: The plan does not fit the model.
    """
    settled = plan.settle(prepared.sites, Estimates(prepared.model).errors)
    choices = list(settled)
    return dataclasses.replace(
        settled,
        source=prepared.source,
        skipped=prepared.skipped,
        bytes=_measure(prepared, plan.settings, name, choices),
        portable_load_bytes=portable_load_bytes(prepared.sites, choices),
    )
