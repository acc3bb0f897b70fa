"""The candidates of each weight, their objective, and equal settings for all weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Codec
from onnxcomp.passes.config.methods import typed_params
from onnxcomp.passes.config.policy import Policy
from onnxcomp.passes.config.values import Target
from onnxcomp.passes.planning.candidates import Candidate, Estimate, Estimator, thin_again
from onnxcomp.passes.planning.sensitivity_prior import sensitivity
from onnxcomp.passes.suggest import suggest
from onnxcomp.passes.weight import WeightSite

__all__ = [
    "FRAMING",
    "NOISE",
    "CandidateSet",
    "candidate_set",
    "distance",
    "equal_plans",
    "keep",
    "offered_bits",
    "predicted",
    "reads_all",
    "uniform",
    "uniform_bits",
]

# Times smaller a weight becomes in plans with equal settings for all, of codecs whose settings are
# not counted in bits.
_RATIOS = (2, 3, 4, 6, 8, 12, 16, 24, 32)

# Bytes of the nodes, names and tensor headers that come with one compressed weight; the exact
# number depends on the lengths of names and is counted when the skeleton is serialised.
FRAMING = 768

# Bits that filters of an input get more, worth about what they count more in `sensitivity_prior`:
# a bit is a factor of four in squared error. One more is taken where the number of bits is not
# offered.
_RAW_BITS = 3

# Relative error of normal weights in integers of b bits, over 2^-b: 0.101 with 4 bits and a scale
# for every 128 of them.
_INTEGERS = 1.62

# Key of a rule that stands for named settings of a codec.
QUALITY = "quality"

# Relative differences of cost that mean nothing: the errors are expectations.
NOISE = 0.003


@dataclasses.dataclass(frozen=True, slots=True)
class CandidateSet:
    """The candidates of one site.

    Attributes:
        site: The weight.
        options: Candidates; never empty.
        sensitivity: Loss of the model's outputs over the relative noise power of the weight, as far
            as known; None for the prior.
        scale: The same over the square of a relative change of the weight's scale; None where that
            was not measured.
        measured: Noise power of the outputs, relative to theirs, over that of the weight, to
            predict by; None where that is `sensitivity`.
        noise_scale: The same over the square of a relative change of the weight's scale; None
            where that is `scale`.
        prior: What stands for it in the objective where it is not known, see `sensitivity_prior`;
            None for that of the weight alone.
        chance: Share of the differences between sensitivities that is noise, 0 to 1.
        price: What a second counts in the objective.
        fastest: Seconds from which time is counted, so that costs are not negative.
        policy: What is asked of the weight.
        rounded: The set that a constant has where it may be rounded, too; None where it may not,
            and for weights.
    """

    site: WeightSite
    options: tuple[Candidate, ...]
    sensitivity: float | None = None
    scale: float | None = None
    measured: float | None = None
    noise_scale: float | None = None
    prior: float | None = None
    chance: float = 0.0
    price: float = 0.0
    fastest: float = 0.0
    policy: Policy = dataclasses.field(default_factory=lambda: Policy(()))
    rounded: CandidateSet | None = None

    def with_options(self, options: Iterable[Candidate]) -> CandidateSet:
        """The set with other candidates."""
        return dataclasses.replace(self, options=tuple(options))

    def noise(self, candidate: Candidate) -> float:
        """Loss that a candidate counts for: ``sensitivity * harm^2 + scale * harm^4``.

        The second term is that of a shorter weight: codes are means, and an error e makes them
        shorter by e^2.
        """
        factor = self.prior if self.sensitivity is None else self.sensitivity
        factor = sensitivity(self.site) if factor is None else factor
        return factor * candidate.harm**2 + (self.scale or 0.0) * candidate.harm**4

    def expected_noise(self, candidate: Candidate) -> float:
        """Noise power that a candidate is expected to add to the outputs, relative to theirs."""
        known = self.measured or self.sensitivity or 0.0
        scale = self.scale if self.noise_scale is None else self.noise_scale
        return known * candidate.harm**2 + (scale or 0.0) * candidate.harm**4

    def cost_of(self, candidate: Candidate) -> float:
        """Objective of a candidate: its noise, and its time at the price of time."""
        return self.noise(candidate) + self.price * (candidate.time - self.fastest)

    def cost(self, index: int) -> float:
        """Objective of one option."""
        return self.cost_of(self.options[index])


def keep(site: WeightSite, reason: str) -> Candidate:
    """The candidate that leaves a weight as it is, or as the two thin ones that it was."""
    if site.rank is not None:
        return thin_again(site, reason)
    return Candidate(site, "dense", CODECS["dense"].params_type(), site.nbytes, 0.0, reason=reason)


def _graded(codec: Codec, offered: Sequence[Params], quality: object) -> list[Params]:
    """What a codec offers, at a named quality."""
    if codec.qualities is None:
        raise UsageError(f"codec {codec.name!r} has no named qualities", hint="leave out quality=")
    if quality not in codec.qualities.names:
        hint = suggest(str(quality), codec.qualities.names)
        raise UsageError(f"quality {quality!r} of {codec.name} is unknown", hint=hint)
    return [codec.qualities.apply(params, str(quality)) for params in offered]


def _target(site: WeightSite, policy: Policy) -> Target:
    """Machines that matter to a weight: those are no matter where it is decoded but once."""
    decoded = policy.mode == "decode"
    needs = {use.need for use in site.uses}
    multiplied = policy.mode != "folded" and not needs.isdisjoint({"matmul", "experts", "batch"})
    return policy.target if decoded or multiplied else "any"


def _settings_of(
    codec: Codec,
    site: WeightSite,
    fixed: Mapping[str, object],
    quality: object = None,
    target: Target = "any",
) -> list[Params]:
    """Settings a codec offers for a site, with some parameters held fixed.

    A fixed number of bits picks among what is offered; any other value is used as given, with
    the other parameters as offered. What is not fixed suits the target.
    """
    offered = list(codec.candidates(site))
    if quality is not None:
        offered = _graded(codec, offered, quality)
    if codec.width is not None and codec.width in fixed:
        wanted = fixed[codec.width]
        offered = [p for p in offered if getattr(p, codec.width) == wanted] or offered
    if not fixed:
        return [codec.targeted(params, target) for params in offered]
    changed = (dataclasses.replace(params, **fixed) for params in offered)
    forced = dict.fromkeys(
        dataclasses.replace(codec.targeted(params, target), **fixed) for params in changed
    )
    valid = []
    for params in forced:
        try:
            codec.check(params)
        except UsageError:
            continue
        valid.append(params)
    if forced and not valid:
        codec.check(next(iter(forced)))
    return valid


def predicted(codec: Codec, site: WeightSite, params: Sequence[Params]) -> list[Estimate]:
    """What a codec expects without looking at the weight."""
    return [Estimate(codec.predict(site, item)) for item in params]


def _own(policy: Policy) -> dict[str, Any]:
    """What a policy holds fixed, without the name of a quality."""
    return {name: value for name, value in policy.params.items() if name != QUALITY}


def _check_names(codec: Codec, policy: Policy) -> None:
    """Raise `UsageError` where a codec has no parameter that is held fixed, or not of that type."""
    typed_params(codec.params_type, _own(policy), codec.name)


def _candidates(
    codec: Codec, site: WeightSite, policy: Policy, estimator: Estimator
) -> list[Candidate]:
    quality = policy.params.get(QUALITY)
    offered = _settings_of(codec, site, _own(policy), quality, _target(site, policy))
    return [
        Candidate(site, codec.name, params, codec.size(site, params), found.error, found)
        for params, found in zip(offered, estimator(codec, site, offered), strict=True)
    ]


def reads_all(policies: Iterable[Policy]) -> bool:
    """Whether a method reads all of a weight to tell what it loses, and not some rows only."""
    names = {name for policy in policies for name in policy.methods}
    return any(CODECS[n].measure is not None and not CODECS[n].measures_rows for n in names)


def candidate_set(
    site: WeightSite,
    policy: Policy,
    *,
    codecs: Mapping[str, Codec] | None = None,
    estimator: Estimator = predicted,
    sensitivity: float | None = None,
    scale: float | None = None,
    measured: float | None = None,
    noise_scale: float | None = None,
    prior: float | None = None,
) -> CandidateSet:
    """All candidates for a site; only the dense weight where nothing makes it smaller.

    Args:
        site: The weight.
        policy: What is asked of it.
        codecs: All codecs by name.
        estimator: What is expected of settings.
        sensitivity: Of the model's outputs to noise in the weight; None for the prior.
        scale: Of the model's outputs to the scale of the weight; None where it was not measured.
        measured: See `CandidateSet`; so is `noise_scale`.
        noise_scale: Where it was not measured, None.
        prior: What stands for the sensitivity where it is not known.

    Raises:
        UsageError: A parameter is held fixed that none of the codecs has.
    """
    known = CODECS if codecs is None else codecs
    found: list[Candidate] = []
    reasons: list[str] = []
    wrong: list[UsageError] = []
    for codec in (known[name] for name in policy.methods):
        try:
            _check_names(codec, policy)
            refusal = codec.refuse(site)
            if refusal is not None:
                reasons.append(f"{codec.name}: {refusal}")
                continue
            offered = _candidates(codec, site, policy, estimator)
        except UsageError as error:
            wrong.append(error)
            continue
        # The identity codec is asked for by name only, and never for its size.
        paying = [c for c in offered if codec.name == "dense" or c.bytes + FRAMING < site.nbytes]
        paying = [c for c in paying if site.rank is None or c.bytes <= keep(site, "").bytes]
        paying = [c for c in paying if math.isfinite(c.error)]
        found += paying
        if not paying:
            reasons.append(f"{codec.name}: {_no_offer(offered, site)}")
    if len(wrong) == len(
        policy.methods
    ):  # what a rule fixes is for one of the codecs; here it is for none
        raise wrong[0]
    options = tuple(found) or (keep(site, "; ".join(reasons)),)
    return CandidateSet(
        site, options, sensitivity, scale, measured, noise_scale, prior, policy=policy
    )


def _no_offer(offered: Sequence[Candidate], site: WeightSite) -> str:
    if not offered:
        return "offers no setting"
    if not any(math.isfinite(candidate.error) for candidate in offered):
        return "cannot hold these values"
    least = min(candidate.bytes for candidate in offered)
    return f"{least} bytes and about {FRAMING} of framing are not less than {site.nbytes} dense"


def _width(candidate: Candidate) -> int | None:
    """Bits per weight of a candidate; None where its settings are not counted in bits."""
    name = CODECS[candidate.codec].width
    return None if name is None else int(getattr(candidate.params, name))


def uniform(candidates: CandidateSet, bits: int) -> Candidate:
    """The candidate of the first codec that offers `bits` bits per weight.

    Of its settings with that width it is the smallest that is no worse than the default. Where
    settings are not counted in bits, it is the largest with at most `bits` bits for each weight;
    see `_no_worse_than` for codecs that suit some weights only. What loses nothing and is no larger
    is better than all of these.
    """
    pick = _with_bits(candidates, bits)
    exact = [c for c in candidates.options if c.error == 0.0 and not c.reason]
    return min((c for c in exact if c.bytes <= pick.bytes), key=lambda c: c.bytes, default=pick)


def _with_bits(candidates: CandidateSet, bits: int) -> Candidate:
    """The candidate with that many bits, whatever it loses."""
    options = [c for c in candidates.options if _width(c) == bits]
    if options:
        first = [c for c in options if c.codec == options[0].codec]
        return min(first, key=lambda c: (_worse(c, first), c.bytes, distance(c)))
    uncounted = [c for c in candidates.options if _width(c) is None]
    if not uncounted:
        return keep(candidates.site, f"with {bits} bits per weight it would not be smaller")
    largest = _largest_within(uncounted, bits * candidates.site.size // 8)
    if CODECS[largest.codec].measure is None or candidates.policy.params:
        return largest
    return _no_worse_than(bits, largest, uncounted)


def _no_worse_than(bits: int, largest: Candidate, options: Sequence[Candidate]) -> Candidate:
    """A candidate of a codec whose errors are measured that loses no more than integers do.

    Nobody asked for a rank, and a weight without a low one must not be spoilt: what has the bytes
    of `bits` bits serves if it is good enough, else the smallest that is, else the dense weight.
    """
    limit = _INTEGERS * 2.0**-bits
    if largest.harm <= limit:
        return largest
    good = [c for c in options if c.codec == largest.codec and c.harm <= limit]
    if good:
        return min(good, key=lambda c: c.bytes)
    best = min((c for c in options if c.codec == largest.codec), key=lambda c: c.harm)
    return keep(
        largest.site,
        f"{largest.codec} loses {best.harm:.2g} of it even in {best.bytes} of {best.site.nbytes} "
        f"bytes, {bits} bits per weight lose {limit:.2g}; a rule or a size decides otherwise",
    )


def uniform_bits(candidates: CandidateSet, bits: int) -> int:
    """Bits of a weight where all get `bits`: up to three more for filters of raw signals."""
    if not candidates.site.filters_input:
        return bits
    widths = [_width(c) for c in candidates.options]
    return max((w for w in widths if w is not None and bits < w <= bits + _RAW_BITS), default=bits)


def _largest_within(options: Sequence[Candidate], room: int) -> Candidate:
    """The largest candidate of the first codec in `room` bytes; its smallest where none fits."""
    own = [c for c in options if c.codec == options[0].codec]
    fitting = [c for c in own if c.bytes <= room]
    return max(fitting, key=lambda c: c.bytes) if fitting else min(own, key=lambda c: c.bytes)


def equal_plans(sets: Sequence[CandidateSet]) -> Iterator[list[Candidate]]:
    """Plans that give every weight equal settings of one codec.

    A weight that the codec does not offer anything for gets what another one offers.
    """
    names = dict.fromkeys(
        c.codec for candidates in sets for c in candidates.options if not c.reason
    )
    for name in names:
        own = [_first(candidates, name) for candidates in sets]
        if CODECS[name].width is None:
            for ratio in _RATIOS:
                rooms = [candidates.site.nbytes // ratio for candidates in own]
                yield [
                    _largest_within(candidates.options, room)
                    for candidates, room in zip(own, rooms, strict=True)
                ]
        else:
            for bits in offered_bits(sets, name):
                yield [uniform(candidates, bits) for candidates in own]


def _first(candidates: CandidateSet, codec: str) -> CandidateSet:
    """The set with the options of one codec before the others."""
    return candidates.with_options(sorted(candidates.options, key=lambda c: c.codec != codec))


def offered_bits(sets: Sequence[CandidateSet], codec: str) -> list[int]:
    """All numbers of bits per weight that a codec offers, in increasing order."""
    found = {_width(c) for candidates in sets for c in candidates.options if c.codec == codec}
    return sorted(bits for bits in found if bits is not None)


def distance(candidate: Candidate) -> int:
    """Number of parameters that differ from the codec's defaults."""
    default = type(candidate.params)()
    names = [field.name for field in dataclasses.fields(default)]
    return sum(getattr(candidate.params, n) != getattr(default, n) for n in names)


def _worse(candidate: Candidate, options: Sequence[Candidate]) -> bool:
    """Whether a candidate is worse than the smallest of those nearest to the codec's defaults."""
    nearest = min(options, key=lambda option: (distance(option), option.bytes))
    return candidate.error > nearest.error * (1 + 1e-9)
