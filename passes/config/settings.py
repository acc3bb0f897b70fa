"""What a user asks of the compiler: sizes, rules for single weights, and checked settings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec
from onnxcomp.passes.suggest import suggest
from onnxcomp.passes.weight import Mode

__all__ = [
    "ExternalData",
    "ModeChoice",
    "Patterns",
    "Rule",
    "Settings",
    "given_settings",
    "is_stock",
    "match_rule",
    "method_names",
    "parse_rule",
    "parse_size",
    "split_methods",
    "typed_params",
]

ExternalData = Literal["auto", "always", "never"]
ModeChoice = Mode | Literal["auto"]
Patterns = str | Sequence[str]
ParamValue = int | float | str

MODES: tuple[ModeChoice, ...] = ("auto", "fused", "folded", "decode")
REST = ("keep", "fp16", "exact")
PruneScore = Literal["obs", "numerical", "wanda", "flap", "magnitude"]
SCORES: tuple[PruneScore, ...] = ("obs", "numerical", "wanda", "flap", "magnitude")

_HOW_MUCH = "give --prune-ratio 0.3, --target-flops 0.7 (that stay), or --ratio with --data"
EXTERNAL_DATA: tuple[ExternalData, ...] = ("auto", "always", "never")

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_size(value: float | str) -> int:
    """Bytes of a size such as ``"120MB"``, ``"1.5 GiB"`` or ``4096``.

    KB, MB and GB are powers of 1000, so that a target is met whichever way it was meant; KiB, MiB
    and GiB are powers of 1024.

    Raises:
        UsageError: The text is not a size.
    """
    if isinstance(value, int | float):
        return int(value)
    match = _SIZE.fullmatch(value)
    unit = _UNITS.get(match.group(2).lower()) if match else None
    if match is None or unit is None:
        raise UsageError(f"{value!r} is not a size", hint="write for example 120MB, 16KiB or 4096")
    return int(float(match.group(1)) * unit)


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
    _check_pattern(pattern)
    values = {key.strip(): value.strip() for key, _, value in settings}
    methods = split_methods(values.pop("method", ""))
    mode = values.pop("mode", None)
    if mode is not None:
        _one_of("mode", mode, MODES)
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


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"{pattern!r} is not a regular expression: {error}",
            hint="write a dot as \\. and a bracket as \\[",
        ) from error


def _one_of(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"{what} {value!r} is unknown", hint=suggest(value, known))


def split_methods(text: str) -> tuple[str, ...]:
    """Codec names in ``"hyper+dense"``; a codec whose own name has a ``+`` is one of them."""
    if text in CODECS:
        return (text,)
    return tuple(part for part in text.split("+") if part)


def is_stock(codec: Codec) -> bool:
    """Whether models of a codec hold operators of ONNX and ONNX Runtime only."""
    return codec.stock


def method_names(
    method: str | Sequence[str], known: Mapping[str, Codec], *, stock: bool = False
) -> tuple[str, ...]:
    """Codec names asked for; "auto" stands for every codec that offers itself for it.

    Args:
        method: Names, or several joined by ``+``.
        known: All codecs by name.
        stock: Whether only codecs may take part that need no operator of ours.

    Raises:
        UsageError: A name is unknown, or its codec is not a stock one.
    """
    names = list(known)
    asked = [method] if isinstance(method, str) else list(method)
    result: list[str] = []
    for name in (part for item in asked for part in split_methods(item)):
        if name == "auto":
            automatic = [n for n, codec in known.items() if codec.automatic]
            result += [n for n in automatic if is_stock(known[n]) or not stock]
            continue
        _one_of("method", name, [*names, "auto"])
        if stock and not is_stock(known[name]):
            allowed = ", ".join(n for n, codec in known.items() if is_stock(codec))
            raise UsageError(
                f"--stock and the method {name!r} contradict each other: it needs the library",
                hint=f"these do not: {allowed}",
            )
        result.append(name)
    if not result:
        raise UsageError("no method is given", hint=suggest("", [*names, "auto"]))
    return tuple(dict.fromkeys(result))


def typed_params(params_type: type[Params], values: Mapping[str, Any], codec: str) -> Params:
    """Codec parameters from names and plain values.

    Raises:
        UsageError: A name is unknown, or a value has the wrong type.
    """
    default = params_type()
    fields = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    typed = {}
    for name, value in values.items():
        if name not in fields:
            raise UsageError(
                f"codec {codec!r} has no parameter {name!r}", hint=suggest(name, fields)
            )
        wanted = type(fields[name])
        whole = isinstance(value, int) and wanted is float
        if isinstance(value, bool) or not (whole or isinstance(value, wanted)):
            raise UsageError(
                f"{codec} parameter {name} is {value!r}",
                hint=f"it must be of type {wanted.__name__}, for example {fields[name]!r}",
            )
        typed[name] = wanted(value)
    return dataclasses.replace(default, **typed)


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides which bytes are written, checked.

    Attributes:
        method: Codec names to choose from.
        bits: Bits per weight for all sites alike; None when a target is given.
        ratio: Input bytes over output bytes to reach.
        target_size: Output bytes to reach.
        max_error: Largest relative error of an output.
        max_slowdown: How many times as long as the original the output may run.
        min_size: Smallest weight tensor to touch, in bytes.
        mode: How uses are served.
        include: Regular expressions; when there are any, only matching weights are touched.
        exclude: Regular expressions of weights left alone.
        rules: Settings for single weights; the first match wins.
        external_data: Where large tensors are stored.
        freeze_inputs: Whether initializers that are also graph inputs become constants.
        precision: Arithmetic of fused products: "exact" or "int8".
        portable: Whether the model carries bodies that run without the operator library.
        seed: Seed of every random choice.
        stock: Whether only codecs are used whose models need no operator of ours.
        rest: What becomes of weights that no method makes smaller: "keep", "fp16", or "exact" for
            half precision where no value changes.
        prune_ratio: Share of the parameters of layers that can shrink to prune; None for none.
        target_flops: Share of the FLOPs that pruning is to leave; None for no such target.
        prune_score: What decides which channels go; None for the default.
        prune_caches: Whether inputs and outputs that hold a cache may shrink.
        detect_sharing: Whether dense weights are searched for values that repeat.
        distill: Steps of training of values that weights share, towards the dense model's outputs.
        divide: Whether pruning takes the share of the budget with which least is lost.
    """

    method: tuple[str, ...] = ("auto",)
    bits: int | None = None
    ratio: float | None = None
    target_size: int | None = None
    max_error: float | None = None
    max_slowdown: float | None = None
    min_size: int = 16384
    mode: ModeChoice = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    external_data: ExternalData = "auto"
    freeze_inputs: bool = False
    precision: str = "int8"
    portable: bool = True
    seed: int = 0
    stock: bool = False
    rest: str = "keep"
    prune_ratio: float | None = None
    target_flops: float | None = None
    prune_score: PruneScore | None = None
    prune_caches: bool | None = None
    detect_sharing: bool = False
    distill: int = 0
    divide: bool | None = None

    def __post_init__(self) -> None:
        targets = [n for n in ("bits", "ratio", "target_size") if getattr(self, n) is not None]
        if len(targets) > 1:
            raise UsageError(
                f"{' and '.join(targets)} were given together", hint="choose one of them"
            )
        for name in ("bits", "ratio", "target_size", "max_error", "max_slowdown"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"{name} is {value}", hint="it must be positive")
        if self.distill < 0:
            raise UsageError(f"distill is {self.distill}", hint="it is a number of steps")
        if self.min_size < 0:
            raise UsageError(f"min_size is {self.min_size}", hint="it must not be negative")
        _one_of("mode", self.mode, MODES)
        _one_of("external_data", self.external_data, EXTERNAL_DATA)
        _one_of("precision", self.precision, ("exact", "int8"))
        _one_of("rest", self.rest, REST)
        _one_of("prune_score", self.prune_score or SCORES[0], SCORES)
        self._check_pruning()
        for pattern in (*self.include, *self.exclude):
            _check_pattern(pattern)

    def _check_pruning(self) -> None:
        shares = {"prune_ratio": self.prune_ratio, "target_flops": self.target_flops}
        given = {name: share for name, share in shares.items() if share is not None}
        if len(given) > 1:
            raise UsageError(
                "prune_ratio and target_flops were given together", hint="choose one of them"
            )
        for name, share in given.items():
            if not 0.0 < share < 1.0:
                raise UsageError(f"{name} is {share}", hint="it is a share between 0 and 1")
        if not given and not self.divide and (self.prune_score or self.prune_caches):
            raise UsageError("how to prune is given, but not how much", hint=_HOW_MUCH)

    def to_json(self) -> dict[str, Any]:
        """Settings by name; what is unset is left out, so that files stay readable."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain["rules"] = [str(rule) for rule in self.rules]
        plain = {key: list(v) if isinstance(v, tuple) else v for key, v in plain.items()}
        return {key: value for key, value in plain.items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settings:
        """Inverse of `to_json`.

        Raises:
            UsageError: A name is unknown or a value is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise UsageError(f"setting {name!r} is unknown", hint=suggest(name, known))
        plain: dict[str, Any] = {
            key: tuple(v) if isinstance(v, list) else v for key, v in values.items()
        }
        plain["rules"] = tuple(parse_rule(text) for text in values.get("rules", ()))
        return cls(**plain)


def _patterns(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def _rules(rules: str | Rule | Sequence[str | Rule]) -> tuple[Rule, ...]:
    given = [rules] if isinstance(rules, str | Rule) else rules
    return tuple(rule if isinstance(rule, Rule) else parse_rule(rule) for rule in given)


def given_settings(
    method: str | Sequence[str] = "auto",
    target_size: int | str | None = None,
    min_size: int | str = 16384,
    include: Patterns = (),
    exclude: Patterns = (),
    set_: str | Rule | Sequence[str | Rule] = (),
    **others: Any,
) -> Settings:
    """Settings from what a caller may write more loosely: one text for a list, sizes with units.

    The method "prune" stands for a pass over the graph: other methods then store what is left, or
    none where it is the only one. With a size and no share to prune, both divide the size.

    Raises:
        UsageError: Something is out of range or cannot be read.
    """
    methods = (method,) if isinstance(method, str) else tuple(method)
    stored = tuple(part for item in methods for part in split_methods(item) if part != "prune")
    if len(stored) < sum(len(split_methods(item)) for item in methods):
        methods = stored or ("dense",)
        shares = (others.get("prune_ratio"), others.get("target_flops"))
        sizes = (others.get("ratio"), target_size)
        others["divide"] = True if shares == (None, None) else None
        if shares == sizes == (None, None):
            raise UsageError("the method prune was asked for, but not how much", hint=_HOW_MUCH)
    return Settings(
        method=methods,
        target_size=None if target_size is None else parse_size(target_size),
        min_size=parse_size(min_size),
        include=_patterns(include),
        exclude=_patterns(exclude),
        rules=_rules(set_),
        **others,
    )
