"""Plans: which codec stores each weight and at how many bytes. Readable, editable, replayable.

A plan is made by `onnxcomp.passes.planner`, can be written to JSON, changed by hand or in Python,
and applied again. The bytes and errors in it follow from the codecs: they are computed anew when a
plan is applied, so that an edited file cannot promise what it does not hold.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.codec import Params, WeightSite
from onnxcomp.passes.settings import (
    MODES,
    ModeChoice,
    Settings,
    parse_size,
    suggest,
    typed_params,
)

__all__ = ["VERSION", "Budget", "Candidate", "Choice", "Plan", "SkippedWeight", "Source"]

VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Budget:
    """What a plan has to meet: equal bits everywhere, or output bytes.

    Attributes:
        bits: Bits per weight, the same for all sites.
        bytes: Most bytes the output may have, external data included.
        ratio: The ratio `bytes` came from, for messages.
    """

    bits: int | None = None
    bytes: int | None = None
    ratio: float | None = None

    @classmethod
    def of(cls, settings: Settings, input_bytes: int, default_bits: int = 4) -> Budget:
        """The budget of a run on a model of `input_bytes` bytes."""
        if settings.ratio is not None:
            return cls(bytes=int(input_bytes / settings.ratio), ratio=settings.ratio)
        if settings.target_size is not None:
            return cls(bytes=parse_size(settings.target_size))
        return cls(bits=default_bits if settings.bits is None else settings.bits)

    def to_json(self) -> dict[str, Any]:
        """The attributes that are set."""
        return {key: v for key, v in dataclasses.asdict(self).items() if v is not None}


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store one weight.

    Attributes:
        site: The weight.
        codec: Name of the codec.
        params: Its settings.
        bytes: Bytes of the weight's own tensors, exactly.
        error: Expected relative Frobenius error of the weight.
        time: Expected seconds of one use; None where it is not known.
        reason: Why the weight stays as it is; empty when it is stored by the codec.
    """

    site: WeightSite
    codec: str
    params: Params
    bytes: int
    error: float
    time: float | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """What a plan decides for one weight.

    Attributes:
        site: Name of the weight.
        shape: Shape of the stored tensor.
        dtype: Element type of the stored tensor.
        uses: Operators that use the weight, in graph order.
        before: Bytes of the dense tensor.
        codec: Name of the codec.
        params: Its settings.
        mode: How uses are served.
        bytes: Bytes of the codec's tensors; None until the plan is settled against a model.
        error: Expected relative Frobenius error; None until the plan is settled.
        reason: Why the weight stays as it is; empty when it is stored by the codec.
    """

    site: str
    shape: tuple[int, ...]
    dtype: str
    uses: tuple[str, ...]
    before: int
    codec: str
    params: Params
    mode: ModeChoice = "auto"
    bytes: int | None = None
    error: float | None = None
    reason: str = ""

    @property
    def kept(self) -> bool:
        """Whether the weight stays as it is, untouched."""
        return bool(self.reason)

    def with_(self, *, codec: str | None = None, mode: str | None = None, **params: Any) -> Choice:
        """A copy with other settings; parameters that are not named keep their value.

        A new codec starts from its default parameters.

        Raises:
            UsageError: The codec, the mode or a parameter does not exist or is out of range.
        """
        name = self.codec if codec is None else codec
        chosen = _params(
            name, params if name != self.codec else {**self.params.to_json(), **params}
        )
        return dataclasses.replace(
            self,
            codec=name,
            params=chosen,
            mode=self.mode if mode is None else _mode(mode),
            bytes=None,
            error=None,
            reason="",
        )

    def settle(self, site: WeightSite) -> Choice:
        """A copy with the facts of the site and the codec's bytes and expected error.

        Raises:
            UsageError: The codec cannot store the site.
        """
        choice = dataclasses.replace(self, **_facts(site))
        if choice.kept:
            return dataclasses.replace(choice, bytes=site.nbytes, error=0.0)
        codec = CODECS[self.codec]
        refusal = codec.refuse(site)
        if refusal is not None:
            raise UsageError(
                f"codec {self.codec!r} cannot store {self.site!r}: {refusal}",
                hint="choose another codec for it in the plan, or dense",
            )
        return dataclasses.replace(
            choice, bytes=codec.size(site, self.params), error=codec.predict(site, self.params)
        )

    @classmethod
    def of(cls, candidate: Candidate, mode: ModeChoice = "auto") -> Choice:
        """The decision for one candidate."""
        return cls(
            **_facts(candidate.site),
            codec=candidate.codec,
            params=candidate.params,
            mode=mode,
            bytes=candidate.bytes,
            error=candidate.error,
            reason=candidate.reason,
        )

    @classmethod
    def kept_dense(cls, site: WeightSite, reason: str) -> Choice:
        """The decision to leave a weight as it is."""
        params = CODECS["dense"].params_type()
        return cls.of(Candidate(site, "dense", params, site.nbytes, 0.0, reason=reason))

    def to_json(self) -> dict[str, Any]:
        """One line of a plan file."""
        return {
            "name": self.site,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "uses": list(self.uses),
            "codec": self.codec,
            "params": self.params.to_json(),
            "mode": self.mode,
            "bytes_before": self.before,
            "bytes": self.bytes,
            "error": None if self.error is None else float(f"{self.error:.4g}"),
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Choice:
        """Inverse of `to_json`; shape, uses, bytes and error may be left out.

        Raises:
            UsageError: Something is missing, unknown or out of range.
        """
        _known(values, _CHOICE_KEYS, "a site of the plan")
        if "name" not in values or "codec" not in values:
            raise UsageError(
                f"a site of the plan has no name or codec: {dict(values)}",
                hint='write for example {"name": "fc1.weight", "codec": "hyper", "params": {}}',
            )
        return cls(
            site=str(values["name"]),
            shape=tuple(values.get("shape", ())),
            dtype=str(values.get("dtype", "")),
            uses=tuple(values.get("uses", ())),
            before=int(values.get("bytes_before", 0)),
            codec=str(values["codec"]),
            params=_params(str(values["codec"]), values.get("params", {})),
            mode=_mode(values.get("mode", "auto")),
            bytes=values.get("bytes"),
            error=values.get("error"),
            reason=str(values.get("reason", "")),
        )


_CHOICE_KEYS = frozenset(
    {"name", "shape", "dtype", "uses", "codec", "params", "mode"}
    | {"bytes_before", "bytes", "error", "reason"}
)


def _facts(site: WeightSite) -> dict[str, Any]:
    return {
        "site": site.name,
        "shape": site.shape,
        "dtype": site.dtype,
        "uses": tuple(use.op_type for use in site.uses),
        "before": site.nbytes,
    }


def _known(values: Mapping[str, Any], names: frozenset[str], where: str) -> None:
    for name in values:
        if name not in names:
            raise UsageError(f"{where} has a key {name!r}", hint=suggest(name, names))


def _params(codec: str, values: Mapping[str, Any]) -> Params:
    if codec not in CODECS:
        raise UsageError(f"codec {codec!r} is unknown", hint=suggest(codec, CODECS))
    params = typed_params(CODECS[codec].params_type, values, codec)
    CODECS[codec].check(params)
    return params


def _mode(value: str) -> ModeChoice:
    for mode in MODES:
        if mode == value:
            return mode
    raise UsageError(f"mode {value!r} is unknown", hint=suggest(value, MODES))


@dataclasses.dataclass(frozen=True, slots=True)
class SkippedWeight:
    """A tensor that no codec was asked about.

    Attributes:
        name: Name of the tensor.
        shape: Its shape.
        dtype: Its element type.
        bytes: Its bytes.
        uses: Operators that use it.
        reason: Why it is left alone.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    uses: tuple[str, ...]
    reason: str

    def to_json(self) -> dict[str, Any]:
        """One line of a plan file."""
        plain = dataclasses.asdict(self)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> SkippedWeight:
        """Inverse of `to_json`."""
        _known(values, frozenset(cls.__slots__), "a skipped tensor of the plan")
        plain: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in values.items()
        }
        return cls(**plain)


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """The model a plan was made for.

    Attributes:
        name: File name; empty for a model in memory.
        bytes: Bytes of the file and its external data.
        sha256: Hash of the .onnx file; None for a model in memory.
    """

    name: str
    bytes: int
    sha256: str | None


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
    """

    source: Source
    settings: Settings
    budget: Budget
    choices: dict[str, Choice]
    skipped: tuple[SkippedWeight, ...] = ()
    bytes: int | None = None
    portable_load_bytes: int | None = None

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
        self.bytes = self.portable_load_bytes = None

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.choices.values())

    def __len__(self) -> int:
        return len(self.choices)

    @property
    def met(self) -> bool:
        """Whether the output is as small as asked for."""
        wanted = self.budget.bytes
        return wanted is None or (self.bytes is not None and self.bytes <= wanted)

    @property
    def ratio(self) -> float | None:
        """Bytes of the input over bytes of the output."""
        return None if not self.bytes else self.source.bytes / self.bytes

    def settle(self, sites: Sequence[WeightSite]) -> Plan:
        """A copy whose bytes and errors are those of the codecs on these sites.

        Sites the plan does not name stay as they are: to delete a line is to leave a weight alone.

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
            name: self.choices[name].settle(site)
            if name in self.choices
            else Choice.kept_dense(site, "not in the plan")
            for name, site in known.items()
        }
        return dataclasses.replace(self, choices=settled, bytes=None, portable_load_bytes=None)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain values."""
        return {
            "version": VERSION,
            "source": dataclasses.asdict(self.source),
            "settings": self.settings.to_json(),
            "budget": self.budget.to_json(),
            "bytes": self.bytes,
            "portable_load_bytes": self.portable_load_bytes,
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
        _known(values, _PLAN_KEYS, "the plan")
        choices = [Choice.from_json(item) for item in values.get("sites", ())]
        names = [choice.site for choice in choices]
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        if twice:
            raise UsageError(f"the plan has {twice[0]!r} twice", hint="remove one of the lines")
        source = values.get("source", {})
        return cls(
            source=Source(source.get("name", ""), source.get("bytes", 0), source.get("sha256")),
            settings=Settings.from_json(values.get("settings", {})),
            budget=Budget(**values.get("budget", {})),
            choices=dict(zip(names, choices, strict=True)),
            skipped=tuple(SkippedWeight.from_json(item) for item in values.get("skipped", ())),
            bytes=values.get("bytes"),
            portable_load_bytes=values.get("portable_load_bytes"),
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
                f"the plan is not as this release writes it: {error}", hint="make the plan again"
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
    ["version", "source", "settings", "budget", "bytes", "portable_load_bytes", "sites", "skipped"]
)


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
