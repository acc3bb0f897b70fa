"""Plans: which codec stores each weight and at how many bytes. Readable, editable, replayable.

A plan is made by `passes.planning.planner`, can be written to JSON, changed by hand or in Python,
and applied again. The bytes and errors in it follow from the codecs: they are computed anew when a
plan is applied, so that an edited file cannot promise what it does not hold.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.passes.analysis.prune_report import PruneReport
from onnxcomp.passes.analysis.weight_sites import SkippedWeight
from onnxcomp.passes.config.settings import Settings
from onnxcomp.passes.config.values import parse_size
from onnxcomp.passes.ir.files import Source
from onnxcomp.passes.planning.candidates import Choice, Estimator, known_keys
from onnxcomp.passes.suggest import suggest
from onnxcomp.passes.weight import WeightSite

__all__ = ["VERSION", "Budget", "Plan"]

VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """What a plan has to meet: equal bits everywhere, output bytes, or an error.

    Attributes:
        bits: Bits per weight, the same for all sites.
        bytes: Most bytes the output may have, external data included.
        ratio: The ratio `bytes` came from, for messages.
        max_error: Largest relative error of an output.
        max_slowdown: How many times as long as the original the output may run.
    """

    bits: int | None = None
    bytes: int | None = None
    ratio: float | None = None
    max_error: float | None = None
    max_slowdown: float | None = None

    @classmethod
    def of(cls, settings: Settings, input_bytes: int, default_bits: int = 4) -> Budget:
        """The budget of a run on a model of `input_bytes` bytes."""
        base = cls(max_error=settings.max_error, max_slowdown=settings.max_slowdown)
        if settings.ratio is not None:
            size = int(input_bytes / settings.ratio)
            return dataclasses.replace(base, bytes=size, ratio=settings.ratio)
        if settings.target_size is not None:
            return dataclasses.replace(base, bytes=parse_size(settings.target_size))
        if settings.bits is None and settings.max_error is not None:
            return base
        return dataclasses.replace(
            base, bits=default_bits if settings.bits is None else settings.bits
        )

    def to_json(self) -> dict[str, Any]:
        """The attributes that are set."""
        return {key: v for key, v in dataclasses.asdict(self).items() if v is not None}


def _skipped(values: Mapping[str, Any]) -> SkippedWeight:
    """Inverse of `SkippedWeight.to_json`."""
    known_keys(values, frozenset(SkippedWeight.__slots__), "a skipped tensor of the plan")
    plain: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in values.items()
    }
    return SkippedWeight(**plain)


@dataclasses.dataclass(slots=True)
class Plan:
    """Decisions for all weights of one model, by name, in the order of the model.

    Attributes:
        source: The model it was made for.
        settings: What was asked for, as far as it decides which bytes are written.
        budget: What the plan has to meet.
        choices: One decision for each site.
        skipped: Tensors that are not sites, with reasons.
        bytes: Bytes of the output, exactly; None after a change until it is applied.
        portable_load_bytes: Expected peak memory, beyond that of any session, to load the output
            without the operator library; None after a change until it is applied.
        slowdown: How many times as long as the original the output is expected to run; None where
            times were not measured.
        error: Expected relative error of the outputs, from what noise in each weight does to them;
            None where that was not measured.
        loss: Expected loss of the outputs: their divergence where they are distributions, the
            square of `error` elsewhere; None where that was not measured.
        loss_error: Standard error of `loss`, by how much inputs differ; None where that is not
            known.
        compared: Plans that were compared by a measured loss, the chosen one first.
        pruned: What pruning takes out before; None without pruning.
        division: Where pruning and codes share one budget: the divisions that were tried, this
            plan's first.
    """

    source: Source
    settings: Settings
    budget: Budget
    choices: dict[str, Choice]
    skipped: tuple[SkippedWeight, ...] = ()
    bytes: int | None = None
    portable_load_bytes: int | None = None
    error: float | None = None
    slowdown: float | None = None
    loss: float | None = None
    loss_error: float | None = None
    compared: tuple[Mapping[str, Any], ...] = ()
    pruned: PruneReport | None = None
    division: tuple[Mapping[str, Any], ...] = ()

    def __getitem__(self, name: str) -> Choice:
        if name not in self.choices:
            raise UsageError(f"the plan has no site {name!r}", hint=suggest(name, self.choices))
        return self.choices[name]

    def __setitem__(self, name: str, choice: Choice) -> None:
        if self[name].site != choice.site:
            raise UsageError(
                f"the choice for {choice.site!r} cannot be given to {name!r}",
                hint=f"start from plan[{name!r}].with_(...)",
            )
        self.choices[name] = choice
        self.bytes = self.portable_load_bytes = self.error = self.slowdown = None
        self.loss = self.loss_error = None
        self.compared = ()

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices.values())

    def __len__(self) -> int:
        return len(self.choices)

    @property
    def met(self) -> bool:
        """Whether as much is pruned, and the output as small, as asked for."""
        if self.pruned is not None and not self.pruned.met:
            return False
        wanted = self.budget.bytes
        return wanted is None or (self.bytes is not None and self.bytes <= wanted)

    @property
    def ratio(self) -> float | None:
        """Bytes of the input over bytes of the output."""
        return None if not self.bytes else self.source.bytes / self.bytes

    @property
    def loss_interval(self) -> tuple[float, float] | None:
        """Where `loss` lies with many inputs of this kind; None where that is not known.

        Two standard errors of its logarithm to either side: losses are positive, and few inputs
        that lose much make large ones more likely than a symmetric interval says. It tells the
        chance among inputs alone, not what a plan is wrong about.
        """
        if not self.loss or self.loss_error is None:
            return None
        factor = math.exp(2.0 * math.sqrt(math.log1p((self.loss_error / self.loss) ** 2)))
        return self.loss / factor, self.loss * factor

    def settle(self, sites: Sequence[WeightSite], estimator: Estimator | None = None) -> Plan:
        """A copy whose bytes and errors are those of the codecs on these sites.

        Sites that the plan does not name stay as they are: deleting a line leaves a weight alone.

        Args:
            sites: The weights of the model.
            estimator: None for the errors that codecs expect without looking at the weights.

        Raises:
            UsageError: The plan names a site the model lacks, or a codec refuses its site.
        """
        known = {site.name: site for site in sites}
        for name in self.choices:
            if name not in known:
                raise UsageError(
                    f"the plan has a site {name!r}, the model has none", hint=suggest(name, known)
                )
        settled = {
            name: self.choices[name].settle(site, estimator)
            if name in self.choices
            else Choice.untouched(site, "not in the plan")
            for name, site in known.items()
        }
        return dataclasses.replace(
            self,
            choices=settled,
            bytes=None,
            portable_load_bytes=None,
            error=None,
            slowdown=None,
            loss=None,
            loss_error=None,
            compared=(),
        )

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "version": VERSION,
            "source": dataclasses.asdict(self.source),
            "settings": self.settings.to_json(),
            "budget": self.budget.to_json(),
            "bytes": self.bytes,
            "portable_load_bytes": self.portable_load_bytes,
            "error": None if self.error is None else float(f"{self.error:.4g}"),
            **_rounded(loss=self.loss, loss_error=self.loss_error),
            "slowdown": None if self.slowdown is None else float(f"{self.slowdown:.4g}"),
            **({"compared": [dict(entry) for entry in self.compared]} if self.compared else {}),
            **({} if self.pruned is None else {"prune": self.pruned.to_json()}),
            **({"division": [dict(trial) for trial in self.division]} if self.division else {}),
            "sites": [choice.to_json() for choice in self],
            "skipped": [tensor.to_json() for tensor in self.skipped],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """Inverse of `to_json`.

        Raises:
            UsageError: The version, a key, a codec or a parameter is not known.
        """
        if values.get("version") != VERSION:
            raise UsageError(
                f"the plan has version {values.get('version')!r}",
                hint=f"this release reads version {VERSION}; make the plan again",
            )
        known_keys(values, _PLAN_KEYS, "the plan")
        choices = [Choice.from_json(item) for item in values.get("sites", ())]
        names = [choice.site for choice in choices]
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        if twice:
            raise UsageError(f"the plan has {twice[0]!r} twice", hint="remove one of the lines")
        source, pruned = values.get("source", {}), values.get("prune")
        return cls(
            source=Source(source.get("name", ""), source.get("bytes", 0), source.get("sha256")),
            settings=Settings.from_json(values.get("settings", {})),
            budget=Budget(**values.get("budget", {})),
            choices=dict(zip(names, choices, strict=True)),
            skipped=tuple(_skipped(item) for item in values.get("skipped", ())),
            bytes=values.get("bytes"),
            portable_load_bytes=values.get("portable_load_bytes"),
            error=values.get("error"),
            slowdown=values.get("slowdown"),
            loss=values.get("loss"),
            loss_error=values.get("loss_error"),
            compared=tuple(values.get("compared", ())),
            pruned=None if pruned is None else PruneReport.from_json(pruned),
            division=tuple(values.get("division", ())),
        )

    def dumps(self) -> str:
        """JSON text with one line for each weight; the same plan gives the same text."""
        return _lines(self.to_json())

    @classmethod
    def loads(cls, text: str) -> Plan:
        """Inverse of `dumps`.

        Raises:
            UsageError: The text is not JSON or not a plan.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise UsageError(
                f"the plan is not JSON: {error.msg} in line {error.lineno}",
                hint="correct the line, or make the plan again",
            ) from error
        try:
            return cls.from_json(values)
        except (AttributeError, TypeError, ValueError) as error:
            raise UsageError(
                f"the plan does not have the form that this release writes: {error}",
                hint="make the plan again",
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `dumps` to a file."""
        Path(path).write_text(self.dumps(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a file written by `save`.

        Raises:
            UsageError: The file is missing or not a plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"the plan {str(path)!r} cannot be read: {error}") from error
        return cls.loads(text)


_PLAN_KEYS = frozenset(
    {"version", "source", "settings", "budget", "bytes", "portable_load_bytes", "error"}
    | {"loss", "loss_error", "compared", "slowdown", "prune", "division", "sites", "skipped"}
)


def _rounded(**values: float | None) -> dict[str, float]:
    """Numbers that are known, with four digits."""
    return {name: float(f"{value:.4g}") for name, value in values.items() if value is not None}


def _lines(values: Mapping[str, Any]) -> str:
    """JSON with each top-level value, and each item of a top-level list, on one line."""
    parts = []
    for key, value in values.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value:
            items = ",\n    ".join(json.dumps(item, ensure_ascii=False) for item in value)
            text = f"[\n    {items}\n  ]"
        parts.append(f'  "{key}": {text}')
    return "{\n" + ",\n".join(parts) + "\n}\n"
