"""The prior of sensitivities: how much each weight matters, by its shape and its place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from onnxcomp.passes.weight import WeightSite

__all__ = ["is_filter", "sensitivity", "sensitivity_prior"]

# How much more than others a weight counts that filters an input of the model. Neighbouring samples
# of sound and images are much alike, so nearly all of their power is at low frequencies; the error
# of a weight is white, and in filters of high frequencies it lets this power through, where the
# result should be small. With all weights of a detector of speech at 5 bits, the filters of its
# Fourier transform, a fifth of the weights, make 90 % of the noise in its answers.
_RAW = 16

_CONVOLUTIONS = ("Conv", "ConvTranspose", "com.microsoft::FusedConv")


def is_filter(site: WeightSite) -> bool:
    """Whether a weight is that of convolutions alone."""
    return bool(site.uses) and all(use.op_type in _CONVOLUTIONS for use in site.uses)


def sensitivity(site: WeightSite) -> float:
    """Weight of a site in the objective where it was not measured.

    A layer whose weight has relative error e, not correlated with its input, has an output with
    relative error e in the mean, and independent errors add in squares: so the squared relative
    errors of the weights, each counted this many times, stand for the noise power of the model.

    It is the number of weights, so that every weight counts alike: then a budget that allows
    equal bits for all is spent on them. Of a table that is only looked up, a token reads one
    row: its rows do not add up, and it counts at most like the widest layer behind it, four
    times its length. With a sentence encoder whose table is half of its weights, mean 1 -
    cosine to the dense embeddings is 0.147 at ratio 10 and 0.326 at 13, against 0.231 and 0.526
    when tables count in full and 0.183 and 0.359 when all sites count alike; with a small
    language model, the divergence from the dense distribution is 0.027 nats at ratio 10,
    against 0.082 when all sites count alike.

    The first convolution of a raw signal counts `_RAW` times. Of other convolutions of
    one model, small ones count more than that: see `sensitivity_prior`.
    """
    looked_up = all(use.need == "gather" for use in site.uses)
    size = min(site.size, 4 * site.length**2) if looked_up else site.size
    return float(size * (_RAW if site.filters_input else 1))


def sensitivity_prior(sites: Sequence[WeightSite]) -> Mapping[str, float]:
    """Weights of all sites of a model in the objective where they were not measured.

    That of `sensitivity`, but filters count as the root of the number of their weights, together as
    much as before: the layers of a convolutional network follow one another, whatever their size,
    and the first ones and depthwise ones are small. Measured noise of the outputs hardly grows with
    that number (powers of -0.1 and 0.15 in ResNet20 and SqueezeNet); the root is half way from
    there to equal bits for all, which are safe.
    """
    found = {site.name: sensitivity(site) for site in sites}
    filters = [site.name for site in sites if is_filter(site) and not site.filters_input]
    roots = {name: math.sqrt(found[name]) for name in filters}
    scale = sum(found[name] for name in filters) / max(1.0, sum(roots.values()))
    return found | {name: scale * root for name, root in roots.items()}
