"""From menus to one candidate for each weight: equal bits, a size, or an error to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from onnxcomp.errors import UsageError
from onnxcomp.passes.allocate import allocate
from onnxcomp.passes.choices import Candidate
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.codec import Use, WeightSite
from onnxcomp.passes.filters import with_better_filters
from onnxcomp.passes.fitting import fit, with_dense
from onnxcomp.passes.menus import Menu, keep, uniform, uniform_bits
from onnxcomp.passes.plan import Budget
from onnxcomp.passes.settings import Rule, Settings, match_rule, method_names

__all__ = ["DEFAULT_BITS", "choose", "expected_error", "rule_of"]

# Bits per weight where neither bits nor a target is asked for.
DEFAULT_BITS = 4

# Halvings of the range of bytes in which the least size for an error is looked for.
_HALVINGS = 24

SizeOf = Callable[[Sequence[Candidate]], int]


def rule_of(site: WeightSite, settings: Settings) -> Rule:
    """The rule that speaks of a weight, by its name or by those of the nodes that use it."""
    names = [site.name, *(use.node for use in site.uses)]
    return match_rule(settings.rules, names, [use.op_type for use in site.uses])


def expected_error(menus: Sequence[Menu], picks: Sequence[Candidate]) -> float | None:
    """Expected relative error of the outputs; None where sensitivities were not measured."""
    if any(menu.sensitivity is None for menu in menus):
        return None
    noise = (menu.expected_noise(pick) for menu, pick in zip(menus, picks, strict=True))
    return math.sqrt(math.fsum(noise))


def choose(
    menus: Sequence[Menu], budget: Budget, settings: Settings, size_of: SizeOf
) -> tuple[list[Candidate], int]:
    """One candidate for each menu, and the bytes of the output.

    Raises:
        UsageError: No method offers the number of bits.
    """
    if budget.bytes is not None:
        return fit(menus, budget.bytes, size_of)
    if budget.max_error is not None and budget.bits is None:
        picks = smallest_within(menus, budget.max_error)
        return _worth_it(picks, size_of(picks), size_of)
    bits = budget.bits or DEFAULT_BITS
    _check_bits(bits, method_names(settings.method, CODECS, stock=settings.stock))
    fixed = {menu.site.name: _fixed_bits(menu, settings) for menu in menus}
    wanted = [fixed[menu.site.name] or uniform_bits(menu, bits) for menu in menus]
    picks = [uniform(menu, own) for menu, own in zip(menus, wanted, strict=True)]
    picks = with_better_filters(menus, picks, [name for name, own in fixed.items() if own])
    return _worth_it(picks, size_of(picks), size_of)


def smallest_within(menus: Sequence[Menu], max_error: float) -> list[Candidate]:
    """The smallest candidates whose expected error of the outputs is at most `max_error`."""
    menus = [with_dense(menu) for menu in menus]
    low = sum(min(c.bytes for c in menu.options) for menu in menus)
    high = sum(max(c.bytes for c in menu.options) for menu in menus)
    best = allocate(menus, high)
    for _ in range(_HALVINGS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        picks = allocate(menus, middle)
        error = expected_error(menus, picks)
        if error is None or error <= max_error:
            best, high = picks, middle
        else:
            low = middle
    return best


def _fixed_bits(menu: Menu, settings: Settings) -> int | None:
    """Bits that a rule gives to a weight."""
    fixed = rule_of(menu.site, settings).params
    names = {CODECS[candidate.codec].width for candidate in menu.options}
    return next((int(fixed[name]) for name in names if name is not None and name in fixed), None)


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


def _worth_it(picks: list[Candidate], total: int, size_of: SizeOf) -> tuple[list[Candidate], int]:
    """The picks, or nothing at all when what comes with them outweighs what they save."""
    if all(pick.reason or pick.codec == "dense" for pick in picks):
        return picks, total
    reason = "what compressed weights bring with them would outweigh what they save"
    untouched = [keep(pick.site, pick.reason or reason) for pick in picks]
    least = size_of(untouched)
    return (picks, total) if total < least else (untouched, least)
