"""Weights that share a basis decide together: each of them has the mean of what all of them cost.

A solver looks at one weight at a time. With equal candidates, in bytes and in cost, it takes equal
ones for the weights of a family, and what they take together is what they cost together.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from onnxcomp.passes.codecs import CODECS
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.planning.candidates import Candidate, Estimate
from onnxcomp.passes.planning.search_space import CandidateSet

__all__ = ["with_families"]


def with_families(sets: Sequence[CandidateSet]) -> list[CandidateSet]:
    """The sets; those of families that share a basis, and have no other choice, with means."""
    found = {own.site.name: own for own in sets}
    for own in sets:
        family = own.site.family
        if family is not None and family.name == own.site.name:
            members = [found[name] for name in family.members if name in found]
            if len(members) > 1 and all(map(_shares, members)):
                found.update({one.site.name: one for one in _joined(members)})
    return [found[own.site.name] for own in sets]


def _shares(own: CandidateSet) -> bool:
    return all(CODECS[c.codec].bases is not None for c in own.options)


def _joined(members: Sequence[CandidateSet]) -> list[CandidateSet]:
    """Equal candidates for the weights of one family, for settings that all of them have."""
    offers = [{option.params: option for option in own.options} for own in members]
    common = [params for params in offers[0] if all(params in other for other in offers)]
    if not common:
        return list(members)
    options: list[list[Candidate]] = [[] for _ in members]
    noise = loss = 0.0
    for params in common:
        own = [offer[params] for offer in offers]
        cost = float(np.mean([s.noise(c) for s, c in zip(members, own, strict=True)]))
        noise += sum(s.expected_noise(c) for s, c in zip(members, own, strict=True))
        loss += cost * len(members)
        size = _bytes(own, params) // len(own)
        for place, candidate in zip(options, own, strict=True):
            known = candidate.estimate or Estimate(candidate.error)
            estimate = dataclasses.replace(known, harm=math.sqrt(cost))
            place.append(dataclasses.replace(candidate, bytes=size, estimate=estimate))
    # With costs in the place of errors a sensitivity is 1; noise is in proportion to them.
    told = members[0].sensitivity is not None
    measured = noise / loss if told and loss > 0.0 else None
    return [
        dataclasses.replace(
            own,
            options=tuple(place),
            sensitivity=1.0 if told else None,
            prior=1.0,
            scale=None,
            measured=measured,
            noise_scale=None,
        )
        for own, place in zip(members, options, strict=True)
    ]


def _bytes(own: Sequence[Candidate], params: Params) -> int:
    """What weights with equal settings take together, their basis among it."""
    shared: dict[str, int] = {}
    for candidate in own:
        codec = CODECS[candidate.codec]
        shared.update({k: t.nbytes for k, t in codec.shared(candidate.site, params).items()})
    return sum(candidate.bytes for candidate in own) + sum(shared.values())
