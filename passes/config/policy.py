"""What a user asks of one weight, with all rules considered: resolved once, when it is found."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.config.methods import method_names
from onnxcomp.passes.config.rules import ParamValue, Rule, match_rule
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.config.values import ModeChoice, Target
from onnxcomp.passes.weight import WeightSite

__all__ = ["HALF", "Policy", "resolve_policy", "selected"]

# The codec of half precision, for what stays dense.
HALF = "fp16"

# The codec that leaves out zeros, exactly.
_SPARSE = "sparse"


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """What is asked of one weight.

    Attributes:
        methods: Codecs to choose from.
        mode: How uses are served.
        params: Codec parameters held fixed.
        rule: The rule that speaks of the weight; None where none does.
        exact_half: Whether half precision may be taken only where no value changes.
        target: Machines that the weight is to be fast on.
    """

    methods: tuple[str, ...]
    mode: ModeChoice = "auto"
    params: Mapping[str, ParamValue] = dataclasses.field(default_factory=dict)
    rule: Rule | None = None
    exact_half: bool = False
    target: Target = "any"

    @classmethod
    def of(cls, settings: Settings, names: Sequence[str], operators: Sequence[str] = ()) -> Policy:
        """The policy for a weight.

        Args:
            settings: What is asked for.
            names: Of the weight and of the nodes that use it.
            operators: That use it.

        Raises:
            UsageError: A method is unknown, or needs the library where none is wanted.
        """
        rule = match_rule(settings.rules, names, operators)
        asked = settings.method if rule is None else rule.methods or settings.method
        methods = method_names(asked, CODECS, stock=settings.stock, timed=_rounds(settings))
        own = rule is not None and bool(rule.methods)
        if settings.rest != "keep" and not own:
            methods = (*(name for name in methods if name not in ("dense", HALF)), HALF)
        if settings.rest == "exact" and not own and not settings.stock:
            methods = tuple(dict.fromkeys((*methods, _SPARSE)))
        return cls(
            methods,
            (rule.mode if rule is not None else None) or settings.mode,
            {} if rule is None else rule.params,
            rule,
            settings.rest == "exact" and not own,
            settings.target,
        )


def _rounds(settings: Settings) -> bool:
    """Whether products may round all their activations with one range, for speed on a CPU."""
    return settings.timed and settings.precision == "int8" and settings.target != "cuda"


def resolve_policy(site: WeightSite, settings: Settings) -> Policy:
    """The policy for a weight, by its name or by those of the nodes that use it.

    Raises:
        UsageError: A method is unknown, or needs the library where none is wanted.
    """
    names = [site.name, *(use.node for use in site.uses)]
    return Policy.of(settings, names, [use.op_type for use in site.uses])


def selected(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Whether patterns allow something with these names to be touched.

    Args:
        names: Of a weight and of the nodes that read it.
        include: When given, one of them must match one of the names.
        exclude: None of them may.
    """

    def matches(patterns: Sequence[str]) -> bool:
        return any(re.search(pattern, name) for pattern in patterns for name in names)

    return (not include or matches(include)) and not matches(exclude)
