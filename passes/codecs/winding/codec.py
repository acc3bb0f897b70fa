"""The winding codec: Hyper-Compression as published, to be compared with.

Format: ops/winding/spec.md. Pairs of weights are stored as the number of steps after which a
trajectory on the torus comes nearest to them (Fan et al., arXiv 2409.00592). It is chosen when it
is asked for by name only: at equal bytes `hyper` has a fifth to a tenth of its error power.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, TypeVar

import numpy as np
import onnx

from onnxcomp.errors import ModelError, UsageError
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import Builder, Codec, LoadMemory, Payload, TensorLayout
from onnxcomp.passes.codecs.winding import format as winding_format
from onnxcomp.passes.codecs.winding.format import GRIDS, PairLayout, Trajectory, trajectory
from onnxcomp.passes.weight import Array, Kind, WeightSite

__all__ = ["WindingCodec", "WindingParams", "best_side"]

V = TypeVar("V")

_BITS = range(2, 7)
_MOST_POINTS = 8191
_MOST_CLASSES = 15

# Mean absolute error above which the published program stores a tensor as it was.
_WORST_ERROR = 0.006

# Relative error that stands for an unknown one.
_UNKNOWN = 0.5

# Best side of the box for normal weights, in standard deviations, by bits per weight, without and
# with classes of outliers; benchmarks/bench_hyper_quality.py.
_SIDES: Mapping[bool, Mapping[int, float]] = {
    False: {2: 4.4, 3: 4.8, 4: 5.4, 5: 6.0, 6: 6.8},
    True: {2: 3.0, 3: 2.4, 4: 2.6, 5: 2.6, 6: 2.8},
}


@dataclasses.dataclass(frozen=True, slots=True)
class WindingParams(Params):
    """Settings of the winding codec.

    Attributes:
        bits: Bits per weight, 2..6: points and classes share the ``2 * bits`` bits of a pair.
        grid: The trajectory: sheared as published, pi with the directions 1 / (pi + k), or
            lattice with points as far apart as can be.
        classes: Largest number of classes of outliers, 0..15; published are 3 and 4.
        side: Side of the box around the mean; published are 0.1 and 0.8. Zero takes what is best
            for normal weights of the same standard deviation.
        points: Points of the box, at most 8191; zero takes as many as the bits allow. The bits
            follow from it where it is given; published are 225 and 1600.
        group: Weights that share a scale, a multiple of 16; zero is one centre and range for the
            whole tensor, as published. With groups the side counts in their scales.
    """

    bits: int = 4
    grid: str = "sheared"
    classes: int = 3
    side: float = 0.0
    points: int = 0
    group: int = 0


def _points(params: WindingParams) -> int:
    return params.points or min(_MOST_POINTS, 4**params.bits // (params.classes + 1) - 1)


def _pair_bits(params: WindingParams) -> int:
    if not params.points:
        return 2 * params.bits
    return int((params.points + 1) * (params.classes + 1) - 1).bit_length()


def _geometry(site: WeightSite, params: WindingParams) -> PairLayout:
    extent = (site.rows, site.length)
    return PairLayout(_pair_bits(params), params.classes, params.group, *extent)


def _path(params: WindingParams) -> Trajectory:
    return trajectory(params.grid, _points(params))


def best_side(bits: float, classes: int) -> float:
    """Side of the box that suits normal weights, in standard deviations.

    Args:
        bits: Bits per weight.
        classes: Classes of outliers.
    """
    table = _SIDES[classes > 0]
    return float(np.interp(bits, list(table), list(table.values())))


@functools.lru_cache(maxsize=64)
def _usual_error(params: WindingParams) -> float:
    """Relative error on normal weights."""
    use = ()
    site = WeightSite("", (128, 512), "float32", use, "", 128, 512, False)
    weight = np.random.default_rng(0).standard_normal((128, 512), np.float32)
    codec = WindingCodec()
    error = codec.decode(site, codec.encode(site, weight, params)) - weight
    return float(np.linalg.norm(error) / np.linalg.norm(weight))


def _grouped(weight: Array, geometry: PairLayout, fill: float) -> Array:
    """All weights in a row, padded to whole blocks: float32 ``(G, n * 8, 2)``."""
    size = geometry.groups * geometry.blocks * winding_format.OCTET * 2
    flat = np.full(size, fill, np.float32)
    flat[: geometry.size] = weight.reshape(-1)
    return flat.reshape(geometry.groups, -1, 2)


def _group_scales(pairs: Array) -> Array:
    """Root mean squares of groups, float16 ``(G, 1, 1)``.

    Raises:
        ModelError: One of them is too large.
    """
    power = np.square(pairs.astype(np.float64)).mean(axis=(1, 2))
    with np.errstate(over="ignore"):
        scales = np.sqrt(power).astype(np.float16)
    if not np.isfinite(scales).all():
        raise ModelError("values are too large for float16 scales")
    return np.asarray(scales.reshape(-1, 1, 1))


class WindingCodec(Codec):
    """WindingDecode and WindingWeight of ops/winding/spec.md."""

    name: ClassVar[str] = "winding"
    summary: ClassVar[str] = (
        "Hyper-Compression as published, to compare with: pairs of weights as steps of a trajectory"
    )
    params_type: ClassVar[type[Params]] = WindingParams
    width: ClassVar[str | None] = "bits"

    def refuse(self, site: WeightSite) -> str | None:
        """Only dtypes that are unknown, and what would not become smaller, are refused."""
        refusal = site.refusal(self.name)
        if refusal is not None:
            return refusal
        least = self.size(site, WindingParams(min(_BITS)))
        if least >= site.nbytes:
            return f"{site.rows} x {site.length} needs {least} bytes, {site.nbytes} dense"
        return None

    def check(self, params: Params) -> None:
        """Raise `UsageError` when the parameters are out of range."""
        winding = WindingParams.of(params)
        limits = (
            ("bits", winding.bits in _BITS, "bits are 2 to 6 per weight"),
            ("grid", winding.grid in GRIDS, f"grids are {', '.join(GRIDS)}"),
            ("classes", 0 <= winding.classes <= _MOST_CLASSES, "classes are 0 to 15"),
            ("side", 0.0 <= winding.side < math.inf, "the side of a box is positive"),
            ("points", 0 <= winding.points <= _MOST_POINTS, f"points are {_MOST_POINTS} at most"),
            (
                "group",
                winding.group >= 0 and winding.group % 16 == 0,
                "groups are multiples of 16, or 0 for the whole tensor",
            ),
        )
        for name, valid, hint in limits:
            if not valid:
                raise UsageError(f"winding: {name}={getattr(winding, name)}", hint=hint)
        if _points(winding) < 1:
            raise UsageError(
                f"winding: bits={winding.bits} leave no point beside classes={winding.classes}",
                hint="take more bits or fewer classes",
            )

    def candidates(self, site: WeightSite) -> Sequence[WindingParams]:
        """As published, with every number of bits, from most to fewest bytes."""
        offered = [WindingParams(bits) for bits in reversed(_BITS)]
        return [params for params in offered if self.size(site, params) < site.nbytes]

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """Codes, scales, centre and spans of spec.md section 1."""
        geometry = _geometry(site, WindingParams.of(params))
        return {
            "codes": TensorLayout(geometry.codes_shape, np.dtype(np.uint8)),
            "scales": TensorLayout(geometry.scales_shape, np.dtype(np.float16)),
            "centre": TensorLayout((2,), np.dtype(np.float32)),
            "spans": TensorLayout((geometry.classes + 1,), np.dtype(np.float32)),
        }

    def shared(self, site: WeightSite, params: Params) -> Mapping[str, Array]:
        """The trajectory, and constants of the portable body."""
        winding = WindingParams.of(params)
        geometry = _geometry(site, winding)
        return winding_format.shared_tensors(_path(winding), winding.grid, geometry)

    def size(self, site: WeightSite, params: Params) -> int:
        """Bytes of codes, scales, centre and spans, exactly."""
        return _geometry(site, WindingParams.of(params)).nbytes

    def predict(self, site: WeightSite, params: Params) -> float:
        """Relative error on normal weights; with a fixed side nobody knows it before."""
        winding = WindingParams.of(params)
        return _UNKNOWN if winding.side and not winding.group else _usual_error(winding)

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Encode ``(rows, length)`` float32.

        Raises:
            ModelError: With a fixed side, where the published program keeps the tensor as it is;
                or values are too large for float16 scales.
        """
        from onnxcomp.passes.codecs.winding import search as winding_search

        winding = WindingParams.of(params)
        geometry, path = _geometry(site, winding), _path(winding)
        pairs, scales, centre = self._framed(np.asarray(weight, np.float32), geometry)
        offsets = (pairs - centre).reshape(-1, 2)
        side = winding.side or best_side(_pair_bits(winding) / 2, winding.classes)
        if not winding.side and not winding.group:
            side *= float(np.sqrt(np.square(offsets, dtype=np.float64).mean()))
        if side == 0.0:  # all weights are equal: the centre says it all
            found = winding_search.constant(len(offsets), winding.classes)
        else:
            found = winding_search.encode(path, offsets, side, winding.classes)
        if winding.side and not winding.group and found.error > _WORST_ERROR:
            raise ModelError(
                f"winding: mean absolute error {found.error:.3g} is above {_WORST_ERROR}, "
                "at which the published method leaves a weight dense"
            )
        tensors = {
            "codes": winding_format.pack(
                found.codes.reshape(geometry.groups, -1), geometry.pair_bits
            ),
            "scales": scales,
            "centre": centre,
            "spans": found.spans,
        }
        return Payload(tensors, self.shared(site, params), self.attributes(site, params))

    @staticmethod
    def _framed(weight: Array, geometry: PairLayout) -> tuple[Array, Array, Array]:
        """Pairs in units of their scales, the scales, and the centre."""
        if geometry.group:
            pairs = _grouped(weight, geometry, 0.0)
            scales = _group_scales(pairs)
            factor = scales.astype(np.float32)
            scaled = np.divide(pairs, factor, out=np.zeros_like(pairs), where=factor > 0)
            return scaled, scales, np.zeros(2, np.float32)
        flat = weight.reshape(-1)
        mean = float(flat.mean(dtype=np.float64))
        pairs = _grouped(weight, geometry, mean)
        even, odd = flat[0::2], flat[1::2]
        middle = [float(part.mean(dtype=np.float64)) if len(part) else mean for part in (even, odd)]
        return pairs, np.ones((1, 1, 1), np.float16), np.array(middle, np.float32)

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """Decode to ``(rows, length)`` float32."""
        shared = {key.split(".")[1]: array for key, array in payload.shared.items()}
        _, points, order = (int(size) for size in shared["sizes"])
        first, second = (int(step) for step in shared["generator"])
        path = Trajectory(points - 1, (first, second), order)
        return winding_format.decode(payload.tensors, path, (site.rows, site.length))

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """W -> WindingWeight(codes, scales, ...) or WindingDecode(codes, scales, ...)."""
        from onnxcomp.passes.codecs.winding import bodies as winding_bodies

        return winding_bodies.emit(builder, site, payload, kind)

    def load_memory(self, site: WeightSite, params: Params, kind: Kind) -> LoadMemory:
        """What folding the portable body takes."""
        from onnxcomp.passes.codecs.winding import bodies as winding_bodies

        return winding_bodies.load_memory(site)

    def functions(self, opset: int) -> Sequence[onnx.FunctionProto]:
        """Portable bodies, valid in models of this opset."""
        from onnxcomp.passes.codecs.winding import bodies as winding_bodies

        return winding_bodies.functions(opset)
