"""Rules: settings for the weights whose names match."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import cast

from onnxcomp.errors import UsageError
from onnxcomp.passes.config.methods import split_methods
from onnxcomp.passes.config.values import MODES, ModeChoice, check_pattern, one_of

__all__ = ["ParamValue", "Rule", "match_rule", "parse_rule"]

ParamValue = int | float | str


@dataclasses.dataclass(frozen=True, slots=True)
class Rule:
    """Settings for the weights whose name, or the name of a node that uses them, matches.

    Attributes:
        pattern: Regular expression, searched for anywhere in the name.
        methods: Codecs to choose from; empty: those of the run.
        mode: How uses are served; None: as for the run.
        params: Codec parameters held fixed.
        op: Operator that has to use the weight, such as "Conv"; empty: any.
    """

    pattern: str
    methods: tuple[str, ...] = ()
    mode: ModeChoice | None = None
    params: Mapping[str, ParamValue] = dataclasses.field(default_factory=dict)
    op: str = ""

    def __str__(self) -> str:
        parts = [f"op={self.op}"] if self.op else []
        parts += [f"method={'+'.join(self.methods)}"] if self.methods else []
        parts += [f"mode={self.mode}"] if self.mode else []
        parts += [f"{key}={value}" for key, value in self.params.items()]
        return f"{self.pattern}:{','.join(parts)}"


def _value(text: str) -> ParamValue:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def parse_rule(text: str) -> Rule:
    """Read ``'RE:method=hyper,bits=5'``. Tensor names may hold colons: the last one separates.

    Raises:
        UsageError: No settings, a setting without a value, or an invalid expression.
    """
    pattern, colon, tail = text.rpartition(":")
    settings = [item.partition("=") for item in tail.split(",") if item.strip()]
    if not colon or not settings or any(not sign for _, sign, _ in settings):
        raise UsageError(
            f"{text!r} is not a rule", hint="write for example 'encoder.*:method=hyper,bits=5'"
        )
    check_pattern(pattern)
    values = {key.strip(): value.strip() for key, _, value in settings}
    methods = split_methods(values.pop("method", ""))
    mode = values.pop("mode", None)
    if mode is not None:
        one_of("mode", mode, MODES)
    op = values.pop("op", "")
    params = {key: _value(value) for key, value in values.items()}
    return Rule(pattern, methods, cast("ModeChoice | None", mode), params, op)


def match_rule(
    rules: Sequence[Rule], names: Sequence[str], operators: Sequence[str] = ()
) -> Rule | None:
    """The first rule that matches one of the names and operators; None where none does."""
    for rule in rules:
        if rule.op and rule.op not in operators:
            continue
        if any(re.search(rule.pattern, name) for name in names):
            return rule
    return None
