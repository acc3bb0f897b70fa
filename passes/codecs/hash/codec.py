"""The codec of hashed parameter sharing: weights are signed copies of the slots of a small memory.

Format: ops/hash/spec.md. It is meant for models that were trained with sharing
(`onnxcomp.models.share`). Any other weight is projected on such a memory, which mostly loses more
than `hyper` at equal bytes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import onnx

from onnxcomp.errors import UsageError
from onnxcomp.passes.codecs.anchoring import lacking
from onnxcomp.passes.codecs.hash import (
    format as hash_format,
)
from onnxcomp.passes.codecs.hash import (
    projection as hash_projection,
)
from onnxcomp.passes.codecs.hash.format import (
    CHUNKS,
    TILE,
    ChunkLayout,
    Sharing,
    expand,
    seeds,
    shared_tensors,
)
from onnxcomp.passes.codecs.held_out import held_out_error
from onnxcomp.passes.codecs.moments import ENOUGH, mean_diagonal, with_weight_error
from onnxcomp.passes.codecs.params import Params
from onnxcomp.passes.codecs.protocol import (
    Builder,
    CalibratedEncoding,
    Codec,
    DenseFallback,
    LoadMemory,
    Payload,
    SharedValues,
    TensorLayout,
    ValueSharing,
)
from onnxcomp.passes.weight import Array, Kind, Stats, WeightSite

__all__ = ["HashCodec", "HashParams"]

V = TypeVar("V")

_MEMORIES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "int8": np.dtype(np.int8),
}
_MAPS = ("fold", "matched", "roast")
_MAX_COMPRESSION = 1024

_ADVICE = (
    "weights lose nothing that share a memory in training (onnxcomp.models.share) and are exported "
    "by torch.onnx.export from the shared module; other codecs lose less of weights that do not"
)

# Shares of the mean diagonal that are added to the moments, in the order in which they are tried.
_RIDGES = (0.01, 0.001, 0.1)

# Rounding to int8 with one scale for a memory of normal values of about four standard deviations.
_INT8_ERROR = 4.5 / 127.0 / math.sqrt(12.0)

# Relative error of the map `matched` on 2^18 normal weights, by chunk, for compressions of 2, 4, 8
# and 16 (benchmarks/bench_hash.py --matched).
_MATCHED: Mapping[int, tuple[float, ...]] = {
    4: (0.2108, 0.2456, 0.2761, 0.2969),
    8: (0.4085, 0.4613, 0.5022, 0.5306),
    16: (0.5937, 0.6475, 0.6849, 0.7113),
}


@dataclasses.dataclass(frozen=True, slots=True)
class HashParams(Params):
    """Settings of the codec of hashed sharing.

    Attributes:
        compression: Weights for each entry of the memory, 1..1024.
        map: How chunks find their slots: "fold" (in order, rotated in every round), "roast" (hashed
            one by one), both computed without an index; "matched" (the best of 128 candidates and
            two signs, one byte for each chunk).
        chunk: Weights of a slot: 256, a tile of the kernels, for fold and roast; 4, 8 or 16 for
            matched.
        memory: What the memory holds: "float32", "float16" or "int8".
        seed: Seed of rotations and signs.
        limit: Relative error of products on inputs kept aside, or of the weight where there are no
            inputs, above which a weight stays dense; 1 for whatever is better than nothing.
    """

    compression: int = 4
    map: str = "fold"
    chunk: int = TILE
    memory: str = "float16"
    seed: int = 0
    limit: float = 0.5


_OFFERED = (
    *(HashParams(c, memory=m) for c in (2, 4, 8, 16) for m in ("float16", "int8")),
    *(HashParams(c, "matched", 8, "int8") for c in (2, 4, 8, 16)),
)


def _geometry(site: WeightSite, params: HashParams) -> ChunkLayout:
    return ChunkLayout(site.rows, site.length, params.chunk)


def _slots(site: WeightSite, params: HashParams) -> int:
    """Slots of the memory."""
    return max(1, math.ceil(_geometry(site, params).chunks / params.compression))


def _sharing(site: WeightSite, params: HashParams) -> Sharing:
    """The map of a weight with a memory of its own."""
    slots = _slots(site, params)
    rotate, sign = seeds(params.seed)
    if params.map == "matched":
        # An odd share of the golden ratio: candidates lie far apart from each other.
        return Sharing(slots, rotate, None, stride=max(1, int(slots * 0.618)) | 1)
    return Sharing(1 if params.map == "roast" else slots, rotate, sign)


def _memory_of(payload: Payload) -> Array:
    """The weight's own memory, or the one it shares with others."""
    shared = (array for key, array in payload.shared.items() if key.startswith("hash.memory."))
    memory = payload.tensors.get("memory")
    memory = next(shared, None) if memory is None else memory
    if memory is None:
        raise ValueError("the memory is missing")
    return memory


def _codes_of(payload: Payload) -> Array | None:
    return payload.tensors.get("codes")


def _stored(memory: Array, name: str) -> tuple[Array, Array]:
    """Memory in its element type, and its scale."""
    dtype = _MEMORIES[name]
    scale = 1.0
    if name == "int8":
        most = float(np.max(np.abs(memory)))
        scale = most / 127.0 if most > 0.0 else 1.0
        memory = np.rint(memory / scale)
    return memory.astype(dtype), np.array([scale], np.float32)


def _raised(stats: Stats, weight: Array, ridge: float) -> Array:
    """Moments of the inputs, made regular: float64.

    A memory of least squares makes ``E |W x_ref - W' x|^2 + d |W - W'|^2`` small; the second term
    is d on the diagonal, more where there are few input vectors.
    """
    length, mean = len(stats.gram), mean_diagonal(stats.gram)
    scarcity = max(1.0, ENOUGH * length / max(1, stats.tokens))
    added = np.eye(length) * (min(1.0, ridge * scarcity) * mean if mean > 0.0 else 1.0)
    if stats.frequencies is not None:
        added = with_weight_error(stats.gram + added, weight) - stats.gram
    return np.asarray(stats.gram + added)


class HashCodec(Codec):
    """HashMatMul, HashGather, HashDecode and HashWeight of ops/hash/spec.md."""

    name: ClassVar[str] = "hash"
    summary: ClassVar[str] = (
        "hashed sharing: weights are signed copies of a small memory; for models trained that way"
    )
    params_type: ClassVar[type[Params]] = HashParams

    @property
    def calibration(self) -> CalibratedEncoding:
        """For inputs with known moments: the memory is free."""
        return CalibratedEncoding(self.encode_calibrated, anchored=True)

    @property
    def fallback(self) -> DenseFallback:
        """Mostly worse than `hyper` where a model was not trained with sharing."""
        return DenseFallback("hyper", lambda params: HashParams.of(params).limit, _ADVICE)

    @property
    def sharing(self) -> ValueSharing:
        """The entries of the memory."""
        return ValueSharing(self.shared_values, self.with_values)

    def refuse(self, site: WeightSite) -> str | None:
        """Why no setting of this codec suits the site; None when one does."""
        refusal = site.refusal(self.name)
        if refusal is not None:
            return refusal
        if not self.candidates(site):
            shape = f"{site.rows} x {site.length}"
            return f"{shape}, padded to tiles of 16 x 16, would not be smaller"
        return None

    def check(self, params: Params) -> None:
        """Raise `UsageError` when the parameters are out of range."""
        p = HashParams.of(params)
        if not 1 <= p.compression <= _MAX_COMPRESSION:
            raise UsageError(
                f"hash: compression={p.compression}", hint=f"it is 1 to {_MAX_COMPRESSION}"
            )
        if p.map not in _MAPS:
            raise UsageError(f"hash: map={p.map}", hint=f"maps are {', '.join(_MAPS)}")
        if p.memory not in _MEMORIES:
            raise UsageError(f"hash: memory={p.memory}", hint=f"one of {', '.join(_MEMORIES)}")
        allowed = CHUNKS[:3] if p.map == "matched" else (TILE,)
        if p.chunk not in allowed:
            sizes = ", ".join(map(str, allowed))
            raise UsageError(
                f"hash: chunk={p.chunk}", hint=f"the map {p.map} has chunks of {sizes}"
            )
        if p.seed < 0:
            raise UsageError(f"hash: seed={p.seed}", hint="seeds are not negative")
        if not p.limit > 0.0:
            raise UsageError(f"hash: limit={p.limit}", hint="a limit is positive")

    def candidates(self, site: WeightSite) -> Sequence[HashParams]:
        """Settings smaller than the dense tensor, from most to fewest bytes."""
        if site.refusal(self.name):
            return ()
        smaller = {
            self.size(site, params): params
            for params in _OFFERED
            if self.size(site, params) < site.nbytes
        }
        return [smaller[size] for size in sorted(smaller, reverse=True)]

    def layout(self, site: WeightSite, params: Params) -> Mapping[str, TensorLayout]:
        """Memory and scale of spec.md section 1, and codes where chunks choose."""
        p = HashParams.of(params)
        memory = TensorLayout((_slots(site, p), p.chunk), _MEMORIES[p.memory])
        layout = {"memory": memory, "scale": TensorLayout((1,), np.dtype(np.float32))}
        if p.map == "matched":
            g = _geometry(site, p)
            shape = (g.panels, g.blocks, g.parts)
            layout["codes"] = TensorLayout(shape, np.dtype(np.uint8))
        return layout

    def shared(self, site: WeightSite, params: Params) -> Mapping[str, Array]:
        """The map and the constants of the portable body, spec.md section 4."""
        p = HashParams.of(params)
        shared = dict(shared_tensors(_geometry(site, p), _sharing(site, p)))
        if p.map != "matched":
            shared["hash.codes.none"] = np.zeros((1, 1, 1), np.uint8)
        return shared

    def predict(self, site: WeightSite, params: Params) -> float:
        """Error on normal weights: that of their mean over the uses of an entry.

        A memory of ``m`` entries spans ``m`` of ``n`` dimensions: ``sqrt(1 - m / n)`` of the weight
        is left. Choosing among candidates leaves less, which was measured.
        """
        p = HashParams.of(params)
        left = 1.0 - min(1.0, _slots(site, p) / _geometry(site, p).chunks)
        if p.map == "matched":
            measured = _MATCHED[p.chunk]
            left = float(np.interp(math.log2(p.compression), (1, 2, 3, 4), measured)) ** 2
        rounding = _INT8_ERROR**2 * (1.0 - left) if p.memory == "int8" else 0.0
        return math.sqrt(left + rounding)

    def encode(
        self, site: WeightSite, weight: Array, params: Params, *, threads: int = 1
    ) -> Payload:
        """Project ``(rows, length)`` on the memory of least weight error.

        Raises:
            ModelError: The weight is not finite.
        """
        p = HashParams.of(params)
        memory, codes = self._project(site, weight, p)
        return self._payload(site, p, memory, codes)

    def _project(
        self, site: WeightSite, weight: Array, p: HashParams
    ) -> tuple[Array, Array | None]:
        weight = np.ascontiguousarray(weight, np.float32).reshape(site.rows, site.length)
        geometry, sharing, slots = _geometry(site, p), _sharing(site, p), _slots(site, p)
        if p.map == "matched":
            return hash_projection.match(weight, geometry, sharing, slots)
        return hash_projection.mean(weight, geometry, sharing, slots), None

    def encode_calibrated(
        self, site: WeightSite, weight: Array, params: Params, stats: Stats, *, threads: int = 1
    ) -> Payload:
        """Project on the memory of least error of products: least squares from the mean.

        The outputs aimed at are those of the dense model. How much the moments are raised is
        decided by the inputs kept aside.
        """
        p = HashParams.of(params)
        start, codes = self._project(site, weight, p)
        best, least, lack = start, math.inf, lacking(weight, stats)
        for ridge in _RIDGES:
            moments = _raised(stats, weight, ridge)
            memory = hash_projection.least_squares(
                weight, _geometry(site, p), _sharing(site, p), start, moments, codes, lack
            )
            payload = self._payload(site, p, memory, codes)
            error = held_out_error(weight, self.decode(site, payload), stats)
            if error is None:
                return payload
            if error < least:
                best, least = memory, error
        return self._payload(site, p, best, codes)

    def _payload(
        self, site: WeightSite, p: HashParams, memory: Array, codes: Array | None
    ) -> Payload:
        stored, scale = _stored(memory, p.memory)
        tensors = {"memory": stored, "scale": scale}
        if codes is not None:
            tensors["codes"] = codes
        return Payload(tensors, self.shared(site, p), self.attributes(site, p))

    def shared_values(self, site: WeightSite, payload: Payload) -> SharedValues:
        """Entries of the memory, and which of them every weight is."""
        memory, geometry, sharing = self._read(site, payload)
        codes = _codes_of(payload)
        places = hash_format.places(geometry, sharing, len(memory), codes)
        signs = hash_format.chunk_signs(geometry, sharing, codes)
        entries = places[..., None] * geometry.chunk + np.arange(geometry.chunk)
        matrices = [
            hash_format.to_matrix(array, geometry)
            for array in (entries, np.broadcast_to(signs[..., None], entries.shape))
        ]
        index, factors = (site.stored_form(m).reshape(-1) for m in matrices)
        values = memory.astype(np.float32).reshape(-1) * payload.tensors["scale"][0]
        return SharedValues(
            site.name,
            site.shape,
            values,
            np.ascontiguousarray(index),
            np.ascontiguousarray(factors),
        )

    def with_values(
        self, site: WeightSite, params: Params, payload: Payload, values: Array
    ) -> Payload:
        """The same with another memory."""
        p = HashParams.of(params)
        return self._payload(site, p, values.reshape(-1, p.chunk), _codes_of(payload))

    def decode(self, site: WeightSite, payload: Payload) -> Array:
        """Expand to ``(rows, length)`` float32."""
        memory, geometry, sharing = self._read(site, payload)
        return expand(memory, payload.tensors["scale"], geometry, sharing, _codes_of(payload))

    def _read(self, site: WeightSite, payload: Payload) -> tuple[Array, ChunkLayout, Sharing]:
        """Memory, sizes and map of a payload."""
        memory = _memory_of(payload)
        keys = [key for key in payload.shared if key.startswith("hash.map.")]
        if len(keys) != 1 or memory.ndim != 2 or memory.shape[1] not in CHUNKS or not len(memory):
            raise ValueError(f"memory {memory.shape} and {len(keys)} maps do not fit")
        geometry = ChunkLayout(site.rows, site.length, memory.shape[1])
        return memory, geometry, Sharing.of(payload.shared[keys[0]])

    def kinds(self, site: WeightSite) -> frozenset[Kind]:
        """Products and look-ups where the site has such uses; the dense weight always."""
        return site.kinds

    def emit(
        self, builder: Builder[V], site: WeightSite, payload: Payload, kind: Kind, x: V | None
    ) -> V:
        """W -> Hash...(memory, scale, codes, map, ...)."""
        from onnxcomp.passes.codecs.hash import bodies as hash_bodies

        return hash_bodies.emit(builder, site, payload, kind, x)

    @property
    def pacing(self) -> str | None:
        """Numbers of panels, which everything else is computed from."""
        return "hash.panels."

    def load_memory(self, site: WeightSite, params: Params, kind: Kind) -> LoadMemory:
        """What folding the portable body takes."""
        from onnxcomp.passes.codecs.hash import bodies as hash_bodies

        return hash_bodies.load_memory(site, _geometry(site, HashParams.of(params)), kind)

    def functions(self, opset: int) -> Sequence[onnx.FunctionProto]:
        """Portable bodies, valid in models of this opset."""
        from onnxcomp.passes.codecs.hash import bodies as hash_bodies

        return hash_bodies.functions(opset)
