"""What decides which bytes are written: options, checked and in one form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.passes.config.methods import split_methods
from onnxcomp.passes.config.option import Options, table
from onnxcomp.passes.config.options import TARGETS, ByteOptions
from onnxcomp.passes.config.rules import Rule
from onnxcomp.passes.suggest import suggest

__all__ = ["Settings", "settings_from"]

_HOW_MUCH = "give --prune-ratio 0.3, --target-flops 0.7 (that stay), or --ratio with --data"

# What plans and results call a setting whose argument in Python has another name.
_PUBLISHED = {"set_": "rules"}


@table
class Settings(ByteOptions):
    """Everything that decides which bytes are written, checked.

    Attributes are the options of `ByteOptions`, by name.

    Attributes:
        divide: Whether pruning takes the share of the budget with the least loss.
    """

    divide: bool | None = None

    def __post_init__(self) -> None:
        Options.__post_init__(self)
        targets = [name for name in TARGETS if getattr(self, name) is not None]
        if len(targets) > 1:
            raise UsageError(
                f"{' and '.join(targets)} were given together", hint="choose one of them"
            )
        shares = [n for n in ("prune_ratio", "target_flops") if getattr(self, n) is not None]
        if len(shares) > 1:
            raise UsageError(
                f"{' and '.join(shares)} were given together", hint="choose one of them"
            )
        experts = self.prune_experts
        if experts is not None and experts > 1 and experts != int(experts):
            raise UsageError(
                f"prune_experts is {experts:g}",
                hint="give a whole number of experts, or a share below 1",
            )
        if self.functions != "local" and not self.portable:
            raise UsageError(
                f"functions is {self.functions!r}, but portable is false",
                hint="inlined definitions are what makes a model portable: leave portable out",
            )
        ways = (self.prune_score, self.prune_search, self.prune_caches)
        if self.divide and self.prune_search:
            raise UsageError(
                "divisions between layers are tried for one share, and a size is to decide it",
                hint="run it without --prune-search, then with the share that it finds: "
                "--prune-ratio 0.2",
            )
        if not shares and not self.divide and any(ways):
            raise UsageError("a way to prune is given, but not how much", hint=_HOW_MUCH)

    @property
    def timed(self) -> bool:
        """Whether it matters how long a run takes."""
        return self.max_slowdown is not None or self.objective == "latency"

    @property
    def rules(self) -> tuple[Rule, ...]:
        """Settings for single weights; the first match wins."""
        return self.set_

    def to_json(self) -> dict[str, Any]:
        """Settings by name; what is unset is left out, so that files stay readable."""
        plain = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                value = [str(item) if isinstance(item, Rule) else item for item in value]
            if value is not None:
                plain[_PUBLISHED.get(field.name, field.name)] = value
        return plain

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settings:
        """Inverse of `to_json`.

        Raises:
            UsageError: A name is unknown or a value is out of range.
        """
        arguments = {
            _PUBLISHED.get(field.name, field.name): field.name for field in dataclasses.fields(cls)
        }
        for name in values:
            if name not in arguments:
                raise UsageError(f"setting {name!r} is unknown", hint=suggest(name, arguments))
        return cls(**{arguments[name]: value for name, value in values.items()})


def settings_from(options: ByteOptions) -> Settings:
    """Settings from the options of a call.

    The method "prune" stands for a pass over the graph: other methods then store what is left, or
    none where it is the only one. With a size and no share to prune, both divide the size.

    Raises:
        UsageError: Options contradict each other.
    """
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(ByteOptions)}
    asked = [name for item in options.method for name in split_methods(item)]
    stored = tuple(name for name in asked if name != "prune")
    if len(stored) == len(asked):
        return Settings(**given)
    shares = (options.prune_ratio, options.target_flops)
    whole = (options.prune_experts, options.prune_layers)
    unsaid = all(share is None for share in (*shares, *whole))
    if unsaid and options.ratio is None and options.target_size is None:
        raise UsageError("the method prune was asked for, but not how much", hint=_HOW_MUCH)
    divide = True if unsaid else None
    return Settings(**given | {"method": stored or ("dense",), "divide": divide})
