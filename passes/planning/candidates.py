"""Ways to store one weight, and the decision for one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec
from onnxcomp.passes.config.methods import typed_params
from onnxcomp.passes.config.values import MODES, ModeChoice
from onnxcomp.passes.suggest import suggest
from onnxcomp.passes.weight import WeightSite

__all__ = ["Candidate", "Choice", "Estimate", "Estimator", "known_keys", "thin_again"]


@dataclasses.dataclass(frozen=True, slots=True)
class Estimate:
    """What is expected of one setting for one weight.

    Attributes:
        error: Relative Frobenius error of the decoded weight.
        output_error: Relative error of its products; None where their inputs are not known.
        harm: Size of evenly spread noise in the weight that does as much harm as that error; None
            where that is the error itself.
        time: Seconds that one run of the model takes longer, or less if negative, than with the
            dense weight; None where it is not known.
    """

    error: float
    output_error: float | None = None
    harm: float | None = None
    time: float | None = None


# Relative errors of weights that are multiplied out and split again.
_ROUNDING = {"float32": 2.0**-20, "float16": 2.0**-10, "bfloat16": 2.0**-7}

# What is expected of some settings of a codec for a weight.
Estimator = Callable[[Codec, WeightSite, Sequence[Params]], Sequence[Estimate]]


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store one weight.

    Attributes:
        site: The weight.
        codec: Name of the codec.
        params: Its settings.
        bytes: Bytes of the weight's own tensors, exactly, and its part of what a family shares.
        error: Expected relative Frobenius error of the weight.
        estimate: All that is expected; None where that is the error alone.
        reason: Why the weight stays as it is; empty when it is stored by the codec.
    """

    site: WeightSite
    codec: str
    params: Params
    bytes: int
    error: float
    estimate: Estimate | None = None
    reason: str = ""

    @property
    def harm(self) -> float:
        """Size of evenly spread noise in the weight that does as much harm."""
        if self.estimate is None or self.estimate.harm is None:
            return self.error
        return self.estimate.harm

    @property
    def time(self) -> float:
        """Expected seconds that a run takes longer; 0 where that is not known."""
        return 0.0 if self.estimate is None else self.estimate.time or 0.0


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
        output_error: Expected relative error of its products; None where it is not known.
        time: Expected seconds that a run takes longer than with the dense weight; None where it is
            not known.
        reason: Why the weight is stored like this, or stays as it is; empty until the plan is
            settled.
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
    output_error: float | None = None
    time: float | None = None
    reason: str = ""

    @property
    def kept(self) -> bool:
        """Whether the weight stays as it is, untouched."""
        return self.codec == "dense"

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
            output_error=None,
            time=None,
            reason="",
        )

    def settle(self, site: WeightSite, estimator: Estimator | None = None) -> Choice:
        """A copy with the facts of the site, the codec's bytes and what is expected of it.

        Args:
            site: The weight.
            estimator: None for the errors that a codec expects without looking at the weight.

        Raises:
            UsageError: The codec cannot store the site.
        """
        choice = dataclasses.replace(self, **_facts(site))
        if choice.kept:
            reason = self.reason or _OWN
            return dataclasses.replace(choice, bytes=site.nbytes, error=0.0, reason=reason)
        codec = CODECS[self.codec]
        refusal = codec.refuse(site)
        if refusal is not None:
            raise UsageError(
                f"codec {self.codec!r} cannot store {self.site!r}: {refusal}",
                hint="choose another codec for it in the plan, or dense",
            )
        found = Estimate(codec.predict(site, self.params))
        if estimator is not None:
            (found,) = estimator(codec, site, [self.params])
        size = codec.size(site, self.params)
        # What a planner said is not said of settings that were changed since.
        reason = (self.reason if self.bytes == size else "") or _OWN
        return dataclasses.replace(choice, bytes=size, reason=reason, **_expected(found))

    @classmethod
    def of(cls, candidate: Candidate, mode: ModeChoice = "auto", reason: str = "") -> Choice:
        """The decision for one candidate."""
        return cls(
            **_facts(candidate.site),
            codec=candidate.codec,
            params=candidate.params,
            mode=mode,
            bytes=candidate.bytes,
            **_expected(candidate.estimate or Estimate(candidate.error)),
            reason=candidate.reason or reason,
        )

    @classmethod
    def untouched(cls, site: WeightSite, reason: str) -> Choice:
        """The decision to leave a weight as it is, or as the two thin ones that it was."""
        if site.rank is None:
            return cls.kept_dense(site, reason)
        return cls.of(thin_again(site, reason))

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
            "error": _rounded(self.error),
            "output_error": _rounded(self.output_error),
            "time": _rounded(self.time),
            "reason": self.reason,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Choice:
        """Inverse of `to_json`; shape, uses, bytes and error may be left out.

        Raises:
            UsageError: Something is missing, unknown or out of range.
        """
        known_keys(values, _CHOICE_KEYS, "a site of the plan")
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
            output_error=values.get("output_error"),
            time=values.get("time"),
            reason=str(values.get("reason", "")),
        )


# Why a weight is stored like this where a user wrote it.
_OWN = "set in the plan"


def thin_again(site: WeightSite, reason: str) -> Candidate:
    """A weight stored as the two thin ones that were in its place before, but for rounding.

    Args:
        site: A weight with a known rank.
        reason: Why nothing else is done with it.
    """
    found = (codec for codec in CODECS.values() if codec.spectrum is not None)
    codec = next(codec for codec in found if codec.refuse(site) is None)
    params = _params(codec.name, {"rank": site.rank})
    size, error = codec.size(site, params), _ROUNDING[site.dtype]
    return Candidate(site, codec.name, params, size, error, reason=reason)


_CHOICE_KEYS = frozenset(
    {"name", "shape", "dtype", "uses", "codec", "params", "mode"}
    | {"bytes_before", "bytes", "error", "output_error", "time", "reason"}
)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _expected(estimate: Estimate) -> dict[str, Any]:
    return {
        "error": estimate.error,
        "output_error": estimate.output_error,
        "time": estimate.time,
    }


def _facts(site: WeightSite) -> dict[str, Any]:
    return {
        "site": site.name,
        "shape": site.shape,
        "dtype": site.stored_dtype,
        "uses": tuple(use.op_type for use in site.uses),
        "before": site.nbytes,
    }


def known_keys(values: Mapping[str, Any], names: frozenset[str], where: str) -> None:
    """Raise `UsageError` where an object of a plan has a key that there is not."""
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
